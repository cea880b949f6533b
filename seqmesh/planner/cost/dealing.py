"""A step's packed documents as `seqmesh train` deals them, and how long all groups wait for the busiest.

    sequences     A A A B | C C D D | E F F F | G G G G        each of seq_len tokens
    dealt         by area, so that no group waits long         train/evening.py
    rows          a micro-batch's sequences end to end         train/data/packing.py
    one pool      all of them in one row, on one ring: nobody to wait for

    dealt = dealt_step(job, point)
    dealt.busiest              documents of the row with the most pairs
    dealt.waited * busiest     the pairs that a step takes the time of

Legend: an area is the (query, key) pairs that a mask allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point
from seqmesh.train.evening import MicroBatch, deal


@dataclass(frozen=True, kw_only=True)
class DealtStep:
    """The rows of a step."""

    rows: tuple[tuple[int, ...], ...]
    """Documents of every micro-batch of every group, the largest area first."""
    areas: tuple[int, ...]
    """Of the rows."""
    waited: float
    """Rows like the busiest that the step takes as long as: at most a rank's micro-batches."""

    @property
    def busiest(self) -> tuple[int, ...]:
        """Documents of the row with the largest area."""
        return self.rows[0]


def dealt_step(job: Job, point: Point) -> DealtStep:
    """The rows of a job with documents, at a point."""
    areas = job.sequence_areas
    count = job.micro_batches(point)
    dealt = deal(areas, point.dp, count) if job.evened else in_turn(len(areas), point.dp, count)
    loads = [[sum(areas[number] for number in row) for row in rank] for rank in dealt]
    # Weights that are gathered for each layer make all groups compute their micro-batches side by side.
    if point.zero == 3:
        waited = sum(map(max, zip(*loads, strict=True)))
    else:
        waited = max(map(sum, loads))
    rows = [row for rank in dealt for row in rank]
    of_rows = [area for rank in loads for area in rank]
    order = sorted(range(len(rows)), key=lambda row: -of_rows[row])
    return DealtStep(
        rows=tuple(_documents(job, rows[row]) for row in order),
        areas=tuple(of_rows[row] for row in order),
        waited=waited / of_rows[order[0]],
    )


def _documents(job: Job, row: MicroBatch) -> tuple[int, ...]:
    """Of a row's sequences, end to end."""
    return tuple(length for number in row for length in job.sequences[number])


def in_turn(count: int, ranks: int, micro_batches: int) -> list[list[MicroBatch]]:
    """What packing by tokens alone does: micro-batches in the sequences' order, to one rank after the other.

    Args:
        count: sequences of a step.
        ranks: data-parallel ranks.
        micro_batches: of each rank.
    """
    size = count // (ranks * micro_batches)
    cut = [tuple(range(first, first + size)) for first in range(0, count, size)]
    return [cut[rank::ranks] for rank in range(ranks)]


def spread(rows: Sequence[tuple[int, ...]], most: int) -> Sequence[tuple[int, ...]]:
    """At most so many of some rows, from the first to the last at equal distances."""
    if len(rows) <= most:
        return rows
    return [rows[number * (len(rows) - 1) // (most - 1)] for number in range(most)]
