"""Layouts: which tokens of the global sequence each ring rank holds, and in which order it stores them.

A layout is data: for every ring rank a tuple of spans (start, count, stride). Lengths need not divide anything: shards may
differ by a token, may be empty, and nothing is ever padded. The ulysses ranks of a ring rank share its storage order, in
near-equal consecutive pieces (docs/layouts.md; USP paper, section on load balance, for zigzag).

    16 tokens, ring 2    contiguous  0 0 0 0 0 0 0 0 1 1 1 1 1 1 1 1      the owner of each token
                         zigzag      0 0 0 0 1 1 1 1 1 1 1 1 0 0 0 0      chunk r and chunk 2R-1-r
                         striped     0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1

Where it sits: pure Python, beside masks. `balanced` and `auto`, which look at a mask, live in balance.py and are offered here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

from seqmesh.masks import Mask

DEFAULT_PAIRS_PER_ROW = 1000.0
"""Default exchange rate of `balanced`: (query, key) pairs computed while one K/V row travels.

One row is 4 g d bytes (K and V, bf16) and one pair 4 h d FLOPs, so the rate is F g / (B h) for F FLOP/s and B bytes/s one
way: about 1000 for 200 TFLOP/s, 50 GB/s and 4 query heads per K/V head.
"""


class Span(NamedTuple):
    """The `count` tokens start, start + stride, start + 2 stride, ..."""

    start: int
    count: int  # type: ignore[assignment]  # tuple.count is of no use here
    stride: int = 1

    @property
    def tokens(self) -> range:
        """The global positions, in storage order."""
        return range(self.start, self.start + self.count * self.stride, self.stride)


@dataclass(frozen=True)
class Layout:
    """Which of `s` tokens each ring rank holds: `ranks[ring_rank]` is a tuple of spans in storage order.

    Raises:
        ValueError: a token that no rank, or more than one, holds; a span outside the sequence; no rank at all.
    """

    s: int
    ranks: tuple[tuple[Span, ...], ...]
    name: str = field(default="custom", compare=False)
    reason: str = field(default="given by the caller", compare=False)
    """Why this layout: `auto` says here what it compared."""

    def __post_init__(self) -> None:
        if not self.ranks:
            raise ValueError("a layout of no ring ranks; a layout needs at least one rank")
        ranks = tuple(tuple(span for span in map(Span._make, spans) if span.count) for spans in self.ranks)
        object.__setattr__(self, "ranks", ranks)
        if not self._is_partition():
            self._refuse()

    def _is_partition(self) -> bool:
        """Whether the spans, if none has a stride, follow one another from 0 to s: a sort, where `_refuse` looks at every token."""
        spans = sorted(chain.from_iterable(self.ranks))
        stops = [span.start + span.count for span in spans]
        return (
            all(s.stride == 1 and s.count > 0 for s in spans)
            and [s.start for s in spans] == [0, *stops][:-1]
            and (stops or [0])[-1] == self.s
        )

    def _refuse(self) -> None:
        """Raise if a token is held by no rank or by two, or a span leaves the sequence."""
        held, total = bytearray(self.s), 0
        for span in chain.from_iterable(self.ranks):
            tokens = span.tokens if span.stride else range(0)
            if span.count < 0 or span.stride < 1 or span.start < 0 or tokens[-1] >= self.s:
                raise ValueError(f"{span} leaves the sequence of {self.s} tokens; use count >= 0, stride >= 1 and positions inside it")
            held[tokens.start : tokens[-1] + 1 : tokens.step] = b"\1" * span.count
            total += span.count
        missing = held.count(0)
        if missing or total != self.s:
            gap = f"leaves {missing} tokens (the first is {held.find(0)}) to no rank"
            what = gap if missing else f"holds {total - self.s} tokens twice"
            raise ValueError(f"the layout {what}; every one of the {self.s} tokens must be held by exactly one ring rank")

    @property
    def ring(self) -> int:
        """Ring degree."""
        return len(self.ranks)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens held by each ring rank."""
        return tuple(sum(span.count for span in spans) for spans in self.ranks)

    def positions(self, ring_rank: int) -> Iterator[int]:
        """Global positions of a ring rank's tokens, in storage order."""
        return chain.from_iterable(span.tokens for span in self.ranks[ring_rank])


def split_evenly(total: int, parts: int) -> list[int]:
    """Boundaries 0 = b[0] <= ... <= b[parts] = total of near-equal pieces: the first `total % parts` hold one more."""
    size, extra = divmod(total, parts)
    return [part * size + min(part, extra) for part in range(parts + 1)]


def _check(s: int, ring: int) -> None:
    if s < 0 or ring < 1:
        raise ValueError(f"s={s} tokens over ring={ring}: use s >= 0 and ring >= 1")


def from_runs(s: int, runs: Iterable[Iterable[tuple[int, int]]], name: str, reason: str) -> Layout:
    """A layout from (start, stop) runs per rank; runs that touch become one span."""
    ranks = []
    for rank_runs in runs:
        spans: list[Span] = []
        for start, stop in rank_runs:
            if spans and spans[-1].start + spans[-1].count == start:
                spans[-1] = Span(spans[-1].start, spans[-1].count + stop - start)
            elif stop > start:
                spans.append(Span(start, stop - start))
        ranks.append(tuple(spans))
    return Layout(s, tuple(ranks), name, reason)


def contiguous(s: int, ring: int) -> Layout:
    """Near-equal consecutive pieces: least traffic for windows; badly balanced for causal masks.

    Raises:
        ValueError: s < 0 or ring < 1.
    """
    _check(s, ring)
    cut = split_evenly(s, ring)
    return from_runs(s, ([(cut[r], cut[r + 1])] for r in range(ring)), "contiguous", "asked for")


def zigzag(s: int, ring: int) -> Layout:
    """Of 2R near-equal chunks, ring rank r holds chunks r and 2R-1-r: causal attention is balanced exactly when 2R divides s.

    Raises:
        ValueError: s < 0 or ring < 1.
    """
    _check(s, ring)
    counts = [after - before for before, after in pairwise(split_evenly(s, ring))]
    head = list(accumulate(((count + 1) // 2 for count in counts), initial=0))
    tail = list(accumulate((count // 2 for count in counts), initial=0))
    chunks = (((head[r], head[r + 1]), (s - tail[r + 1], s - tail[r])) for r in range(ring))
    return from_runs(s, chunks, "zigzag", "asked for")


def striped(s: int, ring: int) -> Layout:
    """Ring rank r holds tokens r, r + R, r + 2R, ...: balanced for causal masks, but every rank needs every row.

    Raises:
        ValueError: s < 0 or ring < 1.
    """
    _check(s, ring)
    ranks = tuple((Span(r, len(range(r, s, ring)), ring),) for r in range(ring))
    return Layout(s, ranks, "striped", "asked for")


def balanced(mask: Mask, ring: int, *, pairs_per_row: float = DEFAULT_PAIRS_PER_ROW) -> Layout:
    """Equal token counts, near-equal area and few rows moved, for any mask: made for long-tailed packed documents.

    Minimises the busiest rank's `area + pairs_per_row * rows received` over a family of layouts (see balance.py).

    Args:
        mask: a mask of s queries and s keys.
        ring: ring degree.
        pairs_per_row: (query, key) pairs that one rank computes in the time in which one K/V row travels.

    Raises:
        ValueError: a mask whose q_len and k_len differ, ring < 1 or pairs_per_row < 0.
    """
    from seqmesh.balance import balance  # balance.py builds on this module

    _check(mask.q_len, ring)
    return balance(mask, ring, pairs_per_row)


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
    """The simplest layout that is as good as any here: contiguous, else zigzag, else balanced. `reason` says what it compared.

    Args:
        mask: a mask of s queries and s keys.
        ring: ring degree.
        pairs_per_row: (query, key) pairs that one rank computes in the time in which one K/V row travels.

    Raises:
        ValueError: a mask whose q_len and k_len differ, ring < 1 or pairs_per_row < 0.
    """
    from seqmesh.balance import auto  # balance.py builds on this module

    _check(mask.q_len, ring)
    return auto(mask, ring, pairs_per_row)
