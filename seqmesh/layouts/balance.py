"""Balanced layouts, for any mask or several: equal tokens, near-equal area, few rows received.

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

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from seqmesh.layouts.demand import Demand
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
    """A layout, and the most that a rank computes (pairs), receives (rows), and both (pairs), in all layers.

    The busiest ranks of two masks may be different ones: all wait for each of them, so they add up.
    """

    layout: Layout
    area: int
    rows: int
    cost: float


def balanced(
    mask: Mask | Sequence[Mask],
    ring: int,
    *,
    weights: Sequence[int] | None = None,
    kv_layout: Layout | None = None,
    pairs_per_row: float = DEFAULT_PAIRS_PER_ROW,
) -> Layout:
    """A layout of the queries: equal token counts, near-equal area and few rows moved, for any mask.

    Made for long-tailed packed documents.

    Minimises the busiest rank's `area + pairs_per_row * rows received` over a family of layouts, contiguous
    and zigzag among them. Of several masks, the sum over all layers of each layer's busiest rank.

    Args:
        mask: of all layers; or the masks of layers that share the layout, all of one shape.
        ring: ring degree.
        weights: how many layers have each mask, or whole numbers in that proportion; default 1 each.
        kv_layout: where the keys lie, in cross-attention; by default with their queries, or contiguous if a
            mask has another number of keys than queries.
        pairs_per_row: (query, key) pairs that one rank computes in the time in which one K/V row travels.

    Raises:
        ValueError: masks of different shapes, weights that are not one whole number >= 1 for each, a layout
            of the keys that does not fit, ring < 1 or pairs_per_row < 0.
    """
    check_price(ring, pairs_per_row)
    demand = Demand.of(mask, ring, weights, kv_layout)
    best = best_layout(demand, ring, pairs_per_row)
    mean = demand.area / ring or 1.0
    if best.layout.name == "balanced":
        how = best.layout.reason
    else:
        how = f"same as {best.layout.name}, which costs no more"
    who = (
        "the busiest rank computes" if len(demand.masks) == 1 else "layer by layer, the busiest ranks compute"
    )
    reason = f"{how}: {who} {best.area / mean:.3f}x the mean area, none receives more than {best.rows} rows"
    return Layout(best.layout.s, best.layout.ranks, "balanced", reason)


def best_layout(demand: Demand, ring: int, pairs_per_row: float) -> Busiest:
    """The cheapest of contiguous, zigzag and the dealt-out segments.

    Contiguous at once where there is next to nothing to gain.
    """
    enough = (1 + TOLERANCE) * demand.area / ring
    enough += pairs_per_row * NEGLIGIBLE_ROWS * sum(demand.weights) * demand.q_len / ring
    simplest = busiest(demand, contiguous(demand.q_len, ring), pairs_per_row, limit=enough)
    if simplest is not None:
        return simplest
    best = busiest(demand, _deal(demand, ring), pairs_per_row, limit=inf)
    assert best is not None
    others = [zigzag(demand.q_len, ring), contiguous(demand.q_len, ring)]
    if len(demand.masks) > 1:
        # With equal sums the layers may still differ: that of one kind of layer may be the better for all.
        others += (_deal(one, ring) for one in demand.apart())
    for other in others:
        best = busiest(demand, other, pairs_per_row, limit=best.cost) or best
    return best


def check_price(ring: int, pairs_per_row: float) -> None:
    """Raise ValueError unless ring >= 1 and the price of a row is one."""
    check_degrees(0, ring)
    if not 0 <= pairs_per_row < inf:
        raise ValueError(
            f"ring={ring}, pairs_per_row={pairs_per_row}: use ring >= 1 and a finite pairs_per_row >= 0"
        )


def busiest(demand: Demand, layout: Layout, pairs_per_row: float, limit: float) -> Busiest | None:
    """A layout's busiest ranks, or None as soon as their cost is above the limit."""
    kinds = range(len(demand.masks))
    most_area = [0 for _ in kinds]
    most_rows = [0 for _ in kinds]
    most_cost = [0.0 for _ in kinds]
    for rank, spans in enumerate(layout.ranks):
        areas = demand.areas_of(spans)
        if sum(areas) > limit:  # saves counting rows, which is the slower part
            return None
        rows = demand.rows_of(layout, rank)
        for kind in kinds:
            most_area[kind] = max(most_area[kind], areas[kind])
            most_rows[kind] = max(most_rows[kind], rows[kind])
            most_cost[kind] = max(most_cost[kind], areas[kind] + pairs_per_row * rows[kind])
        if sum(most_cost) > limit:
            return None
    return Busiest(layout=layout, area=sum(most_area), rows=sum(most_rows), cost=sum(most_cost))


def _deal(demand: Demand, ring: int) -> Layout:
    """Segments dealt out rank after rank, each with equal tokens.

    A rank gets the average area of what is left when its turn comes.
    """
    parts = segments(demand)
    counts = [stop - start for start, stop in pairwise(split_evenly(demand.q_len, ring))]
    longest = max((part.tokens for part in parts), default=0)
    pool = Pool(parts, _lowest_level(longest, demand.heaviest.area / ring, demand.q_len / ring))
    slack = TOLERANCE * demand.area / ring
    runs: list[list[Run]] = []
    ranks_left = sum(count > 0 for count in counts)
    for count in counts[:ranks_left]:  # with more ranks than tokens the last ones get nothing
        runs.append(sorted(fill(pool, count, pool.area / ranks_left, slack)))
        ranks_left -= 1
    runs.extend([] for _ in range(ring - len(runs)))
    return from_runs(demand.q_len, runs, "balanced", f"{len(parts)} segments, whole where they fit")


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
