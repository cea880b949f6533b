"""A mask: disjoint bands over so many queries and keys (the package's docstring has the picture).

    Mask(6, 6, (Band(0, 4, 0, 4, lo=0), Band(4, 6, 4, 6, lo=0)))      two packed documents, 4 and 2 tokens

Frozen, hashable, and the same value however it was written: every rank makes its schedule from it alike.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import index
from typing import TYPE_CHECKING

from seqmesh.masks.band import Band
from seqmesh.masks.band_index import BandIndex, meetings

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Mask:
    """A set of disjoint bands over `q_len` queries and `k_len` keys.

    A query that no band covers attends to nothing (output 0).

    Bands are stored trimmed and sorted, so equal masks compare equal however they were written; empty ones
    are dropped.

    Raises:
        ValueError: a band leaves the (q_len, k_len) rectangle, or two bands share a pair (it would count
            twice in the softmax).
    """

    q_len: int
    k_len: int
    bands: tuple[Band, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "q_len", whole(self.q_len))
        object.__setattr__(self, "k_len", whole(self.k_len))
        if self.q_len < 0 or self.k_len < 0:
            raise ValueError(
                f"a mask of {self.q_len} queries x {self.k_len} keys:"
                " lengths must not be negative; pass lengths >= 0"
            )
        for band in self.bands:
            self._check_inside(band)
        trimmed = (band.trim() for band in map(Band._make, self.bands))
        bands = tuple(sorted((b for b in trimmed if b is not None), key=lambda b: b[:4]))
        object.__setattr__(self, "bands", bands)
        # Packed documents, thousands of them, follow one another: only bands that share a query can overlap.
        stops = accumulate((band.q_stop for band in bands), max)
        if any(later.q_start < stop for later, stop in zip(bands[1:], stops, strict=False)):
            self._check_disjoint()

    def _check_inside(self, band: Band) -> None:
        q_inside = 0 <= band.q_start <= band.q_stop <= self.q_len
        k_inside = 0 <= band.k_start <= band.k_stop <= self.k_len
        if not (q_inside and k_inside):
            raise ValueError(
                f"{band} leaves the mask of {self.q_len} queries x {self.k_len} keys;"
                " clip the band or lengthen the mask"
            )

    def _check_disjoint(self) -> None:
        for m, n in meetings(self.bands, self.bands):
            shared = self.bands[m].intersect(self.bands[n]) if m < n else None
            if shared is not None:
                raise ValueError(
                    f"{self.bands[m]} and {self.bands[n]} share {shared.area} pairs,"
                    " which would count twice in the softmax;"
                    " make the bands of a mask disjoint (or intersect two masks with &)"
                )

    def __and__(self, other: "Mask") -> "Mask":
        """The pairs allowed by both masks.

        `documents(lengths) & sliding_window(s, w)` is a window inside each document.
        """
        if (self.q_len, self.k_len) != (other.q_len, other.k_len):
            raise ValueError(
                f"cannot intersect a mask of {self.q_len} x {self.k_len}"
                f" with one of {other.q_len} x {other.k_len}; both must cover the same queries and keys"
            )
        pairs = (self.bands[m].intersect(other.bands[n]) for m, n in meetings(self.bands, other.bands))
        return Mask(self.q_len, self.k_len, tuple(b for b in pairs if b is not None))

    @cached_property
    def area(self) -> int:
        """Number of allowed (query, key) pairs: the load, the FLOP count / (4 d h), and the MFU numerator."""
        return sum(band.area for band in self.bands)

    @cached_property
    def by_query(self) -> BandIndex:
        """The bands, searchable by a range of queries."""
        return BandIndex(self.bands)

    @cached_property
    def by_key(self) -> BandIndex:
        """The bands, searchable by a range of keys."""
        return BandIndex(self.bands, by_key=True)

    def rows_area(self, start: int, stop: int) -> int:
        """Number of allowed pairs of the queries [start, stop)."""
        clipped = (band.within(start, stop, 0, self.k_len) for band in self.by_query.meeting(start, stop))
        return sum(band.area for band in clipped if band is not None)

    def dense(self) -> "npt.NDArray[np.bool_]":
        """The mask as a NumPy bool array (q_len, k_len), True where allowed.

        For tests and pictures: quadratic memory.
        """
        import numpy as np

        allowed = np.zeros((self.q_len, self.k_len), dtype=np.bool_)
        for q_start, q_stop, k_start, k_stop, lo, hi in self.bands:
            difference = np.arange(q_start, q_stop)[:, None] - np.arange(k_start, k_stop)[None, :]
            inside = np.ones_like(difference, dtype=np.bool_)
            if lo is not None:
                inside &= difference >= lo
            if hi is not None:
                inside &= difference <= hi
            allowed[q_start:q_stop, k_start:k_stop] |= inside
        return allowed


def whole(number: int) -> int:
    """A number of tokens as an int.

    NumPy and torch integers pass, 3.7 does not: truncated lengths would shift every document.
    """
    try:
        return index(number)
    except TypeError:
        raise ValueError(f"{number!r} is not a whole number of tokens; pass an int") from None
