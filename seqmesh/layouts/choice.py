"""Which layout to take: by its name, or `auto`, the simplest that is as good as the best one known.

    contiguous -> zigzag -> balanced    the first whose busiest rank costs no more than 2% above the best

Trade-off: the cost is of the busiest rank alone, pairs computed and rows received; latency of many small
exchanges is not in it.
"""

from collections.abc import Sequence
from math import inf

from seqmesh.layouts.balance import DEFAULT_PAIRS_PER_ROW, balanced, best_layout, busiest, check_price
from seqmesh.layouts.demand import Demand
from seqmesh.layouts.fixed import contiguous, striped, zigzag
from seqmesh.layouts.layout import Layout
from seqmesh.masks import Mask

AS_GOOD = 1.02
"""`auto` takes a simpler layout whose busiest rank costs no more than this, in parts of the best."""

NAMES = ("auto", "contiguous", "zigzag", "striped", "balanced")
"""What `named` knows."""


def named(name: str, mask: Mask, s: int, ring: int) -> Layout:
    """A layout by its name.

    Args:
        name: one of NAMES.
        mask: what "balanced" and "auto" look at; they lay out its queries.
        s: tokens that the others lay out: the mask's queries, or its keys.
        ring: ring degree.

    Raises:
        ValueError: another name, "balanced" or "auto" for another number of tokens than the mask's queries,
            or what the layout itself refuses.
    """
    if name in ("balanced", "auto") and s != mask.q_len:
        raise ValueError(
            f"layout={name!r} of {s} tokens lays out queries, of which the mask has {mask.q_len};"
            " lay out the keys of cross-attention with 'contiguous'"
        )
    match name:
        case "contiguous":
            return contiguous(s, ring)
        case "zigzag":
            return zigzag(s, ring)
        case "striped":
            return striped(s, ring)
        case "balanced":
            return balanced(mask, ring)
        case "auto":
            return auto(mask, ring)
    raise ValueError(f"layout={name!r} is unknown; use {', '.join(map(repr, NAMES))}, or a Layout")


def auto(
    mask: Mask | Sequence[Mask],
    ring: int,
    *,
    weights: Sequence[int] | None = None,
    kv_layout: Layout | None = None,
    pairs_per_row: float = DEFAULT_PAIRS_PER_ROW,
) -> Layout:
    """The simplest layout that is as good as any here: contiguous, else zigzag, else balanced.

    `reason` says what it compared. Arguments and errors are those of `balanced`.
    """
    check_price(ring, pairs_per_row)
    demand = Demand.of(mask, ring, weights, kv_layout)
    best = best_layout(demand, ring, pairs_per_row)
    mean = demand.area / ring or 1.0
    found = f"balanced {best.area / mean:.2f}x and at most {best.rows} rows received"
    for fixed in (contiguous(demand.q_len, ring), zigzag(demand.q_len, ring)):
        as_good = busiest(demand, fixed, pairs_per_row, limit=AS_GOOD * best.cost)
        if as_good is not None:
            load = f"{as_good.area / mean:.2f}x the mean area and at most {as_good.rows} rows received"
            return Layout(fixed.s, fixed.ranks, fixed.name, f"{fixed.name} is as good, {load}; {found}")
    rejected = busiest(demand, zigzag(demand.q_len, ring), pairs_per_row, limit=inf)
    assert rejected is not None
    load = f"{rejected.area / mean:.2f}x the mean area and {rejected.rows} rows received"
    reason = f"zigzag would leave the busiest rank {load}; {found}"
    return Layout(demand.q_len, best.layout.ranks, "balanced", reason)
