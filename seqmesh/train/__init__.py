"""`seqmesh train`: a recipe, the launcher of its ranks, the training loop and the report.

Start reading in trainer.py.
"""
