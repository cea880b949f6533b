"""Measurements: memory counted at the allocator, bytes at the collective, time as ratios within one run."""
