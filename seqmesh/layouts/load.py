"""The load of a layout under a mask: the pairs each ring rank computes and the K/V rows it receives, exactly.

    rank's rows        |--held--|                |--held--|
    keys they see      |==========================|              causal: everything up to the last row
    received                     |==============|               keys seen, less rows held

Trade-off: a span with a stride is measured token by token; the layouts that `balanced` compares have none.
"""

from collections.abc import Iterable

from seqmesh.layouts.layout import Layout, Span
from seqmesh.masks import Mask


def areas(mask: Mask, layout: Layout) -> list[int]:
    """Pairs computed by each ring rank."""
    return [area(mask, spans) for spans in layout.ranks]


def rows_received(mask: Mask, layout: Layout, kv_layout: Layout | None = None) -> list[int]:
    """K/V rows that each ring rank receives; keys lie as the queries do, or in a layout of their own."""
    keys = layout if kv_layout is None else kv_layout
    return [rows(mask, spans, held) for spans, held in zip(layout.ranks, keys.ranks, strict=True)]


def area(mask: Mask, spans: Iterable[Span]) -> int:
    """Pairs computed by the rank that holds these spans: the allowed pairs of its queries."""
    return sum(mask.rows_area(start, stop) for start, stop in _runs(spans))


def rows(mask: Mask, spans: Iterable[Span], keys: Iterable[Span] | None = None) -> int:
    """K/V rows received by the rank that holds the queries of these spans, and the same keys or others.

    They are the distinct keys that its queries may see and that it does not hold.
    """
    queries = sorted(_runs(spans))
    held = queries if keys is None else sorted(_runs(keys))
    seen: list[tuple[int, int]] = []
    for start, stop in queries:
        seen += _keys_seen(mask, start, stop)
    return _outside(sorted(seen), held)


def _runs(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """The (start, stop) runs of consecutive tokens of some spans."""
    runs = []
    for start, count, stride in spans:
        if stride == 1:
            runs.append((start, start + count))
        else:
            runs.extend((token, token + 1) for token in range(start, start + count * stride, stride))
    return runs


def _keys_seen(mask: Mask, start: int, stop: int) -> list[tuple[int, int]]:
    """Key runs that the queries [start, stop) may see, one per band; runs of different bands may overlap."""
    seen = (band.keys_seen(start, stop) for band in mask.by_query.meeting(start, stop))
    return [keys for keys in seen if keys is not None]


def _outside(seen: list[tuple[int, int]], held: list[tuple[int, int]]) -> int:
    """Positions in the union of `seen` and in no run of `held`; both sorted, `held` disjoint.

    One sweep: `start` is the first position not yet counted, `at` the first held run that ends after it.
    """
    count = reach = at = 0
    for first, stop in seen:
        start = max(first, reach)
        reach = max(reach, stop)
        while start < stop:
            while at < len(held) and held[at][1] <= start:
                at += 1
            held_start, held_stop = held[at] if at < len(held) else (stop, stop)
            count += max(0, min(stop, held_start) - start)
            start = max(start, held_stop) if held_start < stop else stop
    return count
