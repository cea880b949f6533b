"""Striped layouts with packed documents: what every peer needs of every document, by arithmetic alone.

Every document meets every stripe, so a rank has a block for nearly every document and peer. They are not
searched for. A document's piece depends on the peer's stripe b only by where roundings change, at a handful
of values of b, so few pieces are computed and most peers share them:

    R = 8, a document of tokens 19 .. 42        stripe b        0  1  2 | 3  4  5 | 6  7
    rows of stripe b before the document        ceil((19-b)/8)  3  3  3 | 2  2  2 | 2  2
    rows of stripe b up to its end              ceil((43-b)/8)  6  6  6 | 5  5  5 | 5  5
    pairs with stripe a = 5, causal             lo              0  0  0 | 0  0  0 | 1  1

What remains is to number the rows of the receive buffer, a running sum over the documents.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, compress, pairwise
from operator import add, sub
from typing import Any, NamedTuple, cast

from seqmesh.layouts import Layout, Span
from seqmesh.masks import Band, Mask
from seqmesh.schedule.pieces import Blocks, Runs

_Piece = tuple[int, int, int, int, int | None, int | None]
"""The rows and keys of a band between two stripes, in their storage, and its bounds of row - key.

The bounds count keys from the piece's first one, so that it can be moved without touching them.
"""


def applies(mask: Mask, q_layout: Layout, kv_layout: Layout) -> bool:
    """Whether both layouts are striped and no two blocks of one peer can ever become one.

    Bands that follow one another in rows as in keys, as packed documents do, touch at a corner at most; only
    bands of few diagonals could be joined there.
    """
    ring = q_layout.ring
    if len(mask.bands) < 2 or not (is_striped(q_layout) and is_striped(kv_layout)):
        return False
    for band, after in pairwise(mask.bands):
        if band.q_stop > after.q_start or band.k_stop > after.k_start:
            return False
    return all(band.lo is None or band.hi is None or band.hi - band.lo >= 2 * ring for band in mask.bands)


def is_striped(layout: Layout) -> bool:
    """Whether ring rank r holds the tokens r, r + R, r + 2R, ..."""
    ring = layout.ring
    return all(
        spans == ((Span(rank, len(range(rank, layout.s, ring)), ring),) if rank < layout.s else ())
        for rank, spans in enumerate(layout.ranks)
    )


class StripedPeers:
    """What one rank exchanges with every other and computes for it, where `applies` holds."""

    apart = True

    def __init__(self, mask: Mask, ring: int, ring_rank: int) -> None:
        self._me = ring_rank

        def of_keys(band: Band, peer: int) -> _Piece | None:
            return _piece(band, ring, ring_rank, peer)

        def of_queries(band: Band, peer: int) -> _Piece | None:
            return _piece(band, ring, peer, ring_rank)

        # Where the peer's stripe passes the residue of an edge, it has a row more or less before that edge.
        def changes_of_keys(band: Band) -> set[int]:
            found = {0, band.k_start % ring, band.k_stop % ring}
            if band.lo is not None:
                found.add((ring_rank - band.lo + 1) % ring)
            if band.hi is not None:
                found.add((ring_rank - band.hi) % ring)
            return found

        def changes_of_queries(band: Band) -> set[int]:
            found = {0, band.q_start % ring, band.q_stop % ring}
            if band.lo is not None:
                found.add((ring_rank + band.lo) % ring)
            if band.hi is not None:
                found.add((ring_rank + band.hi + 1) % ring)
            return found

        self._wanted = _by_peer(mask.bands, ring, of_keys, changes_of_keys)
        self._asked = _by_peer(mask.bands, ring, of_queries, changes_of_queries)

    def own(self) -> Blocks:
        """The blocks of this rank's own rows."""
        columns = self._wanted[self._me]
        return columns.blocks(columns.k_start)

    def received(self, peer: int, row: int) -> tuple[Runs, Blocks]:
        """Rows of a peer's storage that are needed here, and the blocks on them."""
        columns = self._wanted[peer]
        counts = map(sub, columns.k_stop, columns.k_start)
        return columns.runs(), columns.blocks(list(accumulate(counts, initial=row))[:-1])

    def sent(self, peer: int) -> Runs:
        """Rows of this rank's storage that a peer needs."""
        return self._asked[peer].runs()


class _Columns(NamedTuple):
    """Pieces of bands in their order, column by column: a few calls do what a thousand pieces need."""

    q_start: list[int]
    q_stop: list[int]
    k_start: list[int]
    k_stop: list[int]
    lo: list[int | None]
    hi: list[int | None]

    def runs(self) -> Runs:
        """Their keys; what touches is one run."""
        if not self.k_start:
            return ()
        befores = [-1, *self.k_stop[:-1]]
        afters = [*self.k_start[1:], -1]
        starts = [start for start, before in zip(self.k_start, befores, strict=True) if start != before]
        stops = [stop for stop, after in zip(self.k_stop, afters, strict=True) if stop != after]
        return tuple(zip(starts, stops, strict=True))

    def blocks(self, places: list[int]) -> Blocks:
        """The pieces as bands whose keys begin at other places."""
        stops = map(add, places, map(sub, self.k_stop, self.k_start))
        lo, hi = (_moved(bounds, places) for bounds in (self.lo, self.hi))
        return list(map(_BAND, zip(self.q_start, self.q_stop, places, stops, lo, hi, strict=True)))


def _moved(bounds: list[int | None], places: list[int]) -> list[int | None]:
    """Bounds that count keys from `places`, counted from 0."""
    if bounds.count(None) == len(bounds):  # upper bounds, unless there are windows too
        return bounds
    return [None if bound is None else bound - at for bound, at in zip(bounds, places, strict=True)]


_BAND = cast("Callable[[tuple[int | None, ...]], Band]", partial(tuple.__new__, Band))
"""A band of six numbers: what Band._make does, in half its time."""


def _by_peer(
    bands: Sequence[Band],
    ring: int,
    piece_of: Callable[[Band, int], _Piece | None],
    changes_of: Callable[[Band], set[int]],
) -> list[_Columns]:
    """The pieces of all bands for each peer: computed where they change, and kept in between."""
    changes: list[list[tuple[int, _Piece | None]]] = [[] for _ in range(ring)]
    for at, band in enumerate(bands):
        for peer in changes_of(band):
            changes[peer].append((at, piece_of(band, peer)))
    table: list[list[Any]] = [[0] * len(bands) for _ in range(6)]
    has_pairs = [False] * len(bands)
    found = []
    for changed in changes:
        for at, piece in changed:
            has_pairs[at] = piece is not None
            for column, number in zip(table, piece or (), strict=False):
                column[at] = number
        found.append(_Columns(*(list(compress(column, has_pairs)) for column in table)))
    return found


def _piece(band: Band, ring: int, a: int, b: int) -> _Piece | None:
    """The pairs of a band between the queries of stripe a and the keys of stripe b, trimmed as a band is."""
    q_start, q_stop, k_start, k_stop, lo, hi = band
    # Of the tokens t, ceil((t - a) / R) are of stripe a and before t.
    first = (q_start - a + ring - 1) // ring
    last = (q_stop - a + ring - 1) // ring
    key = (k_start - b + ring - 1) // ring
    stop = (k_stop - b + ring - 1) // ring
    # i - j = (a - b) + R (row - key): bounds are rounded inwards.
    if lo is not None:
        lo = (lo - a + b + ring - 1) // ring
        first = max(first, key + lo)
    if hi is not None:
        hi = (hi - a + b) // ring
        last = min(last, stop + hi)
    if lo is not None:
        stop = min(stop, last - lo)
    if hi is not None:
        key = max(key, first - hi)
    if first >= last or key >= stop:
        return None
    if lo is not None:
        lo = None if first - (stop - 1) >= lo else lo + key
    if hi is not None:
        hi = None if last - 1 - key <= hi else hi + key
    return first, last, key, stop, lo, hi
