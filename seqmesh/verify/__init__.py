"""Proof on the machine at hand: every mask, layout, dtype and kernel, against dense attention in fp64."""
