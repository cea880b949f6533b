"""A band: a rectangle of (query, key) pairs, cut by at most two diagonals.

    key j ->    no bound       lo=0           lo=0, hi=1     hi=-1
    query i     X X X X        X . . .        X . . .        . X X X
       |        X X X X        X X . .        X X . .        . . X X
       v        X X X X        X X X .        . X X .        . . . X

Bands are closed under intersection and shift, and their area is a closed form.
"""

from collections.abc import Callable
from typing import NamedTuple


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

    def keys_seen(self, q_start: int, q_stop: int) -> tuple[int, int] | None:
        """The keys [start, stop) that some query of a range sees by this band, which is trimmed.

        What `within` says, in a fraction of its time.
        """
        first = max(self.q_start, q_start)
        last = min(self.q_stop, q_stop) - 1
        if first > last:
            return None
        # Every row of a trimmed band has a key, and those of neighbouring rows touch.
        start = self.k_start if self.hi is None else max(self.k_start, first - self.hi)
        stop = self.k_stop if self.lo is None else min(self.k_stop, last - self.lo + 1)
        return start, stop

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
