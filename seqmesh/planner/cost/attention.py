"""Attention on a ulysses x ring mesh: how long it takes and what it sends, from the very schedule that would
be executed.

The ring rank with the most work is the one that all wait for; its schedule (schedule.py) gives the blocks and
rows of every stage:

    stage 0     compute own rows          fetch 1 in flight      exposed = what the fetch takes longer than the compute
    stage 1     compute received rows     fetch 2 in flight      in the backward also: partial dK/dV of stage 0 on their way home
    ...         merge in fp32

Stages that are alike are priced once. The exchange of heads is not overlapped, as in ulysses.py.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from math import isqrt

from seqmesh import masks
from seqmesh.layouts import split_evenly
from seqmesh.planner.cost.network import Group, Network, place
from seqmesh.planner.cost.ring_load import RingLoad, StageLoad, ring_load
from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.job import Job
from seqmesh.schedule.heads import default_chunks, split_heads
from seqmesh.schedule.traffic import heads_traffic, rows_traffic

BACKWARD_FLOPS = 2.5
"""Of the forward's: flash attention computes five products where the forward has two, the scores once more.
"""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Seconds of one attention call on the busiest rank, in one direction."""

    kernel: float = 0.0
    merge: float = 0.0
    """Adding partial results up in fp32, and launching kernels."""
    heads: float = 0.0
    """Exchange of heads: never hidden."""
    rows: float = 0.0
    """Exchange of K/V rows, hidden or not."""
    rows_exposed: float = 0.0
    """The part of `rows` that no compute hides."""
    heads_bytes: int = 0
    """Sent to ulysses groups, by all ulysses x ring ranks together."""
    rows_bytes: int = 0
    """Sent to ring groups, by all ulysses x ring ranks together."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One call of attention: sizes on a tensor-parallel rank."""

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    ulysses: int
    element: int
    """Bytes of a number."""

    @staticmethod
    def of(job: Job, *, batch: int, ulysses: int, tp: int = 1) -> "Shape":
        """A layer's attention of a job's model."""
        m = job.model
        return Shape(
            heads=m.heads // tp,
            kv_heads=m.kv_heads // tp,
            head_dim=m.head_dim,
            batch=batch,
            ulysses=ulysses,
            element=job.numerics.element,
        )


@dataclass(frozen=True, kw_only=True)
class AttentionCost:
    """One attention call: time of the busiest rank, and bytes of all ranks of the sequence mesh together."""

    forward: Pass
    backward: Pass


def price_attention(
    job: Job, ring: RingLoad, shape: Shape, ulysses_group: Group, ring_group: Group
) -> AttentionCost:
    """The cost of one attention call, forward and backward."""
    network = Network(job.cluster, job.assumptions)
    timing, sent, most = _Timing(job, ring, shape, network, ring_group), *_bytes(ring, shape)
    walked = timing.forward(), timing.backward()
    seconds = [network.all_to_all_seconds(ulysses_group, heads, calls=2 * timing.chunks) for heads in most]
    forward, backward = (
        replace(one, heads=heads, heads_bytes=heads_bytes, rows_bytes=rows_bytes)
        for one, heads, (heads_bytes, rows_bytes) in zip(walked, seconds, sent, strict=True)
    )
    return AttentionCost(forward=forward, backward=backward)


def _bytes(ring: RingLoad, shape: Shape) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(to ulysses groups, to ring groups) of all ranks, forward and backward; and the most that one rank
    sends for heads in each.
    """
    unit = shape.batch * shape.head_dim * shape.element
    heads, most = _head_rows(ring.layout.counts, shape.heads, shape.kv_heads, shape.ulysses)
    kv_heads = sum(share.kv for share in split_heads(shape.heads, shape.kv_heads, shape.ulysses)[0])
    rows = rows_traffic(rows_sent=ring.rows_moved, rows_received=ring.rows_moved, kv_heads=kv_heads)
    sent = [(to_ulysses * unit, to_ring * unit) for to_ulysses, to_ring in zip(heads, rows, strict=True)]
    return sent, (most[0] * unit, most[1] * unit)


@lru_cache(maxsize=4096)
def _head_rows(
    counts: tuple[int, ...], heads: int, kv_heads: int, ulysses: int
) -> tuple[list[int], list[int]]:
    """Rows x heads that all ranks send to their ulysses groups, forward and backward, and the most that one
    sends.
    """
    (shares,) = split_heads(heads, kv_heads, ulysses)
    total, most = [0, 0], [0, 0]
    for count in sorted(set(counts)):
        pieces = [stop - start for start, stop in pairwise(split_evenly(count, ulysses))]
        ranks = counts.count(count)
        for rank in range(ulysses):
            for way, one in enumerate(
                heads_traffic(rows=pieces, kv_rows=pieces, shares=shares, ulysses_rank=rank)
            ):
                total[way] += ranks * one
                most[way] = max(most[way], one)
    return total, most


class _Timing:
    """Walks over the stages as ring.py does."""

    def __init__(self, job: Job, ring: RingLoad, shape: Shape, network: Network, group: Group) -> None:
        self._stages, self._shape, self._network, self._group = ring.stages, shape, network, group
        self._a, self._peak, self._memory_rate = job.assumptions, job.peak, job.memory_rate
        (shares,) = split_heads(shape.heads, shape.kv_heads, shape.ulysses)
        self._heads, self._kv_heads = max(share.q for share in shares), max(share.kv for share in shares)
        per_token = shape.batch * shape.kv_heads * shape.head_dim
        self.chunks = min(
            self._kv_heads, default_chunks(shape.ulysses, ring.layout.ring, ring.layout.s, per_token)
        )

    def forward(self) -> Pass:
        """Kernel, merges, and the fetch of the next stage beside them."""
        times = [
            self._compute(stage, self._a.attention_forward, 1.0, self._a.merge_bytes, 0.0)
            for stage in self._stages
        ]
        return self._walk(times, [self._row_bytes(stage.sent, stage.received) for stage in self._stages])

    def backward(self) -> Pass:
        """The same with twice the rows: K and V in, dK and dV home, which the next stage hides."""
        times = [
            self._compute(
                stage, self._a.attention_backward, BACKWARD_FLOPS, self._a.dq_bytes, self._a.dkv_bytes
            )
            for stage in self._stages
        ]
        return self._walk(times, [2 * self._row_bytes(stage.sent, stage.received) for stage in self._stages])

    def _row_bytes(self, sent: int, received: int) -> float:
        """Of K and V, both ways at once: the larger decides."""
        return (
            max(sent, received)
            * 2
            * self._kv_heads
            * self._shape.batch
            * self._shape.head_dim
            * self._shape.element
        )

    def _compute(
        self, stage: StageLoad, efficiency: float, times: float, q_bytes: float, kv_bytes: float
    ) -> tuple[float, float]:
        """Seconds in the kernel, and in merges and launches, of one such stage."""
        s, rate = self._shape, self._peak * efficiency * head_rate(self._shape.head_dim, self._a)
        kernel = times * 4 * s.head_dim * self._heads * s.batch * stage.slow_pairs / rate
        launches = self._a.launch * stage.blocks * self.chunks
        if not stage.hop:
            return kernel, launches
        elements = s.batch * s.head_dim
        moved = (
            q_bytes * stage.q_rows * self._heads * elements
            + kv_bytes * stage.received * 2 * self._kv_heads * elements
        )
        return kernel, launches + moved / self._memory_rate

    def _walk(self, times: list[tuple[float, float]], sent: list[float]) -> Pass:
        kernel = merge = rows = exposed = 0.0
        before = 0.0
        for stage, (run, extra), moved in zip(self._stages, times, sent, strict=True):
            kernel += stage.count * run
            merge += stage.count * extra
            if stage.hop:
                link = self._network.reach(self._group)
                took = self._network.hop_seconds(self._group, moved) + (
                    self.chunks - 1
                ) * self._network.latency(link)
                rows += stage.count * took
                exposed += self._exposed(took, before) + (stage.count - 1) * self._exposed(took, run + extra)
            before = run + extra
        return Pass(kernel=kernel, merge=merge, rows=rows, rows_exposed=exposed)

    def _exposed(self, exchange: float, compute: float) -> float:
        """What an exchange adds to the compute that it runs beside."""
        return max(0.0, exchange - compute) + self._a.overlap_tax * min(exchange, compute)


FULL_HEAD = 128
"""Head dim from which on the kernel runs at its full rate."""


def head_rate(head_dim: int, a: Assumptions) -> float:
    """The kernel's rate at a head dim, of that at FULL_HEAD: in proportion up to `small_head`, then on a line
    to FULL_HEAD.
    """
    if head_dim <= a.small_head:
        return a.small_head_rate * head_dim / a.small_head
    between = (head_dim - a.small_head) / max(1.0, FULL_HEAD - a.small_head)
    return min(1.0, a.small_head_rate + (1 - a.small_head_rate) * between)


class Loads:
    """Ring loads of a job, each computed once.

    A ring passes through R - 1 exchanges, which hides most; where only few rows travel (packed documents,
    windows) fewer exchanges cost less latency. Their number is chosen by the time of one attention on the
    ring alone.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._of = lru_cache(maxsize=None)(self._load)

    def __call__(self, ring: int) -> RingLoad:
        """The load of a ring degree."""
        return self._of(ring)

    def _load(self, ring: int) -> RingLoad:
        job = self._job
        every = self._exchanges(ring)
        found = ring_load(job.mask, job.layout, ring, job.assumptions.attention_half_rows, every)
        if len(found) == 1:
            return found[0]
        return min(found, key=self._seconds)

    def _exchanges(self, ring: int) -> list[int | None]:
        """Numbers of exchanges to compare: a causal sequence needs all of its ring, and has large rows to
        hide.
        """
        if ring <= 2 or self._job.mask == masks.causal(self._job.mask.q_len):
            return [None]
        return [None, *sorted({1, isqrt(ring)} - {ring - 1})]

    def _seconds(self, load: RingLoad) -> float:
        shape, each = Shape.of(self._job, batch=1, ulysses=1), self._job.cluster.gpus_per_node
        alone, group = (
            place(("ring",), (size,), frozenset(("ring",)), each) for size in (1, load.layout.ring)
        )
        cost = price_attention(self._job, load, shape, alone, group)
        return sum(one.kernel + one.merge + one.rows_exposed for one in (cost.forward, cost.backward))
