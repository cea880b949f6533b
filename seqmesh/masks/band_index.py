"""Finding the bands that meet: two sets of bands by a sweep, a range of rows by bisection.

    q_start of the bands     0    4    9    12             rows [5, 10)  ->  every band that starts before 10
    furthest stop so far     4    9    12   16                              and after which some band still
                                  ^----------^                              reaches beyond 5

Both cost what they find, and a logarithm: packed documents, thousands of them, are never all looked at.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from operator import attrgetter

from seqmesh.masks.band import Band


def meetings(left: Sequence[Band], right: Sequence[Band]) -> Iterator[tuple[int, int]]:
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
