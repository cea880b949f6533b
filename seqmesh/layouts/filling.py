"""Filling ring ranks with segments, one rank after the other.

Each gets exactly its tokens, and its area.

Segments lie sorted by area per token. A rank takes from both ends of that order: the heaviest segments for
area, the lightest for tokens. Whole ones cost no traffic. The heaviest that does not fit is cut, and because
its head is light and its tail heavy, a piece of it with any number of tokens has the area that is still
missing.

    lightest   . : | : | | |  . . .  | |    heaviest      rank 0   a third of D, and a few short documents
               ^ whole, for tokens     ^ cut, for area    rank 1   the next third of D, and the next ones

    cut on a rank of its own:  both ends         D  |00|11|22|....|2|1|0|      zigzag, if D were all there is
    cut to top up a rank:      one inner piece   D  |..|33|............|       sees few keys, unlike a tail

Every rank takes the average of what is left, so what is left always suffices, and the last rank comes out
like the first.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import inf

from seqmesh.layouts.segments import Run, Segment, nearest

TOLERANCE = 0.005
"""Area that a rank may lack or exceed, in parts of the mean, to keep a segment whole or a piece in one run.
"""

ROUNDING = 0.125
"""Tokens that the cut segment may give more or fewer than its share, to keep a light one whole.

In parts of the rank's tokens.
"""

UNSETTLED = 0.01
"""Sort again when the area per token at either end is this far on the wrong side of what is needed."""


class Pool:
    """The segments not yet given out, by area per token: the last is the heaviest, the others are light.

    `area` is what is left of it; `level` is how few rows the busiest rank can at best receive
    (docs/layouts.md, "How far balance reaches"): fewer for another rank gain nothing.
    """

    def __init__(self, segments: Sequence[Segment], level: float) -> None:
        self.area = sum(segment.area for segment in segments)
        self.level = level
        self._arrange(segments)

    def _arrange(self, segments: Sequence[Segment]) -> None:
        """Sort, and add up tokens and area from the lightest on.

        Then any stretch of light segments is two look-ups.
        """
        not_empty = (segment for segment in segments if segment.tokens)
        self._order = sorted(not_empty, key=lambda segment: (segment.area / segment.tokens, -segment.start))
        self._tokens = list(accumulate((segment.tokens for segment in self._order), initial=0))
        self._area = list(accumulate((segment.area for segment in self._order), initial=0))
        self._low = 0
        self._high = len(self._order) - 1

    def settle(self, intensity: float) -> None:
        """Sort again if the order is out of date.

        Cuts change the area per token of what is left of a segment. It matters when the lightest has become
        heavier than what is needed next, or the heaviest lighter: then an end of the order no longer does its
        part.
        """
        light = self._order[self._low]
        heavy = self._order[self._high]
        too_heavy = light.area > (1 + UNSETTLED) * intensity * light.tokens
        too_light = heavy.area < (1 - UNSETTLED) * intensity * heavy.tokens
        if too_heavy or too_light:
            self._arrange(self._order[self._low : self._high + 1])

    @property
    def heaviest(self) -> Segment:
        """The segment of the most area per token, the one that is cut."""
        return self._order[self._high]

    @property
    def lights(self) -> Iterator[Segment]:
        """The other segments, lightest first."""
        return (self._order[at] for at in range(self._low, self._high))

    def light_area(self, tokens: int) -> int:
        """Area of the lightest `tokens` tokens, those of the heaviest segment left out."""
        if self._low >= self._high or tokens <= 0:
            return 0
        first = self._order[self._low]
        if tokens < first.tokens:
            return first.area_between(first.head, first.head + tokens)
        # The sums were made when `first` was whole; since then it may have lost its head, so it is counted
        # apart.
        wanted = self._tokens[self._low + 1] - first.tokens + tokens
        at = min(bisect_right(self._tokens, wanted) - 1, self._high)
        whole = first.area + self._area[at] - self._area[self._low + 1]
        if at == self._high:
            return whole
        cut = self._order[at]
        return whole + cut.area_between(cut.head, cut.head + wanted - self._tokens[at])

    def whole_lights(self, most: int) -> int:
        """Tokens of the lightest whole segments that together have no more than `most`."""
        tokens = 0
        for light in self.lights:
            if tokens + light.tokens > most:
                break
            tokens += light.tokens
        return tokens

    def take_piece(self, first: int, stop: int) -> list[Run]:
        """Give out the tokens of the heaviest between two places."""
        heavy = self.heaviest
        runs = self._take(heavy, first, stop)
        self._drop_heaviest_if_empty()
        return runs

    def take_ends(self, from_head: int, from_tail: int) -> list[Run]:
        """Give out so many tokens of the heaviest's head, and of its tail."""
        heavy = self.heaviest
        runs = self._take(heavy, heavy.tail - from_tail, heavy.tail)
        runs += self._take(heavy, heavy.head, heavy.head + from_head)
        self._drop_heaviest_if_empty()
        return runs

    def take_lightest(self, tokens: int) -> list[Run]:
        """Give out the lightest `tokens` tokens; a segment that has to be cut gives its head."""
        runs: list[Run] = []
        while tokens:
            light = self._order[self._low]
            given = min(tokens, light.tokens)
            runs += self._take(light, light.head, light.head + given)
            tokens -= given
            if not light.tokens:
                self._low += 1
        return runs

    def _take(self, segment: Segment, first: int, stop: int) -> list[Run]:
        before = segment.area
        runs = segment.take(first, stop)
        self.area -= before - segment.area
        return runs

    def _drop_heaviest_if_empty(self) -> None:
        if not self.heaviest.tokens:
            self._high -= 1


def fill(pool: Pool, tokens: int, area: float, slack: float) -> list[Run]:
    """Take `tokens` tokens out of the pool, with `area` as closely as it goes.

    Up to `slack` more or less area where that keeps things whole.
    """
    runs: list[Run] = []
    pool.settle(area / tokens)
    while tokens and _fits(pool, tokens, area + slack):
        whole = pool.heaviest
        tokens -= whole.tokens
        area -= whole.area
        runs += pool.take_ends(whole.tokens, 0)
    if tokens:
        runs += _top_up(pool, tokens, area, slack) if runs else _share(pool, tokens, area, slack)
    return runs


def _fits(pool: Pool, tokens: int, area: float) -> bool:
    """Whether the heaviest segment, with the lightest ones beside it, keeps within `area`."""
    heavy = pool.heaviest
    return heavy.tokens <= tokens and heavy.area + pool.light_area(tokens - heavy.tokens) <= area


def _share(pool: Pool, tokens: int, area: float, slack: float) -> list[Run]:
    """Both ends of the heaviest segment, and light ones.

    Each rank gets an equal part of the segment, but more where the last rows would otherwise receive more
    than the pool's level: as much as its area allows, or half way there.
    """
    heavy = pool.heaviest
    rate = heavy.area / heavy.tokens
    light = _light_beside(pool, tokens, area, slack, lambda part: rate * part)
    # What must be held of the segment for its last row to receive no more than the level; the rest may be
    # light.
    least = min(tokens, heavy.tokens, max(0, heavy.reach - int(pool.level)))
    for most in (tokens - least, (tokens - least + light) // 2):
        fewer = pool.whole_lights(most) if most < light else light
        part = tokens - fewer
        # Even all from its light head, the part may have too much area beside the light segments.
        if part <= heavy.tokens and heavy.area_of_ends(part, 0) <= area - pool.light_area(fewer):
            light = fewer
            break
    left_after = pool.area - area
    runs = pool.take_lightest(light)
    if light < tokens:
        missing = pool.area - left_after  # area
        from_tail = heavy.split_ends(tokens - light, missing, slack)
        runs += pool.take_ends(tokens - light - from_tail, from_tail)
    return runs


def _top_up(pool: Pool, tokens: int, area: float, slack: float) -> list[Run]:
    """One piece of the heaviest segment, as near to its head as has the area, and light ones.

    The nearer to the head, the fewer keys it sees, which a rank that already has whole segments would
    receive.
    """
    heavy = pool.heaviest
    if heavy.has_hole:  # only one piece is ever taken out of the middle of a segment
        return _share(pool, tokens, area, slack)

    def least_area(part: int) -> float:
        return heavy.area_of_ends(part, 0) if part <= heavy.tokens else inf

    light = _light_beside(pool, tokens, area, slack, least_area)
    left_after = pool.area - area
    runs = pool.take_lightest(light)
    if light < tokens:
        first = heavy.find_piece(tokens - light, pool.area - left_after)
        runs += pool.take_piece(first, first + tokens - light)
    return runs


def _light_beside(
    pool: Pool, tokens: int, area: float, slack: float, heavy_area: Callable[[int], float]
) -> int:
    """How many of `tokens` tokens are light, so that with a part of the heaviest segment they have `area`.

    `heavy_area(part)` is the area of a part of so many tokens. Light segments stay whole where another part
    of the heaviest can make up for the small difference, to within `slack` of the area.
    """
    heavy = pool.heaviest
    if heavy_area(tokens) <= area:  # nothing light is needed, unless the segment is too short
        return max(0, tokens - heavy.tokens)
    light = light_area = 0
    for segment in pool.lights:
        after = light + segment.tokens
        if after > tokens or heavy_area(tokens - after) + light_area + segment.area <= area:
            break
        light = after
        light_area += segment.area
    else:
        return max(light, tokens - heavy.tokens)

    # With this segment the area falls below what is wanted: the exact number of light tokens cuts it.
    def area_with(head: int) -> float:
        of_segment = segment.area_between(segment.head, segment.head + head)
        return heavy_area(tokens - light - head) + light_area + of_segment

    part = nearest(area_with, 0, min(segment.tokens, tokens - light), area)
    # Leaving this segment out, or taking it whole, moves the cut into the heaviest: fewer tokens moved first.
    # (tokens moved, light tokens, their area)
    choices = [(part, light, light_area)]
    if after <= tokens:
        choices.append((segment.tokens - part, after, light_area + segment.area))
    for moved, whole, whole_area in sorted(choices):
        if moved <= ROUNDING * tokens and heavy.can_give(tokens - whole, area - whole_area, slack):
            return whole
    return max(light + part, tokens - heavy.tokens)
