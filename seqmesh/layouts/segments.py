"""Segments of a mask: stretches of tokens that share no pair with the rest, and pieces of them with a wanted
size and area.

Packed documents are one segment each; a causal mask or a window is one segment in all. Ranks that hold
different segments exchange nothing, so `balance` deals in segments and cuts as few as it can.

    area of a row         /|   /|      .-----
                         / |  / |   __/              where it never falls (or never rises), a piece with a wanted number of
    tokens           document  window  prefix-LM     tokens *and* a wanted area is found by bisection

Trade-off: a mask whose row area rises and then falls is cut there into two segments, which do exchange rows:
exact, more traffic.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import inf

from seqmesh.masks import Band, Mask

Run = tuple[int, int]
"""The tokens start <= i < stop."""


class RowArea:
    """Area of the rows of some bands, kept where its course changes: (row, area before it, area of the row,
    slope from it on).
    """

    def __init__(self, start: int, bands: list[Band]) -> None:
        self._rows, self._knots = [start], [(start, 0, 0, 0)]
        for row, step, slope_step in sorted(change for band in bands for change in _changes(band)):
            knot_row, _, height, slope = self._knots[-1]
            rows = row - knot_row
            knot = (row, self.before(row), height + slope * rows + step, slope + slope_step)
            if rows:
                self._knots.append(knot)
                self._rows.append(row)
            else:
                self._knots[-1] = knot

    def before(self, row: int) -> int:
        """Area of all rows before this one."""
        knot_row, area, height, slope = (
            self._knots[bisect_right(self._rows, row) - 1] if len(self._rows) > 1 else self._knots[0]
        )
        rows = row - knot_row
        return area + height * rows + slope * (rows * (rows - 1) // 2)

    def turns(self, stop: int) -> Iterator[int]:
        """Rows before `stop` at which a falling area per row starts to rise, or a rising one to fall."""
        direction = 0
        for (row, _, height, slope), (next_row, _, next_height, _) in pairwise(
            [*self._knots, (stop, 0, 0, 0)]
        ):
            if next_row - row > 1 and slope:
                if slope * direction < 0:
                    yield row
                direction = slope
            step = next_height - height - slope * (next_row - row - 1) if next_row < stop else 0
            if step * direction < 0:
                yield next_row
                direction = 0
            else:
                direction = direction or step


def _changes(band: Band) -> Iterator[tuple[int, int, int]]:
    """(row, step of the area per row, step of its slope) where a trimmed band begins, bends and ends."""
    q_start, q_stop, k_start, k_stop, lo, hi = band
    rising_until = q_start if lo is None else min(q_stop, max(q_start, k_stop + lo - 1))
    falling_from = q_stop if hi is None else min(q_stop, max(q_start, k_start + hi))
    height = (k_stop if lo is None else min(k_stop, q_start - lo + 1)) - (
        k_start if hi is None else max(k_start, q_start - hi)
    )
    yield q_start, height, 0
    if rising_until > q_start:
        yield q_start, 0, 1
        yield rising_until, 0, -1
    if falling_from < q_stop:
        yield falling_from, 0, -1
        yield q_stop, 0, 1
    yield q_stop, -(height + (rising_until - q_start) - (q_stop - falling_from)), 0


class Segment:
    """Tokens [start, stop) to be given out: from the head, from the tail, and once from the middle.

    A place in it counts the tokens before it, without those taken from the middle: a hole closes up.
    """

    def __init__(
        self,
        start: int,
        stop: int,
        bands: list[Band],
        row_area: RowArea | None = None,
        area: int | None = None,
    ) -> None:
        self.start, self.head, self.tail = start, 0, stop - start
        self._bands, self._row_area = bands, row_area
        self.area = sum(band.area for band in bands) if area is None else area
        self._hole, self._hole_tokens, self._hole_area = stop - start, 0, 0

    @property
    def tokens(self) -> int:
        """Tokens not yet given out."""
        return self.tail - self.head

    @property
    def reach(self) -> int:
        """Tokens from the beginning to the last one not yet given out."""
        return self.tail + (self._hole_tokens if self.tail > self._hole else 0)

    @property
    def has_hole(self) -> bool:
        """Whether a piece from the middle is gone, so that no other one can be taken there."""
        return self._hole_tokens > 0

    def area_before(self, place: int) -> int:
        """Area of the tokens before a place, up to a constant."""
        if self._row_area is None:
            self._row_area = RowArea(self.start, self._bands)
        if place <= self._hole:
            return self._row_area.before(self.start + place)
        return self._row_area.before(self.start + place + self._hole_tokens) - self._hole_area

    def area_between(self, first: int, stop: int) -> int:
        """Area of the tokens between two places."""
        return self.area_before(stop) - self.area_before(first)

    def area_of_ends(self, from_head: int, from_tail: int) -> int:
        """Area of so many tokens of the head and so many of the tail."""
        return self.area_between(self.head, self.head + from_head) + self.area_between(
            self.tail - from_tail, self.tail
        )

    def can_give(self, tokens: int, area: float, tolerance: float) -> bool:
        """Whether some piece of `tokens` from both ends has this area."""
        if not 0 <= tokens <= self.tokens:
            return False
        low, high = sorted((self.area_of_ends(tokens, 0), self.area_of_ends(0, tokens)))
        return low - tolerance <= area <= high + tolerance

    def take(self, first: int, stop: int) -> list[Run]:
        """Give out the tokens between two places."""
        if first == stop:
            return []
        area = self.area_between(first, stop) if stop - first < self.tokens else self.area
        runs = [(self.start + first, self.start + min(stop, self._hole))] if first < self._hole else []
        if stop > self._hole:
            runs.append(
                (
                    self.start + max(first, self._hole) + self._hole_tokens,
                    self.start + stop + self._hole_tokens,
                )
            )
        if first == self.head:
            self.head = stop
        else:
            if stop < self.tail:
                assert not self.has_hole
                self._hole, self._hole_tokens, self._hole_area = first, stop - first, area
            self.tail -= stop - first
        self.area -= area
        return runs

    def split_ends(self, tokens: int, area: float, tolerance: float) -> int:
        """Of a piece of `tokens` from both ends, how many from the tail bring its area closest to `area`;
        all, if within tolerance.
        """
        if abs(self.area_of_ends(0, tokens) - area) <= tolerance:
            return tokens
        return nearest(lambda from_tail: self.area_of_ends(tokens - from_tail, from_tail), 0, tokens, area)

    def find_piece(self, tokens: int, area: float) -> int:
        """Where the consecutive piece of `tokens` begins whose area is closest to `area`."""
        return nearest(
            lambda first: self.area_between(first, first + tokens), self.head, self.tail - tokens, area
        )


def nearest(function: Callable[[int], float], low: int, high: int, target: float) -> int:
    """The integer in [low, high] where a monotone function is closest to target, by interpolation and
    bisection in turn.
    """
    at_low, at_high = function(low) - target, function(high) - target
    if at_low == 0 or at_low * at_high > 0:
        return low if abs(at_low) <= abs(at_high) else high
    interpolate = True
    while high - low > 1:
        guess = (
            int(low + (high - low) * (at_low / (at_low - at_high)))
            if interpolate and abs(at_low) < inf
            else (low + high) // 2
        )
        guess = min(max(guess, low + 1), high - 1)
        at_guess = function(guess) - target
        if at_guess * at_low > 0:
            low, at_low = guess, at_guess
        else:
            high, at_high = guess, at_guess
        interpolate = not interpolate
    return low if abs(at_low) <= abs(at_high) else high


def segments(mask: Mask) -> list[Segment]:
    """The segments of a mask of equally many queries and keys, in order; tokens that no band touches are
    segments of no area.
    """
    found: list[Segment] = []
    reach, together = 0, list[Band]()
    start = 0
    for band in sorted(mask.bands, key=lambda b: min(b.q_start, b.k_start)):
        first = min(band.q_start, band.k_start)
        if first >= reach:
            found.extend(_monotone(start, reach, together))
            if first > reach:
                found.append(Segment(reach, first, []))
            start, together = first, []
        together.append(band)
        reach = max(reach, band.q_stop, band.k_stop)
    found.extend(_monotone(start, reach, together))
    if reach < mask.q_len:
        found.append(Segment(reach, mask.q_len, []))
    return found


def _monotone(start: int, stop: int, bands: list[Band]) -> Iterator[Segment]:
    """The tokens [start, stop) that some bands connect, cut where the area per row turns."""
    if not bands:
        return
    if (
        len(bands) == 1 and bands[0].hi is None and bands[0].q_stop == stop
    ):  # never falls: causal and full documents
        yield Segment(start, stop, bands)
        return
    rows = RowArea(start, bands)
    for first, last in pairwise([start, *rows.turns(stop), stop]):
        yield Segment(first, last, bands, rows, rows.before(last) - rows.before(first))
