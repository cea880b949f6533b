"""Hybrid training of Hugging Face models: tensor, sequence, pipeline and data parallelism on one mesh.

    mesh = ParallelDims(dp_shard=2, ring=2).build()

The model's code knows nothing of it: each parallelism is applied from outside, a file each.
"""

from seqmesh.parallel.dims import ParallelDims, ParallelMesh

__all__ = ["ParallelDims", "ParallelMesh"]
