"""Balanced layouts, for any mask: equal tokens, near-equal area, few rows received.

Long-tailed documents are where fixed layouts lose: on 1M tokens of log-normal documents over 64 ranks the
busiest rank of zigzag computes 4 to 5 times the mean (docs/measured.md). `balanced` deals out whole segments
and cuts only the ones that it has to (filling.py), so that every rank has equal tokens and, to half a
percent, equal area.

    documents     A A A A A A A A A A A A A A A A A A A A|B B B B B B|C C C|D D|E     busiest area / mean
    contiguous    0 0 0 0 0 0 0 0 1 1 1 1 1 1 1 1 2 2 2 2 2 2 2 2 3 3 3 3 3 3 3 3     1.66
    zigzag        0 0 0 0 1 1 1 1 2 2 2 2 3 3 3 3 3 3 3 3 2 2 2 2 1 1 1 1 0 0 0 0     2.19
    balanced      0 0 0 0 0 0 1 1 1 2 2 3 3 3 2 2 1 1 0 0 2 3 3 3 3 3 2 2 2 1 1 1     1.05

The result is compared with contiguous and zigzag by the busiest rank's area + pairs_per_row * rows received,
and the cheapest wins.

Trade-off: it fills rank after rank without looking back; the best split of the longest segment is exact for
causal ones only.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import inf

from seqmesh.layouts import load
from seqmesh.layouts.filling import TOLERANCE, Pool, fill
from seqmesh.layouts.fixed import contiguous, zigzag
from seqmesh.layouts.layout import Layout, check_degrees, from_runs, split_evenly
from seqmesh.layouts.segments import Run, segments
from seqmesh.masks import Mask

DEFAULT_PAIRS_PER_ROW = 1000.0
"""Default exchange rate of `balanced`: (query, key) pairs computed while one K/V row travels.

One row is 4 g d bytes (K and V, bf16) and one pair 4 h d FLOPs, so the rate is F g / (B h) for F FLOP/s and B
bytes/s one way: about 1000 for 200 TFLOP/s, 50 GB/s and 4 query heads per K/V head.
"""

NEGLIGIBLE_ROWS = 0.01
"""Rows received, in parts of a rank's tokens, that are not worth a better layout."""

HEAD_ROOM = 0.92
"""Share that is asked for of the rows that `_lowest_level` finds a rank able to hold.

Whole short documents rarely add up to exactly the tokens and the area that it would need beside them.
"""

BISECTIONS = 16
"""Steps of the search in `_lowest_level`: to 1/65536 of a rank's tokens."""


@dataclass(frozen=True, kw_only=True)
class Busiest:
    """A layout and the most that one of its ranks computes (pairs), receives (rows), and both (pairs)."""

    layout: Layout
    area: int
    rows: int
    cost: float


def balanced(mask: Mask, ring: int, *, pairs_per_row: float = DEFAULT_PAIRS_PER_ROW) -> Layout:
    """Equal token counts, near-equal area and few rows moved, for any mask.

    Made for long-tailed packed documents.

    Minimises the busiest rank's `area + pairs_per_row * rows received` over a family of layouts, contiguous
    and zigzag among them.

    Args:
        mask: a mask of s queries and s keys.
        ring: ring degree.
        pairs_per_row: (query, key) pairs that one rank computes in the time in which one K/V row travels.

    Raises:
        ValueError: a mask whose q_len and k_len differ, ring < 1 or pairs_per_row < 0.
    """
    best = best_layout(mask, ring, pairs_per_row)
    mean = mask.area / ring or 1.0
    if best.layout.name == "balanced":
        how = best.layout.reason
    else:
        how = f"same as {best.layout.name}, which costs no more"
    reason = (
        f"{how}: the busiest rank computes {best.area / mean:.3f}x the mean area,"
        f" none receives more than {best.rows} rows"
    )
    return Layout(best.layout.s, best.layout.ranks, "balanced", reason)


def best_layout(mask: Mask, ring: int, pairs_per_row: float) -> Busiest:
    """The cheapest of contiguous, zigzag and the dealt-out segments.

    Contiguous at once where there is next to nothing to gain.

    Raises:
        ValueError: as of `balanced`.
    """
    _check(mask, ring, pairs_per_row)
    enough = (1 + TOLERANCE) * mask.area / ring + pairs_per_row * NEGLIGIBLE_ROWS * mask.q_len / ring
    simplest = busiest(mask, contiguous(mask.q_len, ring), pairs_per_row, limit=enough)
    if simplest is not None:
        return simplest
    best = _deal(mask, ring, pairs_per_row)
    for fixed in (zigzag(mask.q_len, ring), contiguous(mask.q_len, ring)):
        best = busiest(mask, fixed, pairs_per_row, limit=best.cost) or best
    return best


def _check(mask: Mask, ring: int, pairs_per_row: float) -> None:
    check_degrees(mask.q_len, ring)
    if mask.q_len != mask.k_len:
        raise ValueError(
            f"a mask of {mask.q_len} queries x {mask.k_len} keys,"
            " but a rank holds the queries and the keys of the same tokens;"
            " use a mask of equally many queries and keys,"
            " or lay out each side by itself (layouts.contiguous)"
        )
    if not 0 <= pairs_per_row < inf:
        raise ValueError(
            f"ring={ring}, pairs_per_row={pairs_per_row}: use ring >= 1 and a finite pairs_per_row >= 0"
        )


def busiest(mask: Mask, layout: Layout, pairs_per_row: float, limit: float) -> Busiest | None:
    """A layout's busiest ranks, or None as soon as one rank's cost is above the limit."""
    most_area = most_rows = 0
    most_cost = 0.0
    for spans in layout.ranks:
        area = load.area(mask, spans)
        if area > limit:  # saves counting rows, which is the slower part
            return None
        rows = load.rows(mask, spans)
        cost = area + pairs_per_row * rows
        if cost > limit:
            return None
        most_area = max(most_area, area)
        most_rows = max(most_rows, rows)
        most_cost = max(most_cost, cost)
    return Busiest(layout=layout, area=most_area, rows=most_rows, cost=most_cost)


def _deal(mask: Mask, ring: int, pairs_per_row: float) -> Busiest:
    """Segments dealt out rank after rank, each with equal tokens.

    A rank gets the average area of what is left when its turn comes.
    """
    parts = segments(mask)
    counts = [stop - start for start, stop in pairwise(split_evenly(mask.q_len, ring))]
    longest = max((part.tokens for part in parts), default=0)
    pool = Pool(parts, _lowest_level(longest, mask.area / ring, mask.q_len / ring))
    slack = TOLERANCE * mask.area / ring
    runs: list[list[Run]] = []
    areas: list[int] = []
    ranks_left = sum(count > 0 for count in counts)
    for count in counts[:ranks_left]:  # with more ranks than tokens the last ones get nothing
        before = pool.area
        runs.append(sorted(fill(pool, count, before / ranks_left, slack)))
        areas.append(before - pool.area)
        ranks_left -= 1
    runs.extend([] for _ in range(ring - len(runs)))
    layout = from_runs(mask.q_len, runs, "balanced", f"{len(parts)} segments, whole where they fit")
    received = load.rows_received(mask, layout)
    costs = [area + pairs_per_row * rows for area, rows in zip(areas, received, strict=False)]
    return Busiest(
        layout=layout, area=max(areas, default=0), rows=max(received), cost=max(costs, default=0.0)
    )


def _lowest_level(length: int, area: float, tokens: float) -> float:
    """The fewest rows that the busiest rank need receive of one causal segment of `length` tokens.

    Every rank is to have this area and so many tokens. docs/layouts.md, "How far balance reaches", derives
    it: a rank that holds the segment's last row receives `length` rows less what it holds, so the level falls
    with what the first rank holds, and the most that it can hold is found by bisection.
    """
    possible, impossible = 0.0, min(tokens, length)
    for _ in range(BISECTIONS):
        held = (possible + impossible) / 2
        if _reaches(length - held, length, area):
            possible = held
        else:
            impossible = held
    return length - HEAD_ROOM * possible


def _reaches(level: float, length: float, area: float) -> bool:
    """Whether ranks of equal area can share a causal segment with none receiving more rows than `level`.

    Row i of the segment has an area of about i. What is left of it are the rows [head, tail); the next rank
    takes the last of them, so it must hold tail - level rows: some from the tail, which are heavy, and the
    others from the head, which are light.
    """
    head, tail = 0.0, float(length)
    while True:
        held = tail - level
        # By area, an equal share of the rest is at least as many rows: every later rank has enough.
        if held * (head + tail) / 2 <= area:
            return True
        if head + held >= tail:
            return False
        # All from the head would have held * (head + held / 2); each row from the tail in place of one adds
        # tail - head - held.
        from_tail = (area - held * (head + held / 2)) / (tail - head - held)
        if from_tail <= 0 or from_tail > held:
            return False
        head = head + held - from_tail
        tail = tail - from_tail
