"""`seqmesh plan`: a model, a cluster and a batch -> time and memory of every way to spread the work. No torch.

The inputs are models.py and hardware.py (with their tables in data/), in the units of units.py.
"""
