"""Trace one rank's memory over a real training step, of any size, without having that memory.

`seqmesh plan --trace-memory` shows it beside the prediction of memory.py.

    traced = trace_training_step(load_model("llama3-8b"), seq_len=212_992, ulysses=8, ring=2)
    traced.peak_bytes, traced.activations, ...

What runs is `Trainer.step` of seqmesh/train, unchanged: the transformers model with our attention, the engine
with all its stages and buffers, the loss, the backward, the all-reduce of the gradients, clipping, AdamW and
the checks. Three things are replaced:

    tensors      by fake ones, which have a shape, a dtype and a lifetime but no data       FakeTensorMode
    the ranks    by a process group that answers at once; this process is rank 0            the "fake" backend
    host reads   (`loss.item()`, label counts, norms, checksums) by 1: no allocation depends on them

A storage counts from the operator that returns it until Python or autograd lets go of it. Not seen are
buffers inside one operator (the flash kernel's backward: 1 MiB a thread, and a copy of a tile's queries), nor
what an allocator rounds up or keeps. Two steps run; the second counts, for AdamW makes its states in the
first.

    forward     |  the model, then the loss                        activations: what lives at its end
    backward    |  of the loss, of the layers from last to first   gradients appear, activations go
    update      |  all-reduce, clip, AdamW, checksum of the weights

Source: torch.distributed._tools.mem_tracker has the same idea.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqmesh.parallel import ParallelDims, ParallelMesh
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.trainer.memory import check_trainable
from seqmesh.train.config import Config, DataConfig, MeshConfig, ModelConfig
from seqmesh.train.data import Corpus
from seqmesh.train.setup import dims_of
from seqmesh.train.trainer import Trainer

PHASES = ("forward", "backward", "update")
KINDS = ("parameters", "gradients", "optimizer", "activations", "temporaries")


@dataclass(frozen=True, kw_only=True)
class TracedMemory:
    """Bytes of rank 0 over one step. The five kinds are what lives at the peak, and add up to it."""

    peak_bytes: int
    peak_phase: str
    """The phase with the peak: forward, backward or update."""
    parameters: int
    """Weights, with the model's few buffers."""
    gradients: int
    """Of weights: what the backward made so far. A summand of one (of a tied head) is a temporary."""
    optimizer: int
    """AdamW's two states."""
    activations: int
    """What the forward left for the backward and is not freed yet."""
    temporaries: int
    """The rest: gradients of activations, communication buffers, recomputed logits, ..."""
    forward_peak_bytes: int
    backward_peak_bytes: int
    update_peak_bytes: int


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
    corpus = _corpus(seq_len, [seq_len] if documents is None else documents)
    log = _AllocationLog()
    with (
        _fake_ranks(config.mesh) as mesh,
        torch.random.fork_rng(devices=[]),
        FakeTensorMode(allow_non_fake_inputs=True),
        log,
    ):
        trainer = Trainer(config, corpus, mesh, peak_flops_per_s=1.0, vocabulary=shape.vocabulary)
        return _second_step(trainer, log)


def _second_step(trainer: Trainer, log: "_AllocationLog") -> TracedMemory:
    """Run two steps and sum up the second: AdamW makes its states in the first."""
    weights = list(trainer.model.parameters())
    buffers = (buffer for part in trainer.model.parts for buffer in part.buffers())
    log.mark((*weights, *buffers), "parameters")
    trainer.step()
    log.mark(tree_leaves(list(trainer.optimizer.state.values())), "optimizer")
    log.start_step(weights)
    trainer.step()
    log.mark((weight.grad for weight in weights), "gradients")
    return log.summary()


def _corpus(seq_len: int, lengths: Sequence[int]) -> Corpus:
    """A text whose documents have these lengths in tokens."""
    if sum(lengths) != seq_len or min(lengths) < 2:
        raise ValueError(
            f"documents of {sum(lengths)} tokens in all, the shortest of {min(lengths)},"
            f" for seq_len={seq_len}; fill it exactly"
        )
    # The end of a document is a token too.
    return Corpus(source="traced", documents=tuple(bytes(length - 1) for length in lengths))


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


@contextmanager
def _fake_ranks(mesh: MeshConfig) -> Iterator[ParallelMesh]:
    """The mesh of rank 0 among ranks that do not exist."""
    if dist.is_initialized():
        raise ValueError(
            "this process already has a process group; trace in a process of its own,"
            " or destroy the group first"
        )
    if mesh.world == 1:
        yield ParallelDims().build()
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=mesh.world)
    try:
        yield dims_of(mesh).build()
    finally:
        dist.destroy_process_group()


@dataclass(eq=False, slots=True)
class _Block:
    """One storage: its life in events of the log's clock, and what it turned out to be."""

    nbytes: int
    made: int
    freed: int | None = None
    kind: str = "temporaries"


@dataclass(frozen=True, slots=True)
class _Live:
    """A block that is not freed yet, and the storage that it is."""

    block: _Block
    storage: weakref.ref[torch.UntypedStorage]
    """Kept for its callback, which sees the storage go."""


@dataclass(frozen=True)
class _Peak:
    """A time of the clock and the bytes that live then."""

    nbytes: int
    time: int


class _AllocationLog(TorchDispatchMode):
    """Every storage that an operator returns, from then until it is freed, and the phases of a step.

    Frees are seen by weak references to storages. The clock counts allocations and frees.
    """

    def __init__(self) -> None:
        super().__init__()
        self._clock = 0
        self._blocks: list[_Block] = []
        self._alive: dict[int, _Live] = {}  # by address of the storage
        self._weights: list[Tensor] = []
        self._phase_starts: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._follow_phase()
        if func is torch.ops.aten._local_scalar_dense.default:  # a host read: a fake tensor has no number
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as a real wait does; the fake one makes a second tensor
        result = func(*args, **(kwargs or {}))
        # Most results are one tensor, and tree_leaves is slow.
        for x in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(x, Tensor) and x.device.type != "meta":
                self._see(x.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive or not storage.nbytes():
            return
        self._clock += 1
        block = _Block(storage.nbytes(), self._clock)
        self._blocks.append(block)
        self._alive[key] = _Live(block, weakref.ref(storage, lambda _: self._free(key)))

    def _free(self, key: int) -> None:
        self._clock += 1
        self._alive.pop(key).block.freed = self._clock

    def mark(self, leaves: Iterable[Any], kind: str) -> None:
        """Say what the storages of the tensors among `leaves` are."""
        for x in leaves:
            if not isinstance(x, Tensor):
                continue
            live = self._alive.get(x.untyped_storage()._cdata)
            if live is not None:
                live.block.kind = kind

    def start_step(self, weights: Sequence[Tensor]) -> None:
        """From now on the phases count."""
        self._weights = list(weights)
        self._phase_starts = [self._clock]

    def _follow_phase(self) -> None:
        """Notice, at an operator, that the backward has begun or ended.

        What lives unnamed when it begins is what the forward left for it.
        """
        in_backward = torch._C._current_graph_task_id() != -1
        if len(self._phase_starts) == 1 and in_backward:
            self._phase_starts.append(self._clock)
            for live in self._alive.values():
                if live.block.kind == "temporaries":
                    live.block.kind = "activations"
        elif len(self._phase_starts) == 2 and not in_backward:
            self._phase_starts.append(self._clock)
            self.mark((weight.grad for weight in self._weights), "gradients")

    def summary(self) -> TracedMemory:
        """The peaks of the phases since `start_step`, and the kinds at the highest."""
        peaks = dict(zip(PHASES, self._peaks(), strict=True))
        phase = max(PHASES, key=lambda name: peaks[name].nbytes)
        peak = peaks[phase]
        kinds = dict.fromkeys(KINDS, 0)
        for block in self._blocks:
            if block.made <= peak.time and (block.freed is None or block.freed > peak.time):
                kinds[block.kind] += block.nbytes
        return TracedMemory(
            peak_bytes=peak.nbytes,
            peak_phase=phase,
            **kinds,
            forward_peak_bytes=peaks["forward"].nbytes,
            backward_peak_bytes=peaks["backward"].nbytes,
            update_peak_bytes=peaks["update"].nbytes,
        )

    def _peaks(self) -> list[_Peak]:
        """The peak of each phase since `start_step`, from what each tick of the clock changed."""
        changes = [0] * (self._clock + 1)
        for block in self._blocks:
            changes[block.made] += block.nbytes
            if block.freed is not None:
                changes[block.freed] -= block.nbytes
        live = sum(changes[: self._phase_starts[0] + 1])
        peaks = []
        for start, stop in pairwise((*self._phase_starts, self._clock)):
            best = _Peak(live, start)
            for time in range(start + 1, stop + 1):
                live += changes[time]
                if live > best.nbytes:
                    best = _Peak(live, time)
            peaks.append(best)
        return peaks
