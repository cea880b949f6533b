"""Trace one rank's memory over a real training step, of any size, without having that memory.

    traced = trace_recipe(Config(mesh=MeshConfig(dp_shard=8, tp=2), train=TrainConfig(zero=3)))
    traced.peak_bytes, traced.activations, ...

What runs is `Trainer.step` of seqmesh/train, unchanged: the transformers model made parallel, with our
attention, the engine with all its stages and buffers, the loss, the backward, the reduction of the gradients,
clipping, AdamW and the checks. Four things are replaced:

    tensors      by fake ones, which have a shape, a dtype and a lifetime but no data       FakeTensorMode
    the ranks    by ones that do not exist; this process is rank 0                          fake_ranks.py
    host reads   (`loss.item()`, label counts, norms, checksums) by 1: no allocation depends on them
    routers      of spread experts by ones that use all experts evenly                      even_routing.py

allocations.py says what is counted. Not seen are buffers inside one operator (the flash kernel's backward:
1 MiB a thread, and a copy of a tile's queries), nor what an allocator rounds up or keeps. Two steps run; the
second counts, for AdamW makes its states in the first.

    forward     |  the model, then the loss                        activations: what lives at its end
    backward    |  of the loss, of the layers from last to first   gradients appear, activations go
    update      |  all-reduce, clip, AdamW, checksum of the weights

With several micro-batches, forward and backward take turns.

Source: torch.distributed._tools.mem_tracker has the same idea.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from seqmesh.parallel.traffic import CountTraffic
from seqmesh.trace.allocations import AllocationLog, TracedMemory
from seqmesh.trace.even_routing import even_routing
from seqmesh.trace.fake_ranks import fake_ranks, fake_weights
from seqmesh.train.checkpoint_state import states_of_this_rank
from seqmesh.train.config import Config
from seqmesh.train.data import BYTES, VOCAB_SIZE, Corpus
from seqmesh.train.trainer import Trainer


class TracedStep(NamedTuple):
    """What one rank holds and sends in a step."""

    memory: TracedMemory
    sent: dict[str, int]
    """Bytes by axis of the mesh: exchanges of attention by the schedule, all others as they are called."""


def trace_recipe(
    config: Config,
    *,
    vocabulary: int = VOCAB_SIZE,
    documents: Sequence[int] | None = None,
    stage: int = 0,
) -> TracedMemory:
    """Peak memory of one rank: `trace_step` without what it sends."""
    return trace_step(config, vocabulary=vocabulary, documents=documents, stage=stage).memory


def trace_step(
    config: Config,
    *,
    vocabulary: int = VOCAB_SIZE,
    documents: Sequence[int] | None = None,
    stage: int = 0,
) -> TracedStep:
    """Memory and traffic of one rank in a step of a run, whatever its mesh, ZeRO stage, savers and precision.

    Args:
        config: the run; its text is not read.
        vocabulary: token ids of the text, and of the model if the recipe names no number.
        documents: tokens of the documents in every packed sequence, which the trainer shuffles; default: one.
        stage: of a pipeline, whose first rank is traced: 0 for the one that holds most micro-batches.

    Raises:
        ValueError: a mesh that the trainer cannot run, documents that do not fill the sequence, or a process
            that already has a process group.
    """
    corpus = text_of(config, vocabulary, documents)
    log, sent = AllocationLog(), CountTraffic()
    with (
        fake_ranks(config, stage) as mesh,
        fake_weights(),
        even_routing(),
        torch.random.fork_rng(devices=[]),
        FakeTensorMode(allow_non_fake_inputs=True),
        log,
    ):
        trainer = Trainer(config, corpus, mesh, peak_flops_per_s=1.0)
        memory = _second_step(trainer, log, sent)
        # An operator that a selective checkpoint keeps is not run by fake tensors, and sends nothing.
        of_attention = trainer.scheduled_traffic(trainer.next_batches())
        traffic = {**sent.by_axis(mesh), **of_attention}
    return TracedStep(memory, {axis: bytes_sent for axis, bytes_sent in traffic.items() if bytes_sent})


def _second_step(trainer: Trainer, log: AllocationLog, sent: CountTraffic) -> TracedMemory:
    """Run two steps and sum up the second: AdamW makes its states in the first."""
    weights = list(trainer.model.parameters())
    buffers = (buffer for part in trainer.model.parts for buffer in part.buffers())
    log.mark((*weights, *buffers), "parameters")
    trainer.step()
    log.mark(tree_leaves(list(states_of_this_rank(trainer.optimizer).state.values())), "optimizer")
    log.start_step(weights)
    with sent:
        trainer.step()
    log.mark((weight.grad for weight in weights), "gradients")
    return log.summary()


def text_of(config: Config, vocabulary: int = VOCAB_SIZE, lengths: Sequence[int] | None = None) -> Corpus:
    """A text whose documents have these lengths in tokens, which fill a sequence; default: one document."""
    seq_len = config.data.seq_len
    lengths = [seq_len] if lengths is None else lengths
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
