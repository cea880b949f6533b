"""Attention masks as sets of bands: which query may meet which key, exactly and without a tensor.

Every mask that long-context training uses is a handful of *bands*: a rectangle of (query, key) pairs, cut by
at most two diagonals. Bands are closed under intersection, their area is a closed form, and both survive
sharding, so the schedule, the load balance, the FLOP count and the MFU numerator all come from this one
description (docs/masks.md).

      key j ->        causal          window 2        two documents    prefix 2
    query i    0      X . . .         X . . .         X . . .          X X . .
       |       1      X X . .         X X . .         X X . .          X X . .
       v       2      X X X .         . X X .         . . X .          X X X .
               3      X X X X         . . X X         . . X X          X X X X
             bands:      1               1               2                2

Trade-off: a mask that is not a few bands (random sparsity) is legal as many one-pair bands, but slow. Use a
dense library.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import attrgetter, index
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def _triangle(n: int) -> int:
    """1 + 2 + ... + n, and 0 for n <= 0."""
    return n * (n + 1) // 2 if n > 0 else 0


def _tighter(of: Callable[[int, int], int], a: int | None, b: int | None) -> int | None:
    """The tighter of two bounds, of which None is none."""
    if a is None:
        return b
    if b is None:
        return a
    return of(a, b)


class Band(NamedTuple):
    """The pairs (i, j) with q_start <= i < q_stop, k_start <= j < k_stop and lo <= i - j <= hi.

    `lo=None` and `hi=None` leave that side open: `lo=0` is causal, `lo=0, hi=w-1` a sliding window of w
    tokens.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    lo: int | None = None
    hi: int | None = None

    def trim(self) -> "Band | None":
        """The same pairs in the smallest rectangle; None if no pair is left.

        Bounds that exclude nothing become None. In the result every row and every column has at least one
        pair, so its columns are exactly the keys it needs.
        """
        q_start, q_stop, k_start, k_stop, lo, hi = self
        if lo is not None and hi is not None and lo > hi:
            return None
        # Rows without a pair go first; then a column has a pair only if a row that is left has one there.
        if lo is not None:
            q_start = max(q_start, k_start + lo)
        if hi is not None:
            q_stop = min(q_stop, k_stop + hi)
        if lo is not None:
            k_stop = min(k_stop, q_stop - lo)
        if hi is not None:
            k_start = max(k_start, q_start - hi)
        if q_start >= q_stop or k_start >= k_stop:
            return None
        if lo is not None and q_start - (k_stop - 1) >= lo:
            lo = None
        if hi is not None and (q_stop - 1) - k_start <= hi:
            hi = None
        return Band(q_start, q_stop, k_start, k_stop, lo, hi)

    def intersect(self, other: "Band") -> "Band | None":
        """The pairs in both bands, trimmed, or None: rectangles meet, lo is the larger, hi the smaller."""
        if self.q_start >= other.q_stop or other.q_start >= self.q_stop:
            return None
        return Band(
            max(self.q_start, other.q_start),
            min(self.q_stop, other.q_stop),
            max(self.k_start, other.k_start),
            min(self.k_stop, other.k_stop),
            _tighter(max, self.lo, other.lo),
            _tighter(min, self.hi, other.hi),
        ).trim()

    def within(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> "Band | None":
        """The pairs that also lie in a rectangle, trimmed, or None."""
        return Band(
            max(self.q_start, q_start),
            min(self.q_stop, q_stop),
            max(self.k_start, k_start),
            min(self.k_stop, k_stop),
            self.lo,
            self.hi,
        ).trim()

    def shift(self, q: int, k: int) -> "Band":
        """The band moved by q rows and k columns."""
        move = q - k
        return Band(
            self.q_start + q,
            self.q_stop + q,
            self.k_start + k,
            self.k_stop + k,
            None if self.lo is None else self.lo + move,
            None if self.hi is None else self.hi + move,
        )

    @property
    def area(self) -> int:
        """Number of pairs, in closed form.

        The rectangle, minus the corner above lo, minus the corner below hi.
        """
        q, k = self.q_stop - self.q_start, self.k_stop - self.k_start
        if q <= 0 or k <= 0 or (self.lo is not None and self.hi is not None and self.lo > self.hi):
            return 0
        offset = self.q_start - self.k_start
        total = q * k
        if self.hi is not None:
            total = self._pairs_up_to(self.hi - offset, q, k)
        if self.lo is not None:
            total -= self._pairs_up_to(self.lo - 1 - offset, q, k)
        return total

    @staticmethod
    def _pairs_up_to(c: int, q: int, k: int) -> int:
        """Pairs of a q x k rectangle at the origin with i - j <= c.

        Row i has clip(k + c - i, 0, k) of them. Their sum is a difference of triangles: the slope, less what
        it has below the last row and beyond the last column, where the two cuts overlap added back.
        """
        return _triangle(k + c) - _triangle(k + c - q) - _triangle(c) + _triangle(c - q)


def _meetings(left: Sequence[Band], right: Sequence[Band]) -> Iterator[tuple[int, int]]:
    """Index pairs of bands whose query ranges overlap, by a sweep along the queries: cheap when few do."""
    events = sorted(
        [(b.q_start, 0, n) for n, b in enumerate(left)] + [(b.q_start, 1, n) for n, b in enumerate(right)]
    )
    bands: tuple[Sequence[Band], Sequence[Band]] = (left, right)
    active: tuple[list[int], list[int]] = ([], [])
    for q_start, side, n in events:
        other = active[1 - side]
        other[:] = [m for m in other if bands[1 - side][m].q_stop > q_start]
        for m in other:
            yield (n, m) if side == 0 else (m, n)
        active[side].append(n)


class BandIndex:
    """Bands that meet a range of queries (or of keys), found by bisection."""

    def __init__(self, bands: Iterable[Band], *, by_key: bool = False) -> None:
        side = "k" if by_key else "q"
        start = attrgetter(f"{side}_start")
        stop = attrgetter(f"{side}_stop")
        self._bands = sorted(bands, key=start)
        self._starts: list[int] = [start(band) for band in self._bands]
        self._furthest_stop: list[int] = list(accumulate(map(stop, self._bands), max))

    def meeting(self, start: int, stop: int) -> list[Band]:
        """Candidates for the range [start, stop): every band that meets it, and maybe a few that do not."""
        return self._bands[bisect_right(self._furthest_stop, start) : bisect_left(self._starts, stop)]


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
        object.__setattr__(self, "q_len", _whole(self.q_len))
        object.__setattr__(self, "k_len", _whole(self.k_len))
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
        for m, n in _meetings(self.bands, self.bands):
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
        pairs = (self.bands[m].intersect(other.bands[n]) for m, n in _meetings(self.bands, other.bands))
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


def _whole(number: int) -> int:
    """A number of tokens as an int.

    NumPy and torch integers pass, 3.7 does not: truncated lengths would shift every document.
    """
    try:
        return index(number)
    except TypeError:
        raise ValueError(f"{number!r} is not a whole number of tokens; pass an int") from None


def full(s: int) -> Mask:
    """Every one of s tokens sees every other (an encoder, a diffusion transformer)."""
    return Mask(s, s, (Band(0, s, 0, s),))


def causal(s: int) -> Mask:
    """Token i of s sees tokens 0..i."""
    return Mask(s, s, (Band(0, s, 0, s, lo=0),))


def sliding_window(s: int, window: int, sink_tokens: int = 0) -> Mask:
    """Token i of s sees the last `window` tokens, itself included, and the first `sink_tokens` tokens.

    The latter are StreamingLLM's attention sinks.

    Raises:
        ValueError: window < 1 or sink_tokens < 0.
    """
    s, window, sink_tokens = _whole(s), _whole(window), _whole(sink_tokens)
    if window < 1 or sink_tokens < 0:
        raise ValueError(
            f"window={window}, sink_tokens={sink_tokens}: a token sees at least itself;"
            " use window >= 1 and sink_tokens >= 0"
        )
    local = Band(0, s, 0, s, lo=0, hi=window - 1)
    return Mask(s, s, (local, Band(0, s, 0, min(sink_tokens, s), lo=window)))


def documents(lengths: Iterable[int], causal: bool = True) -> Mask:
    """Packed documents of the given lengths, one after the other, that never attend to each other.

    Args:
        lengths: tokens of each document, in order; zero is allowed.
        causal: within a document, token i sees tokens up to i (default) or the whole document.

    Raises:
        ValueError: a negative length.
    """
    bands = []
    start = 0
    for length in map(_whole, lengths):
        if length < 0:
            raise ValueError(
                f"document length {length} is negative; pass lengths >= 0 (not cumulative offsets)"
            )
        bands.append(Band(start, start + length, start, start + length, 0 if causal else None))
        start += length
    return Mask(start, start, tuple(bands))


def chunked(s: int, chunk: int) -> Mask:
    """Chunked local causal attention: token i sees tokens up to i of its own chunk of `chunk` tokens.

    Raises:
        ValueError: chunk < 1.
    """
    s, chunk = _whole(s), _whole(chunk)
    if s < 0:
        raise ValueError(f"s={s}: a sequence has at least 0 tokens; pass s >= 0")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: a chunk holds at least one token; use chunk >= 1")
    return documents(min(chunk, s - start) for start in range(0, s, chunk))


def prefix_lm(s: int, prefix: int) -> Mask:
    """The first `prefix` of s tokens see each other fully; the rest are causal and see the whole prefix.

    Raises:
        ValueError: prefix outside 0..s.
    """
    s, prefix = _whole(s), _whole(prefix)
    if not 0 <= prefix <= s:
        raise ValueError(f"prefix={prefix} of a sequence of {s} tokens; use 0 <= prefix <= s")
    return Mask(s, s, (Band(0, s, 0, prefix), Band(prefix, s, prefix, s, lo=0)))


def cross(q_len: int, k_len: int) -> Mask:
    """Cross-attention: every one of q_len queries sees every one of k_len keys."""
    return Mask(q_len, k_len, (Band(0, q_len, 0, k_len),))
