"""Coalescing: fewer blocks with the same pairs, because every block is a call of the kernel.

\\ .        one causal block          blocks whose union is a band become that band,
# \\   ->   over both chunks          neighbours along the keys first, then along the queries
"""

from collections.abc import Iterable

from seqmesh.masks import Band


def _merge(a: Band, b: Band) -> Band | None:
    """The band that is exactly the union of two disjoint trimmed bands, if there is one."""
    if a.q_stop < b.q_start or b.q_stop < a.q_start or a.k_stop < b.k_start or b.k_stop < a.k_start:
        return None
    hull = (
        min(a.q_start, b.q_start),
        max(a.q_stop, b.q_stop),
        min(a.k_start, b.k_start),
        max(a.k_stop, b.k_stop),
    )
    area = a.area + b.area
    for lo in {a.lo, b.lo}:
        for hi in {a.hi, b.hi}:
            union = Band(*hull, lo, hi)
            # As many pairs as both together, and all of theirs: then it has no others.
            if union.area == area and a.intersect(union) == a and b.intersect(union) == b:
                return union.trim()
    return None


def coalesce(blocks: Iterable[Band]) -> tuple[Band, ...]:
    """Fewer blocks with the same pairs: neighbours whose union is a band become that band."""
    merged = _coalesce_neighbours(sorted(blocks, key=lambda block: (block.k_start, block.q_start)))
    return _coalesce_neighbours(sorted(merged, key=lambda block: (block.q_start, block.k_start)))


def _coalesce_neighbours(blocks: Iterable[Band]) -> tuple[Band, ...]:
    """One pass over sorted blocks; what has grown is tried against the one before it again."""
    stack: list[Band] = []
    for block in blocks:
        grown = block
        while stack and (union := _merge(stack[-1], grown)) is not None:
            stack.pop()
            grown = union
        stack.append(grown)
    return tuple(stack)
