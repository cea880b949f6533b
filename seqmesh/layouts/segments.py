"""Segments of a demand: stretches of tokens that share no pair with the rest, in any of its masks.

Packed documents are one segment each; a causal mask or a window is one segment in all. Ranks that hold
different segments exchange nothing, so `balanced` deals in segments and cuts as few as it can.

    area of a row         /|   /|      .-----       where it never falls (or never rises), a piece with
                         / |  / |   __/             a wanted number of tokens *and* a wanted area is
    tokens           document  window  prefix-LM    found by bisection

Trade-off: a demand whose row area rises and then falls is cut there into two segments, which do exchange
rows: exact, more traffic.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import inf
from typing import NamedTuple

from seqmesh.layouts.demand import Demand, WeightedBand

Run = tuple[int, int]
"""The tokens start <= i < stop."""


class _Knot(NamedTuple):
    """A row at which the course of the area per row changes; up to the next knot it is a straight line."""

    row: int
    area: int
    """Of all rows before it."""
    height: int
    """Area of the row."""
    slope: int
    """By how much each later row has more area than the one before it."""


class _Change(NamedTuple):
    """What a band adds to the course at a row."""

    row: int
    step: int
    """To the area per row."""
    slope_step: int
    """To its slope."""


class RowArea:
    """Area of the rows of some bands: a piecewise straight line, kept by its knots."""

    def __init__(self, start: int, bands: list[WeightedBand]) -> None:
        self._rows = [start]
        self._knots = [_Knot(start, 0, 0, 0)]
        changes: list[_Change] = []
        for band in bands:
            changes += _changes(band)
        for change in sorted(changes):
            last = self._knots[-1]
            rows = change.row - last.row
            knot = _Knot(
                row=change.row,
                area=self.before(change.row),
                height=last.height + last.slope * rows + change.step,
                slope=last.slope + change.slope_step,
            )
            if rows:
                self._knots.append(knot)
                self._rows.append(change.row)
            else:  # several changes at one row are one knot
                self._knots[-1] = knot

    def before(self, row: int) -> int:
        """Area of all rows before this one."""
        knot = self._knots[0]
        if len(self._rows) > 1:
            knot = self._knots[bisect_right(self._rows, row) - 1]
        rows = row - knot.row
        return knot.area + knot.height * rows + knot.slope * (rows * (rows - 1) // 2)

    def turns(self, stop: int) -> Iterator[int]:
        """Rows before `stop` at which a falling area per row starts to rise, or a rising one to fall.

        Between two knots the area changes by the slope, and at a knot it may jump: both count as a course, up
        or down.
        """
        direction = 0  # of the course so far: positive up, negative down, 0 level
        for knot, after in pairwise([*self._knots, _Knot(stop, 0, 0, 0)]):
            rows = after.row - knot.row
            if rows > 1 and knot.slope:
                if knot.slope * direction < 0:
                    yield knot.row
                direction = knot.slope
            if after.row < stop:
                jump = after.height - knot.height - knot.slope * (rows - 1)
            else:
                jump = 0
            if jump * direction < 0:
                yield after.row
                direction = 0
            else:
                direction = direction or jump


def _changes(weighted: WeightedBand) -> Iterator[_Change]:
    """Where the area per row of a trimmed band begins, bends and ends, times its weight.

    A lower bound lets each row see one key more until it sees the last one; an upper bound takes one key from
    each row as soon as the first one is out of reach.
    """
    (q_start, q_stop, k_start, k_stop, lo, hi), weight = weighted
    rising_until = q_start if lo is None else min(q_stop, max(q_start, k_stop + lo - 1))
    falling_from = q_stop if hi is None else min(q_stop, max(q_start, k_start + hi))
    first_key = k_start if hi is None else max(k_start, q_start - hi)
    last_key = k_stop if lo is None else min(k_stop, q_start - lo + 1)
    height = last_key - first_key
    yield _Change(q_start, weight * height, 0)
    if rising_until > q_start:
        yield _Change(q_start, 0, weight)
        yield _Change(rising_until, 0, -weight)
    if falling_from < q_stop:
        yield _Change(falling_from, 0, -weight)
        yield _Change(q_stop, 0, weight)
    final_height = height + (rising_until - q_start) - (q_stop - falling_from)
    yield _Change(q_stop, -weight * final_height, 0)


class Segment:
    """Tokens [start, stop) to be given out: from the head, from the tail, and once from the middle.

    A place in it counts the tokens before it, without those taken from the middle: a hole closes up.
    """

    def __init__(
        self,
        start: int,
        stop: int,
        bands: list[WeightedBand],
        row_area: RowArea | None = None,
        area: int | None = None,
    ) -> None:
        """The segment of some bands; `row_area` and `area` if they are known, as they take time to find."""
        self.start = start
        self.head = 0
        """Place of the first token not yet given out."""
        self.tail = stop - start
        """Place after the last one."""
        self.area = sum(weight * band.area for band, weight in bands) if area is None else area
        """Of the tokens not yet given out."""
        self._bands = bands
        self._row_area = row_area
        self._hole = stop - start
        self._hole_tokens = 0
        self._hole_area = 0

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
        runs = self._runs(first, stop)
        if first == self.head:
            self.head = stop
        else:
            if stop < self.tail:
                assert not self.has_hole
                self._hole = first
                self._hole_tokens = stop - first
                self._hole_area = area
            self.tail -= stop - first
        self.area -= area
        return runs

    def _runs(self, first: int, stop: int) -> list[Run]:
        """The tokens between two places: one run, or two around the hole."""
        runs = []
        if first < self._hole:
            runs.append((self.start + first, self.start + min(stop, self._hole)))
        if stop > self._hole:
            after_hole = self.start + self._hole_tokens
            runs.append((after_hole + max(first, self._hole), after_hole + stop))
        return runs

    def split_ends(self, tokens: int, area: float, tolerance: float) -> int:
        """Of a piece of `tokens` from both ends, how many from the tail bring its area closest to `area`.

        All of them, if that is within tolerance: one run instead of two.
        """
        if abs(self.area_of_ends(0, tokens) - area) <= tolerance:
            return tokens
        return nearest(lambda from_tail: self.area_of_ends(tokens - from_tail, from_tail), 0, tokens, area)

    def find_piece(self, tokens: int, area: float) -> int:
        """Where the consecutive piece of `tokens` begins whose area is closest to `area`."""
        last = self.tail - tokens
        return nearest(lambda first: self.area_between(first, first + tokens), self.head, last, area)


def nearest(function: Callable[[int], float], low: int, high: int, target: float) -> int:
    """The integer in [low, high] where a monotone function is closest to target.

    Interpolation and bisection in turn: the first is quick on the near-parabolas of areas, the second cannot
    get stuck.
    """
    at_low = function(low) - target
    at_high = function(high) - target
    if at_low == 0 or at_low * at_high > 0:  # found, or the target lies outside
        return low if abs(at_low) <= abs(at_high) else high
    interpolates = True
    while high - low > 1:
        if interpolates and abs(at_low) < inf:
            guess = int(low + (high - low) * (at_low / (at_low - at_high)))
        else:
            guess = (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        at_guess = function(guess) - target
        if at_guess * at_low > 0:
            low = guess
            at_low = at_guess
        else:
            high = guess
            at_high = at_guess
        interpolates = not interpolates
    return low if abs(at_low) <= abs(at_high) else high


def segments(demand: Demand) -> list[Segment]:
    """The segments of a demand, in order.

    Tokens that no band touches are segments of no area.
    """
    found: list[Segment] = []
    start = reach = 0  # of the bands that belong together so far
    together: list[WeightedBand] = []
    for first, stop, weighted in _extents(demand):
        if first >= reach:  # it touches nothing that was before
            found.extend(_monotone(start, reach, together))
            if first > reach:
                found.append(Segment(reach, first, []))
            start = first
            together = []
        together.append(weighted)
        reach = max(reach, stop)
    found.extend(_monotone(start, reach, together))
    if reach < demand.q_len:
        found.append(Segment(reach, demand.q_len, []))
    return found


class _Extent(NamedTuple):
    """The tokens first <= i < stop that a band connects."""

    first: int
    stop: int
    weighted: WeightedBand


def _extents(demand: Demand) -> list[_Extent]:
    """What each band connects, in order: its queries, and its keys unless they lie elsewhere."""
    found = []
    for weighted in demand.bands():
        q_start, q_stop, k_start, k_stop, _, _ = weighted.band
        if demand.kv_layout is None:
            found.append(_Extent(min(q_start, k_start), max(q_stop, k_stop), weighted))
        else:
            found.append(_Extent(q_start, q_stop, weighted))
    return sorted(found, key=lambda extent: extent.first)


def _monotone(start: int, stop: int, bands: list[WeightedBand]) -> Iterator[Segment]:
    """The tokens [start, stop) that some bands connect, cut where the area per row turns."""
    if not bands:
        return
    only = bands[0].band
    never_falls = len(bands) == 1 and only.hi is None and only.q_stop == stop
    if never_falls:  # causal and full documents: nearly all segments there are, without the cost of a RowArea
        yield Segment(start, stop, bands)
        return
    rows = RowArea(start, bands)
    for first, last in pairwise([start, *rows.turns(stop), stop]):
        yield Segment(first, last, bands, rows, rows.before(last) - rows.before(first))
