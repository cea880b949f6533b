"""Where partial results go: which rows are final as they come, and which must add up. Pure: no torch.

Stages and blocks give each row of a rank its result in parts. All of it is known before anything runs, so no
part is added where it can be copied, and only rows that get several parts need an accumulator in fp32:

    rows      0 . . . . . 8 . . . . . 16 . . . . 24
    part 0    [-----------]                             rows 0-8: the only part of theirs, final as it is
    part 1                [-----------]                 rows 8-16: the first of two, copied
    part 2                [-----------------------]     rows 8-16: merged;  rows 16-24: the only part

A *part* is what one launch of a kernel, or one message, brings: rows packed one after the other, in *runs*.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from seqmesh.schedule.pieces import Runs


class Put(NamedTuple):
    """Where some rows of a part go."""

    source: slice
    """Rows of the part."""
    target: slice
    """Rows of the whole."""
    place: slice
    """Rows of the accumulator; of rows that are `only` once touched, no place."""
    is_only: bool
    """No other part touches these rows."""
    is_first: bool
    """No part before this one touches them."""


class Shared(NamedTuple):
    """Rows of the whole that several parts touch, and their place in the accumulator."""

    target: slice
    place: slice


@dataclass(frozen=True, kw_only=True, eq=False)
class RowPlan:
    """What each part does to the rows of a result. Made by `row_plan`."""

    rows: int
    puts: tuple[tuple[Put, ...], ...]
    """Of each part, in the order in which they come."""
    shared: tuple[Shared, ...]
    shared_rows: int
    """Rows of the accumulator."""
    untouched: tuple[slice, ...]
    """Rows that no part touches."""

    @cached_property
    def is_one_part(self) -> bool:
        """Whether a single part is the whole result, as it is."""
        return len(self.puts) == 1 and self.puts[0] == (_whole(self.rows),)


def _whole(rows: int) -> Put:
    return Put(slice(0, rows), slice(0, rows), slice(0, 0), is_only=True, is_first=True)


class _RowRange:
    """Rows [start, stop) that every part touches as a whole or not at all."""

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self.parts = 0
        self.place = 0
        self.is_touched = False


def row_plan(rows: int, parts: Sequence[Runs]) -> RowPlan:
    """The plan of a result of `rows` rows whose parts bring these runs; in a part, a row may come twice."""
    segments = _RowRanges(rows, parts)
    for runs in parts:
        for start, stop in runs:
            for segment in segments.of(start, stop):
                segment.parts += 1
    shared_rows = 0
    for segment in segments:
        if segment.parts > 1:
            segment.place = shared_rows
            shared_rows += segment.stop - segment.start
    shared = (
        Shared(slice(s.start, s.stop), _place(s.place, s.stop - s.start)) for s in segments if s.parts > 1
    )
    return RowPlan(
        rows=rows,
        puts=tuple(tuple(_joined(_puts(runs, segments))) for runs in parts),
        shared=tuple(_joined_shared(shared)),
        shared_rows=shared_rows,
        untouched=tuple(slice(s.start, s.stop) for s in segments if s.parts == 0),
    )


class _RowRanges:
    """The rows of a result, cut wherever a part begins or ends."""

    def __init__(self, rows: int, parts: Sequence[Runs]) -> None:
        self._cuts = sorted({0, rows}.union(*(run for runs in parts for run in runs)))
        self._segments = [_RowRange(start, stop) for start, stop in pairwise(self._cuts)]

    def __iter__(self) -> Iterator[_RowRange]:
        return iter(self._segments)

    def of(self, start: int, stop: int) -> list[_RowRange]:
        """Those of the rows [start, stop), where a part begins and ends."""
        return self._segments[bisect_left(self._cuts, start) : bisect_left(self._cuts, stop)]


def _puts(runs: Runs, segments: _RowRanges) -> Iterator[Put]:
    row = 0  # of the part
    for start, stop in runs:
        for segment in segments.of(start, stop):
            length = segment.stop - segment.start
            is_only = segment.parts == 1
            yield Put(
                slice(row, row + length),
                slice(segment.start, segment.stop),
                _place(segment.place, 0 if is_only else length),
                is_only=is_only,
                is_first=not segment.is_touched,
            )
            segment.is_touched = True
            row += length


def _place(start: int, length: int) -> slice:
    return slice(start, start + length) if length else slice(0, 0)


def _joined(puts: Iterator[Put]) -> Iterator[Put]:
    """Fewer puts: those that continue one another are one."""
    last: Put | None = None
    for put in puts:
        if last is not None and _continues(last, put):
            place = put.place if put.is_only else slice(last.place.start, put.place.stop)
            last = Put(
                slice(last.source.start, put.source.stop),
                slice(last.target.start, put.target.stop),
                place,
                is_only=put.is_only,
                is_first=put.is_first,
            )
            continue
        if last is not None:
            yield last
        last = put
    if last is not None:
        yield last


def _continues(last: Put, put: Put) -> bool:
    same_kind = last.is_only == put.is_only and last.is_first == put.is_first
    same_place = put.is_only or last.place.stop == put.place.start
    return same_kind and same_place and last.target.stop == put.target.start


def _joined_shared(shared: Iterator[Shared]) -> Iterator[Shared]:
    """Places follow one another: only their targets need to."""
    last: Shared | None = None
    for rows in shared:
        if last is not None and last.target.stop == rows.target.start:
            last = Shared(
                slice(last.target.start, rows.target.stop), slice(last.place.start, rows.place.stop)
            )
            continue
        if last is not None:
            yield last
        last = rows
    if last is not None:
        yield last
