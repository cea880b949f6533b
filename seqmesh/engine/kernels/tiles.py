"""Cut any band into tiles that a kernel with only "full" and "square causal" can compute. Pure: no torch.

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

from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from seqmesh.masks import Band

MASKED_PAIRS = 128 * 128
"""A rectangle of up to this many pairs is computed with a dense mask in one call."""
STRIP_WIDTH = 1024
"""A band of two edges narrower than this many diagonals is cut in strips of rows, each with a dense mask.

Small triangles are slow: of a window of 512, two of 512 rows take 1.7 times as long per pair as a long causal
block, a strip of 192 rows 1.4 times, though it computes 1.4 times the pairs (CPU flash, fp32, d = 64).
"""
STRIP_ROWS = 192
"""Rows of such a strip: CPU flash takes larger blocks of queries from here on."""


class TileShape(Enum):
    """What a tile asks of the kernel."""

    FULL = "full"
    CAUSAL = "square, key <= query"
    REVERSED = "square, key >= query: causal with both orders reversed"
    MASKED = "a small dense mask"
    BAND = "whatever the band's bounds say, which the kernel takes as they are"


class Tile(NamedTuple):
    """A part of a block that a kernel computes in one call: its pairs, and the shape that they have."""

    band: Band
    """For FULL, CAUSAL and REVERSED the shape says what `lo` and `hi` say; kernels need not look."""
    shape: TileShape


@lru_cache(maxsize=4096)
def cut(band: Band) -> tuple[Tile, ...]:
    """Disjoint tiles with exactly the pairs of a band; no tile is a BAND."""
    trimmed = band.trim()
    return () if trimmed is None else tuple(_cut(trimmed))


def _cut(band: Band) -> Iterator[Tile]:
    """The tiles of a trimmed band."""
    if band.lo is None and band.hi is None:
        yield Tile(band, TileShape.FULL)
    elif _sides(band) <= MASKED_PAIRS and not _is_square_causal(band):
        yield Tile(band, TileShape.MASKED)
    elif band.hi is None:
        yield from _one_edge(band)
    elif band.lo is None:
        for tile in _one_edge(_turn(band, band)):
            yield _turn_tile(tile, band)
    else:
        yield from _two_edges(band)


def _sides(band: Band) -> int:
    """Pairs of the rectangle."""
    return (band.q_stop - band.q_start) * (band.k_stop - band.k_start)


def _is_square_causal(band: Band) -> bool:
    is_square = band.q_stop - band.q_start == band.k_stop - band.k_start
    return is_square and band.hi is None and band.lo == band.q_start - band.k_start


def _one_edge(band: Band) -> Iterator[Tile]:
    """Full columns left of the diagonal, the causal square, full rows below it."""
    q_start, q_stop, k_start, k_stop, lo, _ = band
    assert lo is not None
    diagonal = q_start - lo  # the column at which the first row ends
    side = k_stop - diagonal
    below = q_start + side
    if diagonal > k_start:
        yield Tile(Band(q_start, below, k_start, diagonal), TileShape.FULL)
    yield Tile(Band(q_start, below, diagonal, k_stop, lo), TileShape.CAUSAL)
    if below < q_stop:
        yield Tile(Band(below, q_stop, k_start, k_stop), TileShape.FULL)


def _two_edges(band: Band) -> Iterator[Tile]:
    """Strips of rows, each cut at the column where the upper edge has ended and the lower one begins."""
    q_start, q_stop, k_start, k_stop, lo, hi = band
    assert lo is not None
    assert hi is not None
    width = hi - lo + 1
    is_narrow = width < STRIP_WIDTH
    height = STRIP_ROWS if is_narrow else width
    for start in range(q_start, q_stop, height):
        stop = min(q_stop, start + height)
        if is_narrow:
            parts = [band.within(start, stop, k_start, k_stop)]
        else:
            middle = start - lo
            parts = [band.within(start, stop, k_start, middle), band.within(start, stop, middle, k_stop)]
        for part in parts:
            if part is None:
                continue
            if part.lo is None or part.hi is None:
                yield from _cut(part)
            else:
                yield Tile(part, TileShape.MASKED)


def _turn(band: Band, frame: Band) -> Band:
    """The band turned by 180 degrees inside the rectangle of `frame`."""
    q = frame.q_start + frame.q_stop - 1
    k = frame.k_start + frame.k_stop - 1
    return Band(
        q - band.q_stop + 1,
        q - band.q_start + 1,
        k - band.k_stop + 1,
        k - band.k_start + 1,
        None if band.hi is None else q - k - band.hi,
        None if band.lo is None else q - k - band.lo,
    )


def _turn_tile(tile: Tile, frame: Band) -> Tile:
    turned = TileShape.REVERSED if tile.shape is TileShape.CAUSAL else tile.shape
    return Tile(_turn(tile.band, frame), turned)
