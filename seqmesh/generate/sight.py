"""What new tokens see of a cache: masks of the new tokens by all that is held, and as they lie on a rank.

past 4, 3 new tokens        window of 3             as rank 1 holds keys 1 2 5

  0 1 2 3 4 5 6               2 3 4 5 6               1 2 5
4 X X X X X . .             4 X X X . .             4 X X .
5 X X X X X X .             5 . X X X .             5 X X X
6 X X X X X X X             6 . . X X X             6 X X X
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from seqmesh.layouts import Span
from seqmesh.masks import Band, Mask, causal, chunked, sliding_window

Runs = tuple[tuple[int, int], ...]
"""(start, stop) of tokens that are no padding."""


class Sight(NamedTuple):
    """What a layer lets a token see of those before it: all, or a window, or its chunk."""

    window: int | None = None
    chunk: int | None = None

    def first_seen(self, token: int, real: Runs | None = None) -> int:
        """The first token that this one, or any after it, sees. Chunks begin at the first real token."""
        if self.window is not None:
            return max(0, token - self.window + 1)
        begin = _begin(real)
        if self.chunk is not None and token >= begin:
            return begin + (token - begin) // self.chunk * self.chunk
        return 0

    def mask(self, past: int, tokens: int, first: int, real: Runs | None) -> Mask:
        """Queries past .. past + tokens by keys first .. past + tokens.

        Args:
            past: tokens before the queries.
            tokens: queries.
            first: the first key; those before it are held no more.
            real: what is no padding; None if nothing is.
        """
        total = past + tokens
        bands: Iterable[Band] = self._whole(total, _begin(real)).by_query.meeting(past, total)
        if real is not None:
            columns = [Band(0, total, start, stop) for start, stop in real]
            bands = [pair for a in bands for b in columns if (pair := a.intersect(b)) is not None]
        inside = (band.within(past, total, first, total) for band in bands)
        return Mask(tokens, total - first, tuple(band.shift(-past, -first) for band in inside if band))

    def _whole(self, total: int, begin: int) -> Mask:
        if self.window is not None:
            return sliding_window(total, self.window)
        if self.chunk is None:
            return causal(total)
        chunks = chunked(total - begin, self.chunk).bands
        return Mask(total, total, tuple(band.shift(begin, begin) for band in chunks))


def _begin(real: Runs | None) -> int:
    """The first token that is no padding."""
    return real[0][0] if real else 0


def as_stored(mask: Mask, queries: Sequence[Span], keys: Sequence[Span]) -> Mask:
    """A mask's pairs of some queries and keys, numbered as those lie in storage, one span after the other."""
    bands: list[Band] = []
    k_at = 0
    for held in keys:
        k_stop = held.start + held.count
        meeting = mask.by_key.meeting(held.start, k_stop)
        q_at = 0
        for asked in queries:
            q_stop = asked.start + asked.count
            found = (band.within(asked.start, q_stop, held.start, k_stop) for band in meeting)
            bands += [band.shift(q_at - asked.start, k_at - held.start) for band in found if band]
            q_at += asked.count
        k_at += held.count
    return Mask(sum(span.count for span in queries), k_at, tuple(_joined(bands)))


def _joined(bands: Iterable[Band]) -> list[Band]:
    """Bands without a bound that touch, of the same queries, as one: a cache has a span for every token."""
    joined: dict[tuple[int, int], Band] = {}
    found: list[Band] = []
    for band in bands:
        if band.lo is not None or band.hi is not None:
            found.append(band)
            continue
        rows = (band.q_start, band.q_stop)
        before = joined.get(rows)
        if before is not None and before.k_stop == band.k_start:
            joined[rows] = before._replace(k_stop=band.k_stop)
        else:
            if before is not None:
                found.append(before)
            joined[rows] = band
    return [*found, *joined.values()]
