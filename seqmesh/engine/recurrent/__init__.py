"""Layers that carry a state along a sharded sequence: short convolutions, delta rules, Mamba-2."""
