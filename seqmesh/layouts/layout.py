"""A layout is data: for every ring rank a tuple of spans (start, count, stride), in storage order.

Lengths need not divide anything: shards may differ by a token, may be empty, and nothing is ever padded. The
ulysses ranks of a ring rank share its storage order, in near-equal consecutive pieces.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import NamedTuple


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
        ValueError: a token that no rank, or more than one, holds; a span outside the sequence; no rank at
            all.
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
        if not self._is_consecutive():
            self._check_every_token()

    def _is_consecutive(self) -> bool:
        """Whether the spans, none of them strided, follow one another from 0 to s.

        That proves a partition by a sort, without a look at every token.
        """
        reach = 0
        for span in sorted(chain.from_iterable(self.ranks)):
            if span.stride != 1 or span.count <= 0 or span.start != reach:
                return False
            reach += span.count
        return reach == self.s

    def _check_every_token(self) -> None:
        """Raise if a token is held by no rank or by two, or a span leaves the sequence."""
        held = bytearray(self.s)
        total = 0
        for span in chain.from_iterable(self.ranks):
            tokens = span.tokens if span.stride else range(0)
            if span.count < 0 or span.stride < 1 or span.start < 0 or tokens[-1] >= self.s:
                raise ValueError(
                    f"{span} leaves the sequence of {self.s} tokens;"
                    " use count >= 0, stride >= 1 and positions inside it"
                )
            held[tokens.start : tokens[-1] + 1 : tokens.step] = b"\1" * span.count
            total += span.count
        missing = held.count(0)
        if missing:
            what = f"leaves {missing} tokens (the first is {held.find(0)}) to no rank"
        elif total != self.s:
            what = f"holds {total - self.s} tokens twice"
        else:
            return
        raise ValueError(
            f"the layout {what}; every one of the {self.s} tokens must be held by exactly one ring rank"
        )

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
    """Boundaries 0 = b[0] <= ... <= b[parts] = total of near-equal pieces.

    The first `total % parts` hold one more.
    """
    size, extra = divmod(total, parts)
    return [part * size + min(part, extra) for part in range(parts + 1)]


def check_degrees(s: int, ring: int) -> None:
    """Raise ValueError unless there is a layout of `s` tokens over `ring` ranks."""
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
