"""The ring schedule of one rank: which K/V rows travel when, and which blocks they allow. Data, not code.

From a mask and two layouts (of queries and of keys) every rank derives its own list of *stages*. Stage 0
computes what needs only local rows. Each later stage receives exactly the K/V rows that some block needs from
a group of peers, and computes those blocks. Sender and receiver apply the same function to the same inputs,
so nothing is negotiated (docs/schedules.md).

Causal, zigzag, R = 2, 4 chunks A B C D: rank 0 stores A D, rank 1 stores B C. `\\` is a causal block, `#` a
full one:

             stage 0 (own rows)      stage 1 (received rows)
                A D                     B C
    rank 0   A  \\ .                  A  . .      rank 1 sends B C: two chunks, ONE full block for D
             D  # \\                  D  # #
                B C                     A
    rank 1   B  \\ .                  B  #        rank 0 sends A only: nobody here needs D,
             C  # \\                  C  #        so 3/4 of what a rotating ring moves

Stage 0 of each is ONE causal block over both chunks: blocks are coalesced whenever their union is a band.

Source: Ring-Attention (Liu et al. 2023), zigzag as in the USP paper; exactly-needed rows are ours.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from seqmesh.layouts import Layout, Span, split_evenly
from seqmesh.masks import Band, Mask

Runs = tuple[tuple[int, int], ...]
"""Rows as sorted, disjoint [start, stop) ranges of a rank's storage."""


class Transfer(NamedTuple):
    """Rows that travel between this rank and `peer`: `runs` index the storage of the rank that sends them."""

    peer: int
    runs: Runs

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self.runs)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One exchange and the blocks that it allows.

    The receive buffer holds the received runs one after the other, peers in ascending order. In `blocks`,
    queries index this rank's storage and keys index that buffer (stage 0: this rank's own K/V storage).
    """

    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()
    blocks: tuple[Band, ...] = ()

    @property
    def rows_sent(self) -> int:
        """K/V rows this rank sends at this stage."""
        return sum(transfer.rows for transfer in self.sends)

    @property
    def rows_received(self) -> int:
        """K/V rows this rank receives at this stage."""
        return sum(transfer.rows for transfer in self.receives)


@dataclass(frozen=True, kw_only=True)
class RingSchedule:
    """Everything one ring rank sends, receives and computes, in order."""

    ring_rank: int
    ring: int
    q_rows: int
    kv_rows: int
    stages: tuple[Stage, ...]

    @property
    def rows_sent(self) -> int:
        """K/V rows this rank sends in one forward pass."""
        return sum(stage.rows_sent for stage in self.stages)

    @property
    def rows_received(self) -> int:
        """K/V rows this rank receives in one forward pass."""
        return sum(stage.rows_received for stage in self.stages)

    @property
    def area(self) -> int:
        """(query, key) pairs this rank computes."""
        return sum(block.area for stage in self.stages for block in stage.blocks)


class _Stored(NamedTuple):
    """A span with its owner and its place in the owner's storage."""

    rank: int
    offset: int
    span: Span


class _Owners:
    """Who stores a range of positions, by bisection over all spans of a layout."""

    def __init__(self, layout: Layout) -> None:
        stored: list[_Stored] = []
        for rank in range(layout.ring):
            stored += (_Stored(rank, offset, span) for offset, span in _storage(layout, rank))
        self._stored = sorted(stored, key=lambda s: s.span.start)
        self._starts = [s.span.start for s in self._stored]
        self._furthest_stop = list(accumulate((s.span.tokens[-1] + 1 for s in self._stored), max))

    def meeting(self, start: int, stop: int) -> list[_Stored]:
        """Every stored span that meets the positions [start, stop), and possibly a few that do not."""
        return self._stored[bisect_right(self._furthest_stop, start) : bisect_left(self._starts, stop)]


@lru_cache(maxsize=8)
def _owners(layout: Layout) -> _Owners:
    return _Owners(layout)


def _storage(layout: Layout, rank: int) -> Iterator[tuple[int, Span]]:
    """A rank's spans with their offsets in its storage."""
    offset = 0
    for span in layout.ranks[rank]:
        yield offset, span
        offset += span.count


def _to_storage(band: Band, q: Span, k: Span) -> Iterator[Band]:
    """The pairs of a global band between two spans, as trimmed bands over indices into those spans."""
    if q.count > 1 and k.count > 1 and q.stride != k.stride:
        yield from _token_by_token(band, q, k)
        return
    # Both strides are t (a span of one token has any): with i = q.start + t a and j = k.start + t b,
    # i - j = (q.start - k.start) + t (a - b) is still a band, whose bounds are rounded inwards.
    stride = q.stride if q.count > 1 else k.stride
    offset = q.start - k.start
    piece = Band(
        max(0, _ceil_div(band.q_start - q.start, stride)),
        min(q.count, _ceil_div(band.q_stop - q.start, stride)),
        max(0, _ceil_div(band.k_start - k.start, stride)),
        min(k.count, _ceil_div(band.k_stop - k.start, stride)),
        None if band.lo is None else _ceil_div(band.lo - offset, stride),
        None if band.hi is None else (band.hi - offset) // stride,
    ).trim()
    if piece is not None:
        yield piece


def _token_by_token(band: Band, q: Span, k: Span) -> Iterator[Band]:
    """The same for spans of different strides: the wider-strided one is taken apart.

    Always right, and slow only for layouts that mix strides.
    """
    if q.stride > k.stride:
        for a, i in enumerate(q.tokens):
            for piece in _to_storage(band, Span(i, 1), k):
                yield piece.shift(a, 0)
    else:
        for b, j in enumerate(k.tokens):
            for piece in _to_storage(band, q, Span(j, 1)):
                yield piece.shift(0, b)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _pieces_of_queries(
    mask: Mask, q_layout: Layout, kv_layout: Layout, rank: int
) -> Iterator[tuple[int, Band]]:
    """All pairs of this rank's queries: (owner of the keys, band from our to the owner's storage)."""
    owners = _owners(kv_layout)
    for q_offset, q in _storage(q_layout, rank):
        start = q.start
        stop = q.tokens[-1] + 1
        for band in mask.by_query.meeting(start, stop):
            clipped = band.within(start, stop, 0, mask.k_len)
            if clipped is None:
                continue
            for owner, k_offset, k in owners.meeting(clipped.k_start, clipped.k_stop):
                for piece in _to_storage(clipped, q, k):
                    yield owner, piece.shift(q_offset, k_offset)


def _pieces_of_keys(mask: Mask, q_layout: Layout, kv_layout: Layout, rank: int) -> Iterator[tuple[int, Band]]:
    """The transpose: (owner of the queries, band from the owner's query storage to our K/V storage)."""
    owners = _owners(q_layout)
    for k_offset, k in _storage(kv_layout, rank):
        start = k.start
        stop = k.tokens[-1] + 1
        for band in mask.by_key.meeting(start, stop):
            clipped = band.within(0, mask.q_len, start, stop)
            if clipped is None:
                continue
            for owner, q_offset, q in owners.meeting(clipped.q_start, clipped.q_stop):
                for piece in _to_storage(clipped, q, k):
                    yield owner, piece.shift(q_offset, k_offset)


def _union(pieces: Iterable[Band]) -> Runs:
    """The keys that any of the bands needs, as runs. Trimmed bands need every key of their rectangle."""
    runs: list[tuple[int, int]] = []
    for start, stop in sorted((piece.k_start, piece.k_stop) for piece in pieces):
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(runs[-1][1], stop))
        else:
            runs.append((start, stop))
    return tuple(runs)


def _into_buffer(pieces: Iterable[Band], runs: Runs, base: int) -> Iterator[Band]:
    """Move the keys of bands from the sender's storage to its place in the receive buffer, from `base` on."""
    starts = [start for start, _ in runs]
    places = list(accumulate((stop - start for start, stop in runs), initial=base))
    for piece in pieces:
        run = bisect_right(starts, piece.k_start) - 1
        yield piece.shift(0, places[run] - starts[run])


def _merge(a: Band, b: Band) -> Band | None:
    """The band that is exactly the union of two disjoint trimmed bands, if there is one."""
    if a.q_stop < b.q_start or b.q_stop < a.q_start or a.k_stop < b.k_start or b.k_stop < a.k_start:
        return None
    hull = (
        min(a.q_start, b.q_start),
        max(a.q_stop, b.q_stop),
        min(a.k_start, b.k_start),
        max(a.k_stop, b.k_stop),
    )
    area = a.area + b.area
    for lo in {a.lo, b.lo}:
        for hi in {a.hi, b.hi}:
            union = Band(*hull, lo, hi)
            # As many pairs as both together, and all of theirs: then it has no others.
            if union.area == area and a.intersect(union) == a and b.intersect(union) == b:
                return union.trim()
    return None


def coalesce(blocks: Iterable[Band]) -> tuple[Band, ...]:
    """Fewer blocks with the same pairs: neighbours whose union is a band become that band."""
    merged = _coalesce_neighbours(sorted(blocks, key=lambda block: (block.k_start, block.q_start)))
    return _coalesce_neighbours(sorted(merged, key=lambda block: (block.q_start, block.k_start)))


def _coalesce_neighbours(blocks: Iterable[Band]) -> tuple[Band, ...]:
    """One pass over sorted blocks; what has grown is tried against the one before it again."""
    stack: list[Band] = []
    for block in blocks:
        grown = block
        while stack and (union := _merge(stack[-1], grown)) is not None:
            stack.pop()
            grown = union
        stack.append(grown)
    return tuple(stack)


def ring_schedule(
    mask: Mask, q_layout: Layout, kv_layout: Layout, ring_rank: int, stages: int | None = None
) -> RingSchedule:
    """What one ring rank sends, receives and computes for a mask.

    Args:
        mask: q_len queries x k_len keys.
        q_layout: layout of the q_len queries.
        kv_layout: layout of the k_len keys, for the same ring degree; the query layout itself in
            self-attention.
        ring_rank: whose schedule.
        stages: exchanges after stage 0, to spread the R - 1 hops over: R - 1 (default) is a ring, 1 an
            all-gather, anything between is legal. More stages hide more traffic behind compute and hold fewer
            received rows; fewer save latency.

    Raises:
        ValueError: a layout of another length or ring degree, a rank outside the ring, or more stages than
            hops.
    """
    _check(mask, q_layout, kv_layout, ring_rank, stages)
    ring = q_layout.ring
    wanted = _by_rank(_pieces_of_queries(mask, q_layout, kv_layout, ring_rank))
    found = [Stage(blocks=coalesce(wanted.get(ring_rank, ())))]
    if ring > 1:
        asked = _by_rank(_pieces_of_keys(mask, q_layout, kv_layout, ring_rank))
        # One exchange a hop by default; fewer exchanges take several hops each.
        for first, last in pairwise(split_evenly(ring - 1, stages or ring - 1)):
            # Hop t brings rows from t ranks before and sends to t ranks after: all send and receive at every
            # hop.
            distances = range(first + 1, last + 1)
            sources = sorted((ring_rank - distance) % ring for distance in distances)
            targets = sorted((ring_rank + distance) % ring for distance in distances)
            found.append(_stage(sources, targets, wanted, asked))
    return RingSchedule(
        ring_rank=ring_rank,
        ring=ring,
        q_rows=q_layout.counts[ring_rank],
        kv_rows=kv_layout.counts[ring_rank],
        stages=tuple(found),
    )


def _check(mask: Mask, q_layout: Layout, kv_layout: Layout, ring_rank: int, stages: int | None) -> None:
    for what, layout, length in (("query", q_layout, mask.q_len), ("key", kv_layout, mask.k_len)):
        if layout.s != length:
            raise ValueError(
                f"the {what} layout holds {layout.s} tokens but the mask has {length};"
                f" build the layout for {length} tokens"
            )
    if q_layout.ring != kv_layout.ring:
        raise ValueError(
            f"a query layout for ring={q_layout.ring} with a key layout for ring={kv_layout.ring};"
            " use one ring degree"
        )
    if not 0 <= ring_rank < q_layout.ring:
        raise ValueError(
            f"ring_rank={ring_rank} of a layout for ring={q_layout.ring}; use 0 <= ring_rank < ring"
        )
    most = max(1, q_layout.ring - 1)
    if stages is not None and not 1 <= stages <= most:
        raise ValueError(f"stages={stages} for ring={q_layout.ring}; use 1 (all-gather) to {most} (ring)")


def _by_rank(pieces: Iterable[tuple[int, Band]]) -> dict[int, list[Band]]:
    """Bands by the rank at their other end."""
    found: dict[int, list[Band]] = defaultdict(list)
    for rank, piece in pieces:
        found[rank].append(piece)
    return dict(found)


def _stage(
    sources: Iterable[int],
    targets: Iterable[int],
    wanted: dict[int, list[Band]],
    asked: dict[int, list[Band]],
) -> Stage:
    """One exchange: rows come from `sources` and go to `targets`, and the former allow some blocks."""
    receives: list[Transfer] = []
    blocks: list[Band] = []
    row = 0  # of the receive buffer
    for source in sources:
        if source in wanted:
            transfer = Transfer(source, _union(wanted[source]))
            blocks += _into_buffer(wanted[source], transfer.runs, row)
            receives.append(transfer)
            row += transfer.rows
    sends = tuple(Transfer(target, _union(asked[target])) for target in targets if target in asked)
    return Stage(sends=sends, receives=tuple(receives), blocks=coalesce(blocks))
