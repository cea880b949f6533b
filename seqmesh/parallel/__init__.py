"""Hybrid training of Hugging Face models: tensor, sequence, pipeline and data parallelism on one mesh.

    mesh = ParallelDims(dp_shard=2, ring=2).build()
    local = shard_batch(TokenBatch(input_ids=ids, position_ids=positions), mesh)

The model's code knows nothing of it: each parallelism is applied from outside, a file each.
"""

from seqmesh.parallel.batch import LocalBatch, shard_batch, shard_micro_batches
from seqmesh.parallel.clip import clip_gradients
from seqmesh.parallel.dims import ParallelDims, ParallelMesh
from seqmesh.parallel.layer_kinds import LayerKinds
from seqmesh.parallel.load import load_folder, load_from_rank_0
from seqmesh.parallel.loss import HeadRule, hidden_loss
from seqmesh.parallel.model import ParallelModel, loss
from seqmesh.parallel.packing import IGNORED_LABEL, PackedTokens, TokenBatch, pack
from seqmesh.parallel.parallelize import parallelize
from seqmesh.parallel.plan import ParallelPlan

__all__ = [
    "IGNORED_LABEL",
    "HeadRule",
    "LayerKinds",
    "LocalBatch",
    "PackedTokens",
    "ParallelDims",
    "ParallelMesh",
    "ParallelModel",
    "ParallelPlan",
    "TokenBatch",
    "clip_gradients",
    "hidden_loss",
    "load_folder",
    "load_from_rank_0",
    "loss",
    "pack",
    "parallelize",
    "shard_batch",
    "shard_micro_batches",
]
