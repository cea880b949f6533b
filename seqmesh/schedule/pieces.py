"""Pieces: the pairs of a band between a span of queries and a span of keys, in indices into their storage.

    global            i = 5 8 11 14            storage         a = 0 1 2 3         i = q.start + q.stride a
    j = 3 6 9 12      lo <= i - j <= hi   ->   b = 0 1 2 3     lo' <= a - b <= hi'    of spans of one stride

A band between two spans of one stride is a band again, so nothing is ever looked at token by token, but
for spans of different strides.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from seqmesh.layouts import Layout, Span
from seqmesh.masks import Band, Mask

Runs = tuple[tuple[int, int], ...]
"""Rows as sorted, disjoint [start, stop) ranges of a rank's storage."""

Blocks = list[Band]
"""Bands whose queries index a rank's storage, and whose keys index what it has received, or its own."""


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


def pieces_of_queries(
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


def pieces_of_keys(mask: Mask, q_layout: Layout, kv_layout: Layout, rank: int) -> Iterator[tuple[int, Band]]:
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


def keys_of(pieces: Iterable[Band]) -> Runs:
    """The keys that any of the bands needs, as runs. Trimmed bands need every key of their rectangle."""
    return join((piece.k_start, piece.k_stop) for piece in pieces)


def join(runs: Iterable[tuple[int, int]]) -> Runs:
    """The union of some runs, sorted and disjoint."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if joined and start <= joined[-1][1]:
            if stop > joined[-1][1]:
                joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def by_rank(pieces: Iterable[tuple[int, Band]]) -> dict[int, list[Band]]:
    """Bands by the rank at their other end."""
    found: dict[int, list[Band]] = defaultdict(list)
    for rank, piece in pieces:
        found[rank].append(piece)
    return dict(found)
