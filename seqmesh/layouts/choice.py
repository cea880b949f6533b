"""Which layout to take: by its name, or `auto`, the simplest that is as good as the best one known.

    contiguous -> zigzag -> balanced    the first whose busiest rank costs no more than 2% above the best

Trade-off: the cost is of the busiest rank alone, pairs computed and rows received; latency of many small
exchanges is not in it.
"""

from math import inf

from seqmesh.layouts.balance import DEFAULT_PAIRS_PER_ROW, balanced, best_layout, busiest
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
        mask: what "balanced" and "auto" look at; they lay out its queries, which must be as many as its keys.
        s: tokens that the others lay out: the mask's queries, or its keys.
        ring: ring degree.

    Raises:
        ValueError: another name, or what the layout itself refuses.
    """
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


def auto(mask: Mask, ring: int, *, pairs_per_row: float = DEFAULT_PAIRS_PER_ROW) -> Layout:
    """The simplest layout that is as good as any here: contiguous, else zigzag, else balanced.

    `reason` says what it compared.

    Args:
        mask: a mask of s queries and s keys.
        ring: ring degree.
        pairs_per_row: (query, key) pairs that one rank computes in the time in which one K/V row travels.

    Raises:
        ValueError: a mask whose q_len and k_len differ, ring < 1 or pairs_per_row < 0.
    """
    best = best_layout(mask, ring, pairs_per_row)
    mean = mask.area / ring or 1.0
    found = f"balanced {best.area / mean:.2f}x and at most {best.rows} rows received"
    for fixed in (contiguous(mask.q_len, ring), zigzag(mask.q_len, ring)):
        as_good = busiest(mask, fixed, pairs_per_row, limit=AS_GOOD * best.cost)
        if as_good is not None:
            load = f"{as_good.area / mean:.2f}x the mean area and at most {as_good.rows} rows received"
            return Layout(fixed.s, fixed.ranks, fixed.name, f"{fixed.name} is as good, {load}; {found}")
    rejected = busiest(mask, zigzag(mask.q_len, ring), pairs_per_row, limit=inf)
    assert rejected is not None
    load = f"{rejected.area / mean:.2f}x the mean area and {rejected.rows} rows received"
    reason = f"zigzag would leave the busiest rank {load}; {found}"
    return Layout(mask.q_len, best.layout.ranks, "balanced", reason)
