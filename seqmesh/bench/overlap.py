"""How much of the exchange of heads disappears behind attention: one call on two ranks, with time stamps.

    overlapped             8 chunks of heads: the next one's travel, and the last one's land, beside each
    one after the other    4 chunks: too few to overlap (schedule/heads.py), each is waited for

Both do a causal forward and backward of the same numbers on ulysses 2, in turns. Watched at PyTorch's
dispatcher: from when to when an exchange is issued, and is waited for, and a kernel computes. Issuing and
waiting are what was not hidden; waiting includes that for the other rank to send. Nothing says when an
exchange was done that arrived before it was waited for: at some time between its issue and that.

    seqmesh bench overlap --plot overlap.png

Ranks are local processes with gloo, one thread each, which copy through the same cores that compute: on a
machine with as many cores as ranks an exchange that is hidden still takes time from the compute.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from seqmesh import Schedule, SequenceMesh, attention, masks
from seqmesh.bench.figures import Spread
from seqmesh.processes import Workers

RANKS = 2
CHUNKS = {"overlapped": 8, "one after the other": 4}
"""Chunks of heads of each side."""


@dataclass(frozen=True, kw_only=True)
class OverlapWork:
    """Sizes of the attention that is watched, fp32; every query head has a K/V head of its own."""

    tokens: int = 4096
    heads: int = 16
    head_dim: int = 64
    repeats: int = 9
    """Pairs of calls, after one that is not counted."""

    def __post_init__(self) -> None:
        """Raises ValueError for sizes with nothing to exchange or to repeat."""
        if self.tokens < RANKS or self.repeats < 1:
            raise ValueError(
                f"--tokens {self.tokens}, {self.repeats} repeats: use {RANKS} tokens and 1 repeat at least"
            )
        alike = RANKS * max(CHUNKS.values())
        if self.heads < 1 or self.heads % alike:
            raise ValueError(f"{self.heads} heads do not make equal chunks; use a multiple of {alike}")


@dataclass(frozen=True, kw_only=True)
class ExchangeSpan:
    """One exchange of a rank, in seconds since the call began."""

    issue_s: float
    """When the rank began to issue it."""
    issued_s: float
    """When the rank went on, the exchange under way."""
    wait_s: float
    """When the rank began to wait for it."""
    arrived_s: float
    """When it went on with what had arrived."""
    is_home: bool
    """Whether results come home, or heads go to the ranks that compute them."""

    @property
    def exposed_s(self) -> float:
        """The part that nothing hid."""
        return self.issued_s - self.issue_s + self.arrived_s - self.wait_s


@dataclass(frozen=True, kw_only=True)
class CallSpans:
    """A forward and backward of one rank, in seconds since it began."""

    exchanges: tuple[ExchangeSpan, ...]
    """In the order in which they were issued."""
    kernels: tuple[tuple[float, float], ...]
    """From when to when each call of the kernel computed."""
    backward_s: float
    """When the backward began."""
    seconds: float
    """Of both."""

    @property
    def waited_s(self) -> float:
        """For all exchanges."""
        return sum(one.arrived_s - one.wait_s for one in self.exchanges)

    @property
    def exposed_s(self) -> float:
        """Of all exchanges."""
        return sum(one.exposed_s for one in self.exchanges)

    @property
    def computed_s(self) -> float:
        """In the kernel."""
        return sum(stop - start for start, stop in self.kernels)


class RecordSpans(TorchDispatchMode):
    """Records exchanges and kernels of this process while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self._start_s = 0.0
        self._backward_s = 0.0
        self._stop_s = 0.0
        self._issued: dict[int, tuple[float, float, int]] = {}
        """From when to when, and elements received, by the address of what is received."""
        self._arrived: list[tuple[ExchangeSpan, int]] = []
        self._kernels: list[tuple[float, float]] = []

    def __enter__(self) -> "RecordSpans":
        super().__enter__()
        self._start_s = time.perf_counter()
        return self

    def now(self) -> float:
        """Seconds since the call began."""
        return time.perf_counter() - self._start_s

    def backward_begins(self) -> None:
        """The forward is over."""
        self._backward_s = self.now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._stop_s = self.now()

    def spans(self) -> CallSpans:
        """What was recorded, when the call is over."""
        assert not self._issued, "an exchange was never waited for"
        # q, k and v of a chunk, or their gradients, are three times as large as its output.
        largest = max((elements for _, elements in self._arrived), default=0)
        exchanges = []
        for one, elements in self._arrived:
            is_backward = one.issue_s >= self._backward_s
            exchanges.append(replace(one, is_home=(elements == largest) == is_backward))
        return CallSpans(
            exchanges=tuple(sorted(exchanges, key=lambda one: one.issue_s)),
            kernels=tuple(self._kernels),
            backward_s=self._backward_s,
            seconds=self._stop_s,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = self.now()
        found = func(*args, **(kwargs or {}))
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self._issued[found.data_ptr()] = start, self.now(), found.numel()
        elif func is torch.ops._c10d_functional.wait_tensor.default:
            self._arrive(*self._issued.pop(args[0].data_ptr()), wait_s=start)
        elif "flash_attention" in func.name():
            self._kernels.append((start, self.now()))
        return found

    def _arrive(self, issue_s: float, issued_s: float, elements: int, *, wait_s: float) -> None:
        one = ExchangeSpan(
            issue_s=issue_s, issued_s=issued_s, wait_s=wait_s, arrived_s=self.now(), is_home=False
        )
        self._arrived.append((one, elements))


@dataclass(frozen=True, kw_only=True)
class OverlapSide:
    """One side, over all repeats."""

    name: str
    chunks: int
    seconds: Spread
    """Of the slower rank."""
    exposed_s: Spread
    """Issuing and waiting for exchanges, mean of the ranks."""
    waited_s: Spread
    """Waiting alone, mean of the ranks."""
    computed_s: Spread
    """In the kernel, mean of the ranks."""
    shown: tuple[CallSpans, ...]
    """Every rank's spans in the repeat of the median time."""


def measure_overlap(work: OverlapWork) -> list[OverlapSide]:
    """Both sides. Forks workers: call it before any tensor work."""
    calls: dict[str, list[list[CallSpans]]] = {name: [] for name in CHUNKS}
    with Workers(lambda: _watched(work), world=RANKS) as ranks:
        for repeat in range(work.repeats + 1):
            # In turns, each first in every other pair: what slows the machine down meets both.
            names = list(CHUNKS) if repeat % 2 else list(reversed(CHUNKS))
            for name in names:
                spans = ranks.ask(CHUNKS[name])
                if repeat:
                    calls[name].append(spans)
    return [_side(name, found) for name, found in calls.items()]


def _side(name: str, calls: Sequence[Sequence[CallSpans]]) -> OverlapSide:
    by_time = sorted(calls, key=lambda ranks: max(one.seconds for one in ranks))
    return OverlapSide(
        name=name,
        chunks=CHUNKS[name],
        seconds=Spread.of([max(one.seconds for one in ranks) for ranks in calls]),
        exposed_s=Spread.of([fmean(one.exposed_s for one in ranks) for ranks in calls]),
        waited_s=Spread.of([fmean(one.waited_s for one in ranks) for ranks in calls]),
        computed_s=Spread.of([fmean(one.computed_s for one in ranks) for ranks in calls]),
        shown=tuple(by_time[len(calls) // 2]),
    )


def _watched(work: OverlapWork) -> Callable[[int], CallSpans]:
    """One rank: a forward and backward in so many chunks of heads."""
    mesh = SequenceMesh.build(ulysses=RANKS)
    schedule = Schedule.build(masks.causal(work.tokens), mesh)
    n = schedule.rows[mesh.ulysses_rank]
    q, k, v = (torch.randn(1, n, work.heads, work.head_dim, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, n, work.heads, work.head_dim)

    def handle(chunks: int) -> CallSpans:
        q.grad = k.grad = v.grad = None
        dist.barrier()  # requests reach the ranks one after the other
        with RecordSpans() as record:
            out = attention(q, k, v, schedule, kernel="cpu", head_chunks=chunks)
            record.backward_begins()
            out.backward(grad)
        return record.spans()

    return handle


def in_words(work: OverlapWork) -> str:
    """What is computed."""
    return (
        f"causal forward + backward, fp32, {work.tokens:,} tokens, h {work.heads}, d {work.head_dim},"
        f" ulysses {RANKS}, gloo, one thread a rank"
    )
