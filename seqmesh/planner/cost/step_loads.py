"""Ring loads of a job's points: one sequence's, or of packed documents the row that all wait for.

    causal sequences      one schedule for all
    packed documents      rows, as the trainer deals them (trainer/dealing.py): the schedule of the busiest,
                          its pairs scaled so that all micro-batches have what the step waits for

Trade-off: of several micro-batches the busiest one's blocks and exchanges stand for all. Pairs are exact.
"""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from seqmesh import layouts
from seqmesh.layouts import load
from seqmesh.planner.cost.attention import Loads
from seqmesh.planner.cost.ring_load import RingLoad
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.trainer.dealing import DealtStep, dealt_step, spread

MOST_ROWS = 16
"""Rows of a step whose K/V rows are counted: of more, so many from the heaviest to the lightest."""


class LoadKey(NamedTuple):
    """What a point's load depends on; without documents, on the ring alone."""

    ring: int
    dp: int = 1
    micro_batch: int = 1
    pool: bool = False
    waits_each: bool = False
    """Whether groups wait for each other after every micro-batch: ZeRO-3."""


class StepLoads(Loads):
    """Ring loads of the points of a job, each computed once."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._of_point = lru_cache(maxsize=None)(self._micro_batch)
        self._of_row = lru_cache(maxsize=None)(self._row_load)
        self._dealt = lru_cache(maxsize=None)(self._deal)
        self._moved = lru_cache(maxsize=None)(self._mean_rows)

    def key(self, point: Point) -> LoadKey:
        """What the load of a point depends on."""
        if not self._job.documents:
            return LoadKey(point.ring)
        return LoadKey(point.ring, point.dp, point.micro_batch, point.pool, point.zero == 3)

    def of(self, key: LoadKey) -> RingLoad:
        """The load of one micro-batch, such that a step takes as long as so many of them."""
        return self._of_point(key)

    def batch(self, point: Point) -> int:
        """Sequences that attention sees side by side: documents of several lie end to end in one."""
        return 1 if self._job.documents else point.micro_batch

    def rows_moved(self, key: LoadKey) -> float:
        """K/V rows that all ranks of a ring send for a micro-batch in a forward: the mean over the step's."""
        if not self._job.documents:
            return self.of(key).rows_moved
        return self._moved(key._replace(waits_each=False))

    def _micro_batch(self, key: LoadKey) -> RingLoad:
        if not self._job.documents:
            return self(key.ring)
        dealt = self._dealt(key._replace(ring=1))
        busiest = self._of_row(key._replace(waits_each=False))
        share = dealt.waited * key.dp * key.micro_batch / self._job.global_batch
        waited = share * dealt.areas[0]
        return replace(
            busiest,
            stages=tuple(
                replace(stage, pairs=round(share * stage.pairs), slow_pairs=share * stage.slow_pairs)
                for stage in busiest.stages
            ),
            imbalance=busiest.imbalance * waited * len(dealt.rows) / sum(dealt.areas),
        )

    def _deal(self, key: LoadKey) -> DealtStep:
        zero = 3 if key.waits_each else 1
        return dealt_step(self._job, Point(dp=key.dp, micro_batch=key.micro_batch, zero=zero))

    def _row_load(self, key: LoadKey) -> RingLoad:
        row = self._dealt(key._replace(ring=1)).busiest
        return self.fastest(self._job.mask_of(row), self._layout(key), key.ring)

    def _layout(self, key: LoadKey) -> str:
        return "balanced" if key.pool else self._job.layout

    def _mean_rows(self, key: LoadKey) -> float:
        if key.ring == 1:
            return 0.0
        moved = []
        for row in spread(self._dealt(key._replace(ring=1)).rows, MOST_ROWS):
            mask = self._job.mask_of(row)
            laid = layouts.named(self._layout(key), mask, mask.q_len, key.ring)
            moved.append(sum(load.rows_received(mask, laid)))
        return sum(moved) / len(moved)
