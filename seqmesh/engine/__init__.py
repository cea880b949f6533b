"""The engine: attention over a sharded sequence, on PyTorch alone. Start reading in attention.py."""
