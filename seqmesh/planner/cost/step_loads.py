"""Ring loads of a job's points: one sequence's, or of packed documents the row that all wait for.

    causal sequences      one schedule for all
    packed documents      rows, as the trainer deals them (dealing.py): the schedule of the busiest,
                          its pairs scaled so that all micro-batches have what the step waits for

Trade-off: of several micro-batches the busiest one's blocks and exchanges stand for all. Pairs are exact.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

from seqmesh import masks
from seqmesh.layouts import Layout, load
from seqmesh.masks import Mask
from seqmesh.planner.cost.attention import AttentionShape, attention_cost
from seqmesh.planner.cost.dealing import DealtStep, dealt_step, spread
from seqmesh.planner.cost.network import Group, place
from seqmesh.planner.cost.ring_load import RingLoad, lay_out, ring_load
from seqmesh.planner.inputs.job import Job, LayerReach
from seqmesh.planner.inputs.point import Point
from seqmesh.schedule.chains import Chains, chains_of
from seqmesh.schedule.hops import Stages

MOST_ROWS = 16
"""Rows of a step whose K/V rows are counted: of more, so many from the heaviest to the lightest."""


class Loads:
    """Ring loads of a job, each computed once.

    A ring passes through an exchange for each hop that is used, which hides most; where only few rows travel
    (packed documents, windows, short shards) fewer exchanges cost less latency. Where the stack may choose,
    `stages` is chosen by the time of one attention on the ring alone, among what `Schedule.build` takes.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._of = lru_cache(maxsize=None)(self._load)
        self.laid = lru_cache(maxsize=None)(self._lay)

    def __call__(self, ring: int, reach: LayerReach | None = None) -> RingLoad:
        """The load of a ring degree in some layers; in those that see most, if it is not said."""
        return self._of(ring, reach or self._job.reaches[0])

    def _load(self, ring: int, reach: LayerReach) -> RingLoad:
        documents = self._job.sequences[0] if self._job.documents else (self._job.seq_len,)
        return self.in_layers(documents, reach, self._job.layout, ring)

    def in_layers(self, documents: tuple[int, ...], reach: LayerReach, layout: str, ring: int) -> RingLoad:
        """The load of a row of documents in some layers, in the layout of all."""
        return self.fastest(self._job.mask_of(documents, reach), self.laid(documents, layout, ring), ring)

    def _lay(self, documents: tuple[int, ...], layout: str, ring: int) -> Layout:
        """The one layout of all layers."""
        reaches = self._job.reaches
        found = [self._job.mask_of(documents, reach) for reach in reaches]
        return lay_out(found, [reach.layers for reach in reaches], layout, ring)

    def fastest(self, mask: Mask, layout: Layout, ring: int) -> RingLoad:
        """The load of some mask and layout with the fastest exchanges."""
        half_rows = self._job.assumptions.attention_half_rows
        found = ring_load(mask, layout, ring, half_rows, self._stages(mask, ring))
        if len(found) == 1:
            return found[0]
        return min(found, key=self._seconds)

    def _stages(self, mask: Mask, ring: int) -> Sequence[Stages]:
        """Values of `stages` to compare.

        A causal sequence needs all of its ring: merged by number, it would have too much to hide at once.
        """
        if ring <= 2 or not self._job.stack.chooses_stages:
            return [None]
        if mask == masks.causal(mask.q_len):
            return [None, "auto"]
        return [None, "auto", *sorted({1, isqrt(ring)} - {ring - 1})]

    def _seconds(self, load: RingLoad) -> float:
        """Forward and backward of one attention on this ring alone; no heads are exchanged."""
        shape = AttentionShape.of(self._job, batch=1, ulysses=1)
        cost = attention_cost(self._job, load, shape, self._ring_group(1), self._ring_group(load.layout.ring))
        return cost.forward.seconds + cost.backward.seconds

    def _ring_group(self, size: int) -> Group:
        return place(("ring",), (size,), frozenset(("ring",)), self._job.cluster.gpus_per_node)


class LoadKey(NamedTuple):
    """What a point's load depends on; without documents, on the ring alone."""

    ring: int
    reach: LayerReach
    """Of the layers that are meant."""
    dp: int = 1
    micro_batch: int = 1
    pool: bool = False
    waits_each: bool = False
    """Whether groups wait for each other after every micro-batch: ZeRO-3."""

    @property
    def deal(self) -> tuple[int, int, bool]:
        """What its rows depend on."""
        return self.dp, self.micro_batch, self.waits_each


class KindOfLayers(NamedTuple):
    """Layers with one load."""

    key: LoadKey
    share: float
    """Of all layers."""


class StepLoads(Loads):
    """Ring loads of the points of a job, each computed once."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._kinds = lru_cache(maxsize=None)(self._all_kinds)
        self._of_point = lru_cache(maxsize=None)(self._micro_batch)
        self._of_row = lru_cache(maxsize=None)(self._row_load)
        self._dealt = lru_cache(maxsize=None)(self._deal)
        self._moved = lru_cache(maxsize=None)(self._mean_rows)
        self._chains = lru_cache(maxsize=None)(self._chains_of)

    def keys(self, point: Point) -> tuple[KindOfLayers, ...]:
        """What the loads of a point's layers depend on, by kind; those that see most first."""
        first = LoadKey(point.ring, self._job.reaches[0])
        if self._job.documents:
            first = LoadKey(*first[:2], point.dp, point.micro_batch, point.pool, point.zero == 3)
        return self._kinds(first)

    def _all_kinds(self, first: LoadKey) -> tuple[KindOfLayers, ...]:
        layers = self._job.model.layers
        return tuple(
            KindOfLayers(first._replace(reach=reach), reach.layers / layers) for reach in self._job.reaches
        )

    def of(self, key: LoadKey) -> RingLoad:
        """The load of one micro-batch, such that a step takes as long as so many of them."""
        return self._of_point(key)

    def batch(self, point: Point) -> int:
        """Sequences that attention sees side by side: documents of several lie end to end in one."""
        return 1 if self._job.documents else point.micro_batch

    def chains(self, point: Point) -> Chains:
        """The pieces of documents on the ulysses x ring ranks: of the row that all wait for."""
        return self._chains(self.keys(point)[0].key, point.ulysses)

    def _chains_of(self, key: LoadKey, ulysses: int) -> Chains:
        job = self._job
        row = self._dealt(*key.deal).busiest if job.documents else (job.seq_len,)
        return chains_of(job.mask_of(row, LayerReach(None, 0)), self.of(key).layout, ulysses)

    def rows_moved(self, key: LoadKey) -> float:
        """K/V rows that all ranks of a ring send for a micro-batch in a forward: the mean over the step's."""
        if not self._job.documents:
            return self.of(key).rows_moved
        return self._moved(key._replace(waits_each=False))

    def _micro_batch(self, key: LoadKey) -> RingLoad:
        if not self._job.documents:
            return self(key.ring, key.reach)
        dealt = self._dealt(*key.deal)
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

    def _deal(self, dp: int, micro_batch: int, waits_each: bool) -> DealtStep:
        return dealt_step(self._job, Point(dp=dp, micro_batch=micro_batch, zero=3 if waits_each else 1))

    def _row_load(self, key: LoadKey) -> RingLoad:
        row = self._dealt(*key.deal).busiest
        return self.in_layers(row, key.reach, self._layout(key), key.ring)

    def _layout(self, key: LoadKey) -> str:
        return "balanced" if key.pool else self._job.layout

    def _mean_rows(self, key: LoadKey) -> float:
        if key.ring == 1:
            return 0.0
        moved = []
        for row in spread(self._dealt(*key.deal).rows, MOST_ROWS):
            laid = self.laid(row, self._layout(key), key.ring)
            moved.append(sum(load.rows_received(self._job.mask_of(row, key.reach), laid)))
        return sum(moved) / len(moved)
