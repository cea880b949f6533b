"""Balanced layouts for any mask, and the choice among the layouts there are.

Long-tailed documents are where fixed layouts lose: on 1M tokens of log-normal documents over 64 ranks the busiest rank of
zigzag computes 3 to 6 times the mean. `balance` deals out whole segments and cuts only the ones that it has to (filling.py),
so that every rank has equal tokens and, to half a percent, equal area.

    documents     A A A A A A A A A A A A A A A A A A A A|B B B B B B|C C C|D D|E     busiest rank's area / mean
    contiguous    0 0 0 0 0 0 0 0 1 1 1 1 1 1 1 1 2 2 2 2 2 2 2 2 3 3 3 3 3 3 3 3     1.66
    zigzag        0 0 0 0 1 1 1 1 2 2 2 2 3 3 3 3 3 3 3 3 2 2 2 2 1 1 1 1 0 0 0 0     2.19
    balanced      0 0 0 0 0 0 1 1 1 2 2 3 3 3 2 2 1 1 0 0 2 3 3 3 3 3 2 2 2 1 1 1     1.05

The result is compared with contiguous and zigzag by the busiest rank's area + pairs_per_row * rows received, and the cheapest wins.

Where it sits: pure Python, on masks, layouts, segments, filling and load; offered as `layouts.balanced` and `layouts.auto`.

Trade-off: it fills rank after rank without looking back; the best split of the longest segment is exact for causal ones only.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import inf

from seqmesh import layouts, load
from seqmesh.filling import TOLERANCE, Pool, fill
from seqmesh.layouts import Layout
from seqmesh.masks import Mask
from seqmesh.segments import segments

AS_GOOD = 1.02
"""`auto` takes a simpler layout whose busiest rank costs no more than this, in parts of the best."""

NEGLIGIBLE_ROWS = 0.01
"""Rows received, in parts of a rank's tokens, that are not worth a better layout."""

HEAD_ROOM = 0.92
"""Part of what `_level` finds that the ranks can spare: whole short documents do not add up to exactly what it asks for."""


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """A layout and the most that one of its ranks computes (pairs), receives (rows), and both (pairs)."""

    layout: Layout
    area: int
    rows: int
    cost: float


def balance(mask: Mask, ring: int, pairs_per_row: float) -> Layout:
    """The layout of `layouts.balanced`: whole segments and shares of the longest, or contiguous or zigzag where those cost less."""
    best = _balance(mask, ring, pairs_per_row)
    mean = mask.area / ring or 1.0
    how = best.layout.reason if best.layout.name == "balanced" else f"same as {best.layout.name}, which costs no more"
    reason = f"{how}: the busiest rank computes {best.area / mean:.3f}x the mean area, none receives more than {best.rows} rows"
    return Layout(best.layout.s, best.layout.ranks, "balanced", reason)


def auto(mask: Mask, ring: int, pairs_per_row: float) -> Layout:
    """The layout of `layouts.auto`."""
    best = _balance(mask, ring, pairs_per_row)
    mean = mask.area / ring or 1.0
    found = f"balanced {best.area / mean:.2f}x and at most {best.rows} rows received"
    for fixed in (layouts.contiguous(mask.q_len, ring), layouts.zigzag(mask.q_len, ring)):
        measured = _measure(mask, fixed, pairs_per_row, AS_GOOD * best.cost)
        if measured is not None:
            reason = (
                f"{fixed.name} is as good, {measured.area / mean:.2f}x the mean area and at most {measured.rows} rows received; {found}"
            )
            return Layout(fixed.s, fixed.ranks, fixed.name, reason)
    zigzag = _measure(mask, layouts.zigzag(mask.q_len, ring), pairs_per_row, inf)
    assert zigzag is not None
    reason = f"zigzag would leave the busiest rank {zigzag.area / mean:.2f}x the mean area and {zigzag.rows} rows received; {found}"
    return Layout(mask.q_len, best.layout.ranks, "balanced", reason)


def _balance(mask: Mask, ring: int, pairs_per_row: float) -> _Measured:
    """The cheapest layout found; contiguous at once where there is next to nothing to gain."""
    _check(mask, ring, pairs_per_row)
    contiguous, zigzag = layouts.contiguous(mask.q_len, ring), layouts.zigzag(mask.q_len, ring)
    enough = (1 + TOLERANCE) * mask.area / ring + pairs_per_row * NEGLIGIBLE_ROWS * mask.q_len / ring
    if (measured := _measure(mask, contiguous, pairs_per_row, enough)) is not None:
        return measured
    best = _pack(mask, ring, pairs_per_row)
    for fixed in (zigzag, contiguous):
        best = _measure(mask, fixed, pairs_per_row, best.cost) or best
    return best


def _check(mask: Mask, ring: int, pairs_per_row: float) -> None:
    if mask.q_len != mask.k_len:
        raise ValueError(
            f"a mask of {mask.q_len} queries x {mask.k_len} keys, but a rank holds the queries and the keys of the same tokens;"
            " use a mask of equally many queries and keys, or lay out each side by itself (layouts.contiguous)"
        )
    if ring < 1 or not 0 <= pairs_per_row < inf:
        raise ValueError(f"ring={ring}, pairs_per_row={pairs_per_row}: use ring >= 1 and a finite pairs_per_row >= 0")


def _measure(mask: Mask, layout: Layout, pairs_per_row: float, limit: float) -> _Measured | None:
    """A layout's busiest ranks, or None as soon as one rank's cost is above the limit."""
    most_area, most_rows, most_cost = 0, 0, 0.0
    for spans in layout.ranks:
        area = load.area(mask, spans)
        if area > limit:
            return None
        rows = load.rows(mask, spans)
        cost = area + pairs_per_row * rows
        if cost > limit:
            return None
        most_area, most_rows, most_cost = max(most_area, area), max(most_rows, rows), max(most_cost, cost)
    return _Measured(layout=layout, area=most_area, rows=most_rows, cost=most_cost)


def _pack(mask: Mask, ring: int, pairs_per_row: float) -> _Measured:
    """Equal tokens, and each rank the average area of what is left when its turn comes."""
    parts, runs, areas = segments(mask), [], []
    counts = [stop - start for start, stop in pairwise(layouts.split_evenly(mask.q_len, ring))]
    longest = max((part.tokens for part in parts), default=0)
    pool = Pool(parts, _level(longest, mask.area / ring, mask.q_len / ring))
    slack = TOLERANCE * mask.area / ring
    for left, count in zip(range(sum(map(bool, counts)), 0, -1), counts, strict=False):
        before = pool.area
        runs.append(sorted(fill(pool, count, before / left, slack)))
        areas.append(before - pool.area)
    runs.extend([] for _ in range(ring - len(runs)))
    layout = layouts.from_runs(mask.q_len, runs, "balanced", f"{len(parts)} segments, whole where they fit")
    rows = load.rows_received(mask, layout)
    cost = max((pairs + pairs_per_row * received for pairs, received in zip(areas, rows, strict=False)), default=0.0)
    return _Measured(layout=layout, area=max(areas, default=0), rows=max(rows), cost=cost)


def _level(length: int, area: float, tokens: float) -> float:
    """The fewest rows that the busiest rank receives of a causal segment, when every rank has this area and so many tokens.

    The rank of rows up to b receives b less what it holds. It can hold more in place of a few heavy rows of the tail by taking
    light ones from the head; but what one takes the next lacks. Bisection on the number held by the first rank.
    """
    low, high = 0.0, min(tokens, length)
    for _ in range(16):
        held = (low + high) / 2
        low, high = (held, high) if _reaches(length - held, length, area) else (low, held)
    return length - HEAD_ROOM * low


def _reaches(level: float, length: float, area: float) -> bool:
    """Whether ranks of equal area can share a causal segment, tail by tail, so that none receives more rows than `level`."""
    head, tail = 0.0, float(length)
    while True:
        held = tail - level
        if held * (head + tail) <= 2 * area:  # no more than an equal share of the rest
            return True
        if head + held >= tail:
            return False
        from_tail = (area - held * (head + held / 2)) / (tail - head - held)
        if from_tail <= 0 or from_tail > held:
            return False
        head, tail = head + held - from_tail, tail - from_tail
