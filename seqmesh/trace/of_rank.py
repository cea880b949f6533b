"""Trace a step of our trainer for a rank of the memory's formula. `seqmesh plan --trace-memory` shows it.

    rank = TrainedRank(shape=load_model("llama3-8b"), point=Point(ulysses=8, ring=2, zero=3), seq_len=212_992)
    traced = trace_rank(rank)

Beside it stands the prediction of train/memory/, of which `Moment.everywhere` counts what a trace does.
"""

from collections.abc import Sequence

from seqmesh.trace.allocations import TracedMemory
from seqmesh.trace.tracing import trace_recipe
from seqmesh.train.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from seqmesh.train.memory.peak import check_trainable
from seqmesh.train.memory.rank import TrainedRank


def trace_rank(rank: TrainedRank, documents: Sequence[int] | None = None) -> TracedMemory:
    """Peak memory of a rank in a step of our trainer.

    Takes seconds to minutes (5000 operators a second), and some 100 MB. Leaves no process group and no random
    state behind.

    Args:
        rank: as the trainer would run it.
        documents: tokens of the documents in a sequence, which the trainer shuffles; default: one.

    Raises:
        ValueError: a shape or mix that the trainer cannot run, documents that do not fill the sequence, or a
            process that already has a process group.
    """
    check_trainable(rank.shape)
    return trace_recipe(
        config_of(rank), vocabulary=rank.shape.vocabulary, documents=documents, stage=rank.stage
    )


def config_of(rank: TrainedRank) -> Config:
    """The recipe of a run with such a rank."""
    point = rank.point
    return Config(
        mesh=MeshConfig(
            pp=point.pp,
            dp_replicate=rank.copies,
            dp_shard=point.dp // rank.copies,
            ring=point.ring,
            ulysses=point.ulysses,
            tp=point.tp,
            pool=point.pool,
        ),
        model=_model(rank),
        data=DataConfig(seq_len=rank.seq_len, sequences=point.dp * point.micro_batch * rank.micro_batches),
        train=_train(rank),
    )


def _model(rank: TrainedRank) -> ModelConfig:
    shape = rank.shape
    return ModelConfig(
        hidden=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        intermediate=shape.intermediate,
        tie_embeddings=shape.tied_embeddings,
    )


def _train(rank: TrainedRank) -> TrainConfig:
    point = rank.point
    # Words that a `Point` has checked.
    words = {"checkpointing": point.checkpointing, "offload": point.offload}
    return TrainConfig(
        zero=point.zero,
        tiling="mlp" if rank.is_tiled else "none",
        shard_norms=rank.shard_norms,
        micro_batch=point.micro_batch,
        precision="bf16" if rank.is_half else "fp32",
        **words,  # type: ignore[arg-type]
    )
