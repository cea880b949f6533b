"""A training step without its ranks and without its memory: what it holds and what it sends."""
