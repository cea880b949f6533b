"""Every storage that a step allocates, by fake tensors or real ones, from then until it is freed.

A storage counts from the operator that returns it until Python or autograd lets go of it, or it is resized.
The clock counts allocations and frees; the phases of a step are times of it, told apart by whether autograd's
engine runs.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqmesh.parallel.shards import local_part
from seqmesh.trace.fake_ranks import replaced

PHASES = ("forward", "backward", "update")
KINDS = ("parameters", "gradients", "optimizer", "activations", "temporaries")
_HOST_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


@dataclass(frozen=True, kw_only=True)
class TracedMemory:
    """Bytes of rank 0 over one step. The five kinds are what lives at the peak, and add up to it."""

    peak_bytes: int
    peak_phase: str
    """The phase with the peak: forward, backward or update."""
    parameters: int
    """Weights that this rank holds, with the model's few buffers."""
    gradients: int
    """Of weights: what the backward made so far. A summand of one (of a tied head) is a temporary."""
    optimizer: int
    """AdamW's two states that this rank holds."""
    activations: int
    """What forwards left for backwards and is not freed yet.

    With ZeRO-2 and -3 also weights that are gathered and, between micro-batches, gradients that are whole.
    """
    temporaries: int
    """The rest: gradients of activations, communication buffers, recomputed logits, ..."""
    forward_peak_bytes: int
    backward_peak_bytes: int
    update_peak_bytes: int


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


@dataclass(eq=False, slots=True)
class _Backward:
    """When autograd's engine ran."""

    start: int
    stop: int | None = None


@dataclass(frozen=True)
class _Peak:
    """A time of the clock and the bytes that live then."""

    nbytes: int
    time: int


class AllocationLog(TorchDispatchMode):
    """Every storage that an operator returns, from then until it is freed, and the phases of a step.

    Frees are seen by weak references to storages. The clock counts allocations and frees.
    """

    def __init__(self) -> None:
        super().__init__()
        self._clock = 0
        self._blocks: list[_Block] = []
        self._alive: dict[int, _Live] = {}  # by address of the storage
        self._weights: list[Tensor] = []
        self._start: int | None = None
        self._backwards: list[_Backward] = []
        self._patched = ExitStack()

    def __enter__(self) -> "AllocationLog":
        resize = torch.UntypedStorage.resize_

        def seen(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._resized(storage)
            return result

        # FSDP empties and fills the storage of a gathered weight, by no operator.
        self._patched.enter_context(replaced(torch.UntypedStorage, "resize_", seen))
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self._patched.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with what this rank holds
        self._follow_phase()
        if func in _HOST_READS and isinstance(args[0], FakeTensor):  # which has no numbers
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

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._alive:
            self._free(storage._cdata)
        self._see(storage)

    def mark(self, leaves: Iterable[Any], kind: str) -> None:
        """Say what the storages of the tensors among `leaves` are."""
        for x in leaves:
            if not isinstance(x, Tensor):
                continue
            live = self._alive.get(local_part(x).untyped_storage()._cdata)
            if live is not None:
                live.block.kind = kind

    def start_step(self, weights: Sequence[Tensor]) -> None:
        """From now on the phases count."""
        self._weights = list(weights)
        self._start = self._clock

    def _follow_phase(self) -> None:
        """Notice, at an operator, that a backward has begun or ended.

        What lives unnamed when one begins is what the forward left for it.
        """
        if self._start is None:
            return
        is_in = torch._C._current_graph_task_id() != -1
        was_in = bool(self._backwards) and self._backwards[-1].stop is None
        if is_in and not was_in:
            self._backwards.append(_Backward(self._clock))
            for live in self._alive.values():
                if live.block.kind == "temporaries":
                    live.block.kind = "activations"
        elif was_in and not is_in:
            self._backwards[-1].stop = self._clock
            self.mark((weight.grad for weight in self._weights), "gradients")

    def summary(self) -> TracedMemory:
        """The peaks of the phases since `start_step`, and the kinds at the highest."""
        peaks = self._peaks()
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

    def _peaks(self) -> dict[str, _Peak]:
        """The peak of each phase since `start_step`, from what each tick of the clock changed."""
        assert self._start is not None
        changes = [0] * (self._clock + 1)
        for block in self._blocks:
            changes[block.made] += block.nbytes
            if block.freed is not None:
                changes[block.freed] -= block.nbytes
        now = self._start
        live = sum(changes[: now + 1])
        peaks = dict.fromkeys(PHASES, _Peak(0, now))
        for phase, stop in self._phases():
            best = max(peaks[phase], _Peak(live, now), key=lambda peak: peak.nbytes)
            for time in range(now + 1, stop + 1):
                live += changes[time]
                if live > best.nbytes:
                    best = _Peak(live, time)
            peaks[phase] = best
            now = stop
        return peaks

    def _phases(self) -> Iterator[tuple[str, int]]:
        """Phases in their order, each with the time of its end."""
        for backward in self._backwards:
            assert backward.stop is not None
            yield "forward", backward.start
            yield "backward", backward.stop
        yield "update", self._clock
