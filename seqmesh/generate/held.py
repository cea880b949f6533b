"""Which tokens of a cache each rank holds, in storage order: pure data, the same on every rank.

    a prompt of 10 on 4 ranks, zigzag      then 3 tokens, one by one
    rank 0   0 1 9                         0 1 9 12
    rank 1   2 3 8                         2 3 8
    rank 2   4 7                           4 7 10
    rank 3   5 6                           5 6 11

Tokens come in order and each stays where it came. New ones go where tokens are fewest, so ranks never differ
by more than one token if they did not before.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from seqmesh.layouts import Layout, Span, split_evenly

Spans = tuple[Span, ...]
"""Tokens of a rank in storage order, in spans without a stride."""


def filled(counts: Sequence[int], tokens: int) -> list[int]:
    """How many of some new tokens each rank gets, to end as even as can be: the first ranks get the odd ones.

    Ranks that hold more than their even share already get none.
    """
    level = _level(counts, tokens)
    given = [max(0, level - count) for count in counts]
    left = tokens - sum(given)
    for rank, count in enumerate(counts):
        if left and count <= level:
            given[rank] += 1
            left -= 1
    return given


def _level(counts: Sequence[int], tokens: int) -> int:
    """The highest level up to which so many tokens fill all ranks that are below it."""
    below = sorted(counts)
    while len(below) * below[-1] - sum(below) > tokens:  # to fill up to the fullest takes more
        below.pop()
    return (sum(below) + tokens) // len(below)


def dealt(counts: Sequence[int], past: int, tokens: int) -> list[Spans]:
    """A run of consecutive new tokens for every rank."""
    edges = [past, *accumulate(filled(counts, tokens), initial=past)][1:]
    return [spans_of([(start, stop)]) for start, stop in pairwise(edges)]


def zigzagged(counts: Sequence[int], past: int, tokens: int) -> list[Spans]:
    """Two runs of new tokens for every rank, one of the front and one of the back: near-equal causal work."""
    sizes = filled(counts, tokens)
    front = [(size + 1) // 2 for size in sizes]
    back = [size // 2 for size in reversed(sizes)]
    runs = list(pairwise(accumulate([*front, *back], initial=past)))
    return [spans_of([runs[rank], runs[-1 - rank]]) for rank in range(len(sizes))]


def pieces(layout: Layout, ulysses: int) -> list[Spans]:
    """What each rank of a mesh holds by a layout: a ring rank's tokens are cut evenly over ulysses."""
    found = []
    for spans, count in zip(layout.ranks, layout.counts, strict=True):
        runs = [run for span in spans for run in _runs(span)]
        for start, stop in pairwise(split_evenly(count, ulysses)):
            found.append(spans_of(_cut(runs, start, stop)))
    return found


def spans_of(runs: Iterable[tuple[int, int]]) -> Spans:
    """Spans of (start, stop) runs; those that touch become one, and empty ones none."""
    spans: list[Span] = []
    for start, stop in runs:
        if spans and spans[-1].start + spans[-1].count == start:
            spans[-1] = Span(spans[-1].start, stop - spans[-1].start)
        elif stop > start:
            spans.append(Span(start, stop - start))
    return tuple(spans)


def joined(before: Spans, new: Spans) -> Spans:
    """Spans and then others. Only where they meet can two become one: a cache may have thousands."""
    if before and new and before[-1].start + before[-1].count == new[0].start:
        return (*before[:-1], Span(before[-1].start, before[-1].count + new[0].count), *new[1:])
    return (*before, *new)


def since(spans: Iterable[Span], first: int) -> Spans:
    """Those tokens of some spans that are not before `first`."""
    return spans_of((max(span.start, first), max(span.start + span.count, first)) for span in spans)


def tokens_of(spans: Iterable[Span]) -> int:
    """How many they are."""
    return sum(span.count for span in spans)


def _runs(span: Span) -> list[tuple[int, int]]:
    if span.stride == 1:
        return [(span.start, span.start + span.count)]
    return [(token, token + 1) for token in span.tokens]


def _cut(runs: Iterable[tuple[int, int]], start: int, stop: int) -> Iterable[tuple[int, int]]:
    """Of the tokens of some runs, counted from 0, those from `start` to `stop`."""
    at = 0
    for begin, end in runs:
        inside = max(start, at) - at + begin, min(stop, at + end - begin) - at + begin
        if inside[0] < inside[1]:
            yield inside
        at += end - begin
