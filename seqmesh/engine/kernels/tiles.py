"""Cut any band into tiles that a kernel with only "full" and "square causal" can compute.

A trimmed band has at most two diagonal edges. With one, it is a full part, a square causal part and a full
part. An upper edge is the same picture turned by 180 degrees: a causal square with the order of queries and
of keys reversed. With two edges, rows are taken W at a time (W the width of the band in diagonals): in such a
strip a column separates the two edges.

    one edge (lo)            the other (hi)           both, a window of 3, first strip of 3 rows
      # # \\ . .                . \\ # # #                \\ . . . .
      # # # \\ .                . . \\ # #                # \\ . . .
      # # # # \\                . . . \\ #                # # \\ . .

Bands with few pairs, and strips of narrow bands, are left as one *masked* tile: one call with a small dense
mask beats many calls on slivers.
"""

from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from seqmesh.masks import Band

MASKED_PAIRS = 128 * 128
"""A rectangle of up to this many pairs is computed with a dense mask in one call."""
STRIP_ROWS = 128
"""A band narrower than this many diagonals is cut in strips of this many rows, each with a dense mask."""


class Shape(Enum):
    """What a tile asks of the kernel."""

    FULL = "full"
    CAUSAL = "square, key <= query"
    REVERSED = "square, key >= query: causal with both orders reversed"
    MASKED = "a small dense mask"


class Tile(NamedTuple):
    """A part of a band: its pairs (`band.lo` and `band.hi` matter for MASKED) and its shape."""

    band: Band
    shape: Shape


@lru_cache(maxsize=4096)
def cut(band: Band) -> tuple[Tile, ...]:
    """Disjoint tiles with exactly the pairs of a band."""
    trimmed = band.trim()
    return () if trimmed is None else tuple(_cut(trimmed))


def _cut(band: Band) -> list[Tile]:
    q_start, q_stop, k_start, k_stop, lo, hi = band
    if lo is None and hi is None:
        return [Tile(band, Shape.FULL)]
    if (q_stop - q_start) * (k_stop - k_start) <= MASKED_PAIRS and not _is_square_causal(band):
        return [Tile(band, Shape.MASKED)]
    if hi is None:
        return _one_edge(band)
    if lo is None:
        return [_turn_tile(tile, band) for tile in _one_edge(_turn(band, band))]
    return _two_edges(band)


def _is_square_causal(band: Band) -> bool:
    square = band.q_stop - band.q_start == band.k_stop - band.k_start
    return square and band.hi is None and band.lo == band.q_start - band.k_start


def _one_edge(band: Band) -> list[Tile]:
    """Full columns left of the diagonal, the causal square, full rows below it."""
    q_start, q_stop, k_start, k_stop, lo, _ = band
    assert lo is not None
    first = q_start - lo  # the diagonal starts at column `first` of the first row
    side = k_stop - first
    tiles = []
    if first > k_start:
        tiles.append(Tile(Band(q_start, q_start + side, k_start, first), Shape.FULL))
    tiles.append(Tile(Band(q_start, q_start + side, first, k_stop, lo), Shape.CAUSAL))
    if q_start + side < q_stop:
        tiles.append(Tile(Band(q_start + side, q_stop, k_start, k_stop), Shape.FULL))
    return tiles


def _two_edges(band: Band) -> list[Tile]:
    q_start, q_stop, k_start, k_stop, lo, hi = band
    assert lo is not None
    assert hi is not None
    width = hi - lo + 1
    tiles: list[Tile] = []
    for start in range(q_start, q_stop, max(width, STRIP_ROWS)):
        stop = min(q_stop, start + max(width, STRIP_ROWS))
        if width < STRIP_ROWS:
            strips = [band.within(start, stop, k_start, k_stop)]
        else:  # at column start - lo the upper edge has ended and the lower edge begins
            strips = [
                band.within(start, stop, k_start, start - lo),
                band.within(start, stop, start - lo, k_stop),
            ]
        for strip in strips:
            if strip is not None:
                tiles += _cut(strip) if strip.lo is None or strip.hi is None else [Tile(strip, Shape.MASKED)]
    return tiles


def _turn(band: Band, frame: Band) -> Band:
    """The band turned by 180 degrees inside the rectangle of `frame`."""
    q, k = frame.q_start + frame.q_stop - 1, frame.k_start + frame.k_stop - 1
    return Band(
        q - band.q_stop + 1,
        q - band.q_start + 1,
        k - band.k_stop + 1,
        k - band.k_start + 1,
        None if band.hi is None else q - k - band.hi,
        None if band.lo is None else q - k - band.lo,
    )


def _turn_tile(tile: Tile, frame: Band) -> Tile:
    return Tile(_turn(tile.band, frame), Shape.REVERSED if tile.shape is Shape.CAUSAL else tile.shape)
