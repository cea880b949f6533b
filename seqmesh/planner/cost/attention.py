"""Attention on a ulysses x ring mesh: how long it takes and what it sends, by the schedule that would run.

The ring rank with the most work is the one that all wait for; its schedule (schedule/ring.py) gives the
blocks and rows of every stage:

    stage 0     compute own rows          fetch 1 in flight      exposed: what the fetch takes longer
    stage 1     compute received rows     fetch 2 in flight      backward: also dK/dV of stage 0, going home
    ...         merge in fp32

Stages that are alike are priced once. Where the engine computes the heads in chunks enough, the exchange of
one chunk hides behind the compute of its neighbours (engine/ulysses.py), C chunks of heads:

    to their owners    0 | 1     2     3           exposed: the way there of the first chunk, the way home of
    computed             | 0     1     2     3     the last, and of the rest what a chunk's compute is too
    home                 |       0     1     2 | 3   short for
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise

from seqmesh.layouts import split_evenly
from seqmesh.planner.cost.network import Group, Network
from seqmesh.planner.cost.ring_load import RingLoad, StageLoad
from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.job import Job
from seqmesh.schedule.heads import HeadShare, default_chunks, overlaps_exchange, split_heads
from seqmesh.schedule.traffic import RowHeads, heads_traffic, rows_traffic

BACKWARD_FLOPS = 2.5
"""Of the forward's.

Flash attention computes five products where the forward has two: the scores once more.
"""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Seconds of one attention call on the busiest rank, in one direction."""

    kernel_s: float = 0.0
    merge_s: float = 0.0
    """Adding partial results up in fp32, and launching kernels."""
    heads_s: float = 0.0
    """Exchange of heads, hidden or not."""
    heads_exposed_s: float = 0.0
    """The part of `heads_s` that no compute hides."""
    rows_s: float = 0.0
    """Exchange of K/V rows, hidden or not."""
    rows_exposed_s: float = 0.0
    """The part of `rows_s` that no compute hides."""
    heads_bytes: float = 0
    """Sent to ulysses groups, by all ulysses x ring ranks together."""
    rows_bytes: float = 0
    """Sent to ring groups, by all ulysses x ring ranks together."""

    @property
    def seconds(self) -> float:
        """What the call adds to a step."""
        return self.kernel_s + self.merge_s + self.heads_exposed_s + self.rows_exposed_s


@dataclass(frozen=True, kw_only=True)
class AttentionCost:
    """One attention call: time of the busiest rank, and bytes of all ranks of the sequence mesh together."""

    forward: Pass
    backward: Pass


@lru_cache(maxsize=4096)
def mean_cost(found: tuple[tuple[AttentionCost, float], ...]) -> AttentionCost:
    """The mean of the costs of layers, each with its share of them; some may have no attention."""
    if len(found) == 1 and found[0][1] == 1:
        return found[0][0]
    names = [field.name for field in fields(Pass)]

    def mean(passes: Sequence[tuple[Pass, float]]) -> Pass:
        return Pass(**{name: sum(share * getattr(one, name) for one, share in passes) for name in names})

    return AttentionCost(
        forward=mean([(cost.forward, share) for cost, share in found]),
        backward=mean([(cost.backward, share) for cost, share in found]),
    )


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One call of attention: sizes on a tensor-parallel rank."""

    heads: int
    kv_heads: int
    head_dim: int
    """Of q and k, d."""
    value_head_dim: int
    """Of v and the output, e."""
    batch: int
    ulysses: int
    element: int
    """Bytes of a number."""

    @staticmethod
    def of(job: Job, *, batch: int, ulysses: int, tp: int = 1) -> "AttentionShape":
        """A layer's attention of a job's model."""
        m = job.model
        return AttentionShape(
            heads=m.heads // tp,
            kv_heads=m.kv_heads // tp,
            head_dim=m.head_dim,
            value_head_dim=m.value_head_dim,
            batch=batch,
            ulysses=ulysses,
            element=job.numerics.element,
        )

    @property
    def both_dims(self) -> int:
        """Elements of a head of k and v, or of q and the output, together: d + e."""
        return self.head_dim + self.value_head_dim

    def head_chunks(self, tokens: int, ring: int) -> tuple[tuple[HeadShare, ...], ...]:
        """Heads of every ulysses rank in each chunk, as the engine cuts so many tokens by default."""
        elements = tokens * self.batch * (self.heads + self.kv_heads) * self.both_dims
        wanted = default_chunks(self.ulysses, ring, elements, self.element)
        return split_heads(self.heads, self.kv_heads, self.ulysses, wanted)

    @property
    def qkv_share(self) -> float:
        """Of the heads exchanged in one direction, q, k and v or their gradients; the rest is the output."""
        (shares,) = split_heads(self.heads, self.kv_heads, self.ulysses)
        kv = sum(share.kv for share in shares)  # a K/V head goes to every rank that uses it
        there = self.heads * self.head_dim + kv * self.both_dims
        return there / ((self.heads + kv) * self.both_dims)


def hides_heads(job: Job, ulysses: int, chunks: int) -> bool:
    """Whether the exchange of a chunk of heads runs beside the compute of another: the engine's own rule."""
    return job.stack.overlaps_heads and overlaps_exchange(ulysses, chunks)


def exposed_beside(exchange: float, compute: float, a: Assumptions) -> float:
    """Seconds that an exchange adds to the compute that it runs beside.

    What is hidden is not free: it takes cores and memory bandwidth from that compute.
    """
    return max(0.0, exchange - compute) + a.overlap_tax * min(exchange, compute)


def attention_cost(
    job: Job, ring: RingLoad, shape: AttentionShape, ulysses_group: Group, ring_group: Group
) -> AttentionCost:
    """The cost of one attention call, forward and backward."""
    network = Network(job.cluster, job.assumptions)
    walk = _StageWalk(job, ring, shape, network, ring_group)
    of_keys = shape.batch * shape.head_dim * shape.element
    of_values = shape.batch * shape.value_head_dim * shape.element
    heads = _head_rows(ring.layout.counts, shape.heads, shape.kv_heads, shape.ulysses)
    kv_heads = sum(share.kv for share in split_heads(shape.heads, shape.kv_heads, shape.ulysses)[0])
    rows = rows_traffic(rows_sent=ring.rows_moved, rows_received=ring.rows_moved, kv_heads=kv_heads)

    def complete(walked: Pass, sent: "_HeadRows", rows: RowHeads) -> Pass:
        # Two collectives for each chunk of heads: to their owners, and home.
        calls = 2 * walk.chunks
        most = max(one.bytes(of_keys, of_values) for one in sent.ranks)
        heads_s = network.all_to_all_seconds(ulysses_group, most, calls=calls)
        hides = hides_heads(job, shape.ulysses, walk.chunks)
        return replace(
            walked,
            heads_s=heads_s,
            heads_exposed_s=walk.exposed_heads(walked, heads_s) if hides else heads_s,
            heads_bytes=sent.total.bytes(of_keys, of_values),
            rows_bytes=rows.bytes(of_keys, of_values),
        )

    return AttentionCost(
        forward=complete(walk.forward(), heads.forward, rows.forward),
        backward=complete(walk.backward(), heads.backward, rows.backward),
    )


@dataclass(frozen=True)
class _HeadRows:
    """Rows x heads that are sent to ulysses groups in one direction."""

    total: RowHeads
    """By all ranks."""
    ranks: frozenset[RowHeads]
    """By each of them, those that differ."""


@dataclass(frozen=True)
class _HeadRowsBothWays:
    forward: _HeadRows
    backward: _HeadRows


@lru_cache(maxsize=4096)
def _head_rows(counts: tuple[int, ...], heads: int, kv_heads: int, ulysses: int) -> _HeadRowsBothWays:
    """What ring ranks with so many tokens each send to their ulysses groups."""
    (shares,) = split_heads(heads, kv_heads, ulysses)
    forward: Counter[RowHeads] = Counter()
    backward: Counter[RowHeads] = Counter()
    for count in sorted(set(counts)):
        tokens = [stop - start for start, stop in pairwise(split_evenly(count, ulysses))]
        alike = counts.count(count)
        for rank in range(ulysses):
            sent = heads_traffic(rows=tokens, kv_rows=tokens, shares=shares, ulysses_rank=rank)
            forward[sent.forward] += alike
            backward[sent.backward] += alike
    return _HeadRowsBothWays(_of_ranks(forward), _of_ranks(backward))


def _of_ranks(sent: Counter[RowHeads]) -> _HeadRows:
    keys = sum(ranks * one.keys for one, ranks in sent.items())
    values = sum(ranks * one.values for one, ranks in sent.items())
    return _HeadRows(RowHeads(keys, values), frozenset(sent))


@dataclass(frozen=True, kw_only=True)
class _Direction:
    """What sets the backward apart from the forward."""

    efficiency: float
    """Of peak, in the kernel."""
    flops: float
    """Of the forward's."""
    q_bytes: float
    """Read and written in a merge, for each element of a row of the output, or of dq."""
    q_dim: int
    """Elements of such a row and head."""
    kv_bytes: float
    """The same of a received K or V row: its gradient is added up at home."""
    row_transfers: int
    """Times that K and V rows, or gradients as large, travel."""


@dataclass(frozen=True)
class _StageWork:
    """What one stage computes, in seconds."""

    kernel_s: float
    merge_s: float

    @property
    def busy_s(self) -> float:
        return self.kernel_s + self.merge_s


class _StageWalk:
    """Walks over the stages as engine/ring.py does."""

    def __init__(
        self, job: Job, ring: RingLoad, shape: AttentionShape, network: Network, group: Group
    ) -> None:
        self._stages = ring.stages
        self._shape = shape
        self._network = network
        self._group = group
        self._a = job.assumptions
        self._peak = job.peak
        self._memory_rate = job.memory_rate
        (shares,) = split_heads(shape.heads, shape.kv_heads, shape.ulysses)
        self._heads = max(share.q for share in shares)
        self._kv_heads = max(share.kv for share in shares)
        self.chunks = len(shape.head_chunks(ring.layout.s, ring.layout.ring))

    def forward(self) -> Pass:
        """Kernel, merges, and the fetch of the next stage beside them."""
        return self._walk(
            _Direction(
                efficiency=self._a.attention_forward,
                flops=1.0,
                q_bytes=self._a.merge_bytes,
                q_dim=self._shape.value_head_dim,
                kv_bytes=0.0,
                row_transfers=1,
            )
        )

    def backward(self) -> Pass:
        """The same with twice the rows: K and V in, dK and dV home, which the next stage hides."""
        return self._walk(
            _Direction(
                efficiency=self._a.attention_backward,
                flops=BACKWARD_FLOPS,
                q_bytes=self._a.dq_bytes,
                q_dim=self._shape.head_dim,
                kv_bytes=self._a.dkv_bytes,
                row_transfers=2,
            )
        )

    def exposed_heads(self, walked: Pass, heads_s: float) -> float:
        """What of an exchange of heads is exposed where chunks overlap, after a walk over all of them.

        Rows hide first: behind what has hidden rows of the ring, no heads are hidden as well.
        """
        hides_rows = walked.rows_s - walked.rows_exposed_s
        free = max(0.0, walked.kernel_s + walked.merge_s - hides_rows) / self.chunks
        one = heads_s / self.chunks
        # Beside the first chunk only the next one's heads travel, beside the last only the one before comes
        # home; beside each other chunk both do. In the backward the larger part is the way home.
        larger = one * self._shape.qkv_share
        ends = exposed_beside(larger, free, self._a) + exposed_beside(one - larger, free, self._a)
        return one + ends + (self.chunks - 2) * exposed_beside(one, free, self._a)

    def _walk(self, direction: _Direction) -> Pass:
        kernel = merge = rows = exposed = 0.0
        busy_before = 0.0
        for stage in self._stages:
            one = self._compute(stage, direction)
            kernel += stage.count * one.kernel_s
            merge += stage.count * one.merge_s
            if stage.hop:
                took = self._fetch(stage, direction)
                rows += stage.count * took
                # The first of alike stages is fetched beside another one, the rest beside their likes.
                others = (stage.count - 1) * exposed_beside(took, one.busy_s, self._a)
                exposed += exposed_beside(took, busy_before, self._a) + others
            busy_before = one.busy_s
        return Pass(kernel_s=kernel, merge_s=merge, rows_s=rows, rows_exposed_s=exposed)

    def _compute(self, stage: StageLoad, direction: _Direction) -> _StageWork:
        """Seconds in the kernel, and in merges and launches, of one such stage.

        Values narrower than keys cost as much as those: flash attention pads them with zeros.
        """
        s = self._shape
        rate = self._peak * direction.efficiency * head_rate(s.head_dim, self._a)
        kernel = direction.flops * 4 * s.head_dim * self._heads * s.batch * stage.slow_pairs / rate
        launches = self._a.launch * stage.blocks * self.chunks
        if not stage.hop:  # own rows come first: there is nothing to merge with yet
            return _StageWork(kernel, launches)
        q_moved = direction.q_bytes * stage.q_rows * self._heads * s.batch * direction.q_dim
        kv_moved = direction.kv_bytes * stage.received * self._kv_heads * s.batch * s.both_dims
        return _StageWork(kernel, launches + (q_moved + kv_moved) / self._memory_rate)

    def _fetch(self, stage: StageLoad, direction: _Direction) -> float:
        """Seconds of the exchange of one such stage's rows; each further chunk of heads costs its latency."""
        moved = direction.row_transfers * self._row_bytes(stage.sent, stage.received)
        latency = self._network.latency(self._network.slowest_link(self._group))
        return self._network.hop_seconds(self._group, moved) + (self.chunks - 1) * latency

    def _row_bytes(self, sent: int, received: int) -> float:
        """Of K and V, both ways at once: the larger decides."""
        s = self._shape
        return max(sent, received) * self._kv_heads * s.batch * s.both_dims * s.element


FULL_HEAD = 128
"""Head dim from which on the kernel runs at its full rate."""


def head_rate(head_dim: int, a: Assumptions) -> float:
    """The kernel's rate at a head dim, as a share of that at FULL_HEAD.

    In proportion up to `small_head`, then on a line to FULL_HEAD.
    """
    if head_dim <= a.small_head:
        return a.small_head_rate * head_dim / a.small_head
    between = (head_dim - a.small_head) / max(1.0, FULL_HEAD - a.small_head)
    return min(1.0, a.small_head_rate + (1 - a.small_head_rate) * between)
