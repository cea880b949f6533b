"""Trace a step of our trainer for a model of the planner's. `seqmesh plan --trace-memory` shows it.

    traced = trace_training_step(load_model("llama3-8b"), seq_len=212_992, ulysses=8, ring=2)

Beside it stands the prediction of memory.py.
"""

from collections.abc import Sequence

from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.trainer.memory import check_trainable
from seqmesh.trace.allocations import TracedMemory
from seqmesh.trace.tracing import trace_recipe
from seqmesh.train.config import Config, DataConfig, MeshConfig, ModelConfig


def trace_training_step(
    shape: ModelShape, *, seq_len: int, ulysses: int, ring: int, documents: Sequence[int] | None = None
) -> TracedMemory:
    """Peak memory of rank 0 in a step of our trainer.

    fp32, weights replicated, nothing recomputed but the loss's softmax. Takes seconds to minutes (5000
    operators a second), and some 100 MB. Leaves no process group and no random state behind.

    Args:
        shape: the model, trained as a Llama.
        seq_len: tokens of the one packed sequence of a step, over all ranks.
        ulysses: ulysses degree.
        ring: ring degree.
        documents: tokens of the documents in the sequence, which the trainer shuffles; default: one.

    Raises:
        ValueError: a shape or mesh that the trainer cannot run, documents that do not fill the sequence, or a
            process that already has a process group.
    """
    check_trainable(shape)
    config = _config(shape, seq_len, ulysses, ring)
    return trace_recipe(config, vocabulary=shape.vocabulary, documents=documents)


def _config(shape: ModelShape, seq_len: int, ulysses: int, ring: int) -> Config:
    return Config(
        mesh=MeshConfig(ulysses=ulysses, ring=ring),
        model=ModelConfig(
            hidden=shape.hidden,
            layers=shape.layers,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            intermediate=shape.intermediate,
            tie_embeddings=shape.tied_embeddings,
        ),
        data=DataConfig(seq_len=seq_len),
    )
