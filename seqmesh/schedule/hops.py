"""Which hops of the ring an exchange is made of, the same on every rank, from mask and layouts alone.

Hop t brings rows from t ranks before and sends to t ranks after. An all-to-all is entered by all ranks or by
none, so what counts is the largest transfer of any rank:

    hop                      1     2     3     4     5     6     7        R = 8, packed documents
    largest transfer      9,000   300    80     0     0    40     0       rows
    stages=None              1     2     3                 4              one for each hop that is used
    stages="auto"            1     2     2                 2              small ones together
    stages=1                 1     1     1                 1              an all-gather

A hop that no rank uses is dropped always: an exchange of nothing costs its latency on every rank. Small
transfers are merged, because the latency of an exchange is all they cost. Large ones are not: merged, they
would have the compute of one stage to hide behind, in place of two.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from seqmesh.layouts import Layout, split_evenly
from seqmesh.masks import Mask
from seqmesh.schedule.pieces import Runs, by_rank, join, keys_of, pieces_of_queries
from seqmesh.schedule.stripes import is_striped

Stages = int | Literal["auto"] | None
"""How many exchanges follow stage 0: one for each hop that is used (None), at most so many, or by rule."""

LATENCY_ROWS = 512
"""Rows up to which "auto" merges exchanges: up to here latency is most of what one costs.

At 4 KiB a row (K and V of 8 heads of 128, bf16) they are 2 MiB, which take 42 µs at 50 GB/s; to start an
all-to-all over tens of ranks takes about as long.
"""


def exchanges(
    mask: Mask,
    q_layout: Layout,
    kv_layout: Layout,
    stages: Stages = None,
    latency_rows: int = LATENCY_ROWS,
) -> tuple[tuple[int, ...], ...]:
    """The hops of each exchange after stage 0, in order.

    Args:
        mask: q_len queries x k_len keys.
        q_layout: layout of the queries.
        kv_layout: layout of the keys, for the same ring degree.
        stages: None for an exchange for each hop that some rank uses; a number, of at most so many; "auto"
            to merge neighbours as long as the merged exchange has at most `latency_rows` rows on any rank.
        latency_rows: of "auto".

    Raises:
        ValueError: more stages than hops, another word, or latency_rows < 0.
    """
    _check_stages(q_layout.ring, stages, latency_rows)
    enough = latency_rows + 1 if stages == "auto" else 1
    rows = largest_transfers(mask, q_layout, kv_layout, enough)
    used = [hop for hop, count in enumerate(rows) if count]
    if stages == "auto":
        return tuple(_merged(used, rows, latency_rows))
    count = min(stages or len(used), len(used))
    cuts = split_evenly(len(used), count) if count else [0]
    return tuple(tuple(used[first:last]) for first, last in pairwise(cuts))


def _check_stages(ring: int, stages: Stages, latency_rows: int) -> None:
    most = max(1, ring - 1)
    is_known = stages is None or stages == "auto" or (isinstance(stages, int) and 1 <= stages <= most)
    if not is_known:
        raise ValueError(
            f'stages={stages!r} for ring={ring}; use 1 (all-gather) to {most} (ring), "auto" or None'
        )
    if latency_rows < 0:
        raise ValueError(
            f"latency_rows={latency_rows}: a transfer has at least 0 rows; use latency_rows >= 0"
        )


def _merged(used: Iterable[int], rows: tuple[int, ...], most: int) -> Iterator[tuple[int, ...]]:
    """Neighbouring hops together, as long as their largest transfers add up to at most `most` rows."""
    together: list[int] = []
    total = 0
    for hop in used:
        if together and total + rows[hop] > most:
            yield tuple(together)
            together = []
            total = 0
        together.append(hop)
        total += rows[hop]
    if together:
        yield tuple(together)


@lru_cache(maxsize=16)
def largest_transfers(mask: Mask, q_layout: Layout, kv_layout: Layout, enough: int) -> tuple[int, ...]:
    """Rows of the largest transfer of any rank at each hop, counted up to `enough`; [0] is 0.

    With `enough=1` it says which hops are used, and mostly after a look at one rank. In a striped layout
    nearly every transfer is a whole shard, so it is taken to be one where there is any.
    """
    ring = q_layout.ring
    if is_striped(q_layout) and is_striped(kv_layout):
        return _between_stripes(mask, kv_layout, enough)
    if _is_consecutive(q_layout) and _is_consecutive(kv_layout):
        received: _Received | _ReceivedByPieces = _Received(mask, q_layout, kv_layout)
    else:
        received = _ReceivedByPieces(mask, q_layout, kv_layout)
    most = [0] * ring
    few = set(range(1, ring))  # hops whose largest transfer so far is below `enough`
    # The ranks at both ends first: of causal masks one of them sees all there is, and settles it.
    for rank in dict.fromkeys((0, ring - 1, *range(ring))):
        for hop, rows in received.by_hop(rank).items():
            most[hop] = max(most[hop], min(rows, enough))
            if most[hop] == enough:
                few.discard(hop)
        if not few:
            break
    return (0, *most[1:])


def _is_consecutive(layout: Layout) -> bool:
    return all(span.stride == 1 or span.count == 1 for spans in layout.ranks for span in spans)


class _Received:
    """Rows that a rank receives at each hop, of layouts without strides: intervals of keys, cut by owner."""

    def __init__(self, mask: Mask, q_layout: Layout, kv_layout: Layout) -> None:
        self._mask = mask
        self._q_layout = q_layout
        self._held = sorted(
            (span.start, span.start + span.count, rank)
            for rank, spans in enumerate(kv_layout.ranks)
            for span in spans
        )
        self._starts = [start for start, _, _ in self._held]

    def by_hop(self, rank: int) -> dict[int, int]:
        """Rows that come from each hop; at 0 the rank's own."""
        ring = self._q_layout.ring
        rows: dict[int, int] = defaultdict(int)
        for first, stop in self._keys_seen(rank):
            met = slice(bisect_right(self._starts, first) - 1, bisect_left(self._starts, stop))
            for start, end, owner in self._held[met]:
                rows[(rank - owner) % ring] += min(end, stop) - max(start, first)
        return rows

    def _keys_seen(self, rank: int) -> Runs:
        """The keys that some query of a rank may see, as disjoint runs in order."""
        seen = []
        for start, count, _ in self._q_layout.ranks[rank]:
            for band in self._mask.by_query.meeting(start, start + count):
                keys = band.keys_seen(start, start + count)
                if keys is not None:
                    seen.append(keys)
        return join(seen)


class _ReceivedByPieces:
    """The same for any layouts: as slow as all ranks' schedules together."""

    def __init__(self, mask: Mask, q_layout: Layout, kv_layout: Layout) -> None:
        self._mask = mask
        self._q_layout = q_layout
        self._kv_layout = kv_layout

    def by_hop(self, rank: int) -> dict[int, int]:
        """Rows that come from each hop; at 0 the rank's own."""
        ring = self._q_layout.ring
        rows: dict[int, int] = defaultdict(int)
        wanted = by_rank(pieces_of_queries(self._mask, self._q_layout, self._kv_layout, rank))
        for owner, pieces in wanted.items():
            rows[(rank - owner) % ring] = sum(stop - start for start, stop in keys_of(pieces))
        return rows


def _between_stripes(mask: Mask, kv_layout: Layout, enough: int) -> tuple[int, ...]:
    """Rank r has the tokens that are r modulo R: hop t is used if some pair has i - j = t modulo R."""
    ring = kv_layout.ring
    used: set[int] = set()
    for q_start, q_stop, k_start, k_stop, lo, hi in mask.bands:
        # Every difference between the least and the largest of a trimmed band occurs.
        least = q_start - (k_stop - 1) if lo is None else lo
        largest = q_stop - 1 - k_start if hi is None else hi
        used.update(difference % ring for difference in range(least, min(largest, least + ring - 1) + 1))
        if len(used) == ring:
            break
    shard = min(enough, max(kv_layout.counts))
    return tuple(shard if hop in used and hop else 0 for hop in range(ring))
