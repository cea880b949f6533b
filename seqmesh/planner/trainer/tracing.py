"""Trace one rank's memory over a real training step, of any size, without having that memory.

`seqmesh plan --trace-memory` shows it beside the prediction of memory.py.

    traced = trace_training_step(load_model("llama3-8b"), seq_len=212_992, ulysses=8, ring=2)
    traced = trace_recipe(Config(mesh=MeshConfig(dp_shard=8, tp=2), train=TrainConfig(zero=3)))
    traced.peak_bytes, traced.activations, ...

What runs is `Trainer.step` of seqmesh/train, unchanged: the transformers model made parallel, with our
attention, the engine with all its stages and buffers, the loss, the backward, the reduction of the gradients,
clipping, AdamW and the checks. Three things are replaced:

    tensors      by fake ones, which have a shape, a dtype and a lifetime but no data       FakeTensorMode
    the ranks    by ones that do not exist; this process is rank 0                          fake_ranks.py
    host reads   (`loss.item()`, label counts, norms, checksums) by 1: no allocation depends on them

allocations.py says what is counted. Not seen are buffers inside one operator (the flash kernel's backward:
1 MiB a thread, and a copy of a tile's queries), nor what an allocator rounds up or keeps. Two steps run; the
second counts, for AdamW makes its states in the first.

    forward     |  the model, then the loss                        activations: what lives at its end
    backward    |  of the loss, of the layers from last to first   gradients appear, activations go
    update      |  all-reduce, clip, AdamW, checksum of the weights

With several micro-batches, forward and backward take turns. Any recipe can be traced but for pipelines.

Source: torch.distributed._tools.mem_tracker has the same idea.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from seqmesh.parallel.zero1 import ShardedStates
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.trainer.allocations import AllocationLog, TracedMemory
from seqmesh.planner.trainer.fake_ranks import fake_ranks
from seqmesh.planner.trainer.memory import check_trainable
from seqmesh.train.config import Config, DataConfig, MeshConfig, ModelConfig
from seqmesh.train.data import BYTES, VOCAB_SIZE, Corpus
from seqmesh.train.trainer import Trainer


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


def trace_recipe(
    config: Config, *, vocabulary: int = VOCAB_SIZE, documents: Sequence[int] | None = None
) -> TracedMemory:
    """Peak memory of rank 0 in a step of a run, whatever its mesh, ZeRO stage, savers and precision.

    Args:
        config: the run; its text is not read.
        vocabulary: token ids of the text, and of the model if the recipe names no number.
        documents: tokens of the documents in every packed sequence, which the trainer shuffles; default: one.

    Raises:
        ValueError: a mesh that the trainer cannot run, pipeline stages, documents that do not fill the
            sequence, or a process that already has a process group.
    """
    seq_len = config.data.seq_len
    corpus = _corpus(seq_len, [seq_len] if documents is None else documents, vocabulary)
    log = AllocationLog()
    with (
        fake_ranks(config) as mesh,
        torch.random.fork_rng(devices=[]),
        FakeTensorMode(allow_non_fake_inputs=True),
        log,
    ):
        trainer = Trainer(config, corpus, mesh, peak_flops_per_s=1.0)
        return _second_step(trainer, log)


def _second_step(trainer: Trainer, log: AllocationLog) -> TracedMemory:
    """Run two steps and sum up the second: AdamW makes its states in the first."""
    weights = list(trainer.model.parameters())
    buffers = (buffer for part in trainer.model.parts for buffer in part.buffers())
    log.mark((*weights, *buffers), "parameters")
    trainer.step()
    optimizer = trainer.optimizer
    inner = optimizer.inner if isinstance(optimizer, ShardedStates) else optimizer
    log.mark(tree_leaves(list(inner.state.values())), "optimizer")
    log.start_step(weights)
    trainer.step()
    log.mark((weight.grad for weight in weights), "gradients")
    return log.summary()


def _corpus(seq_len: int, lengths: Sequence[int], vocabulary: int) -> Corpus:
    """A text whose documents have these lengths in tokens."""
    if sum(lengths) != seq_len or min(lengths) < 2:
        raise ValueError(
            f"documents of {sum(lengths)} tokens in all, the shortest of {min(lengths)},"
            f" for seq_len={seq_len}; fill it exactly"
        )
    # The end of a document is a token too.
    return Corpus(
        source="traced",
        documents=tuple(bytes(length - 1) for length in lengths),
        vocabulary=replace(BYTES, size=vocabulary),
    )


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
