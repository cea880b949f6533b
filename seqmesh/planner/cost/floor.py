"""Seconds that no point of a mesh goes below, without a schedule: what the search orders meshes by.

    work        of the largest micro-batch: what weights cost is spread over most tokens there; also what
                nothing hides of the exchanges of experts and of tensor parallelism
    attention   the mean ring rank's pairs, in blocks as large as its rows; no exchange, merge or launch
    bubble      of the smallest micro-batch: most of them fill the pipeline best; none of zero-bubble
    weights     what no compute hides, with all the compute there could be

A test compares it with the estimate of every point of many meshes (tests/test_plan_search.py).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import inf

from seqmesh import layouts
from seqmesh.planner.cost.attention import AttentionCost, attention_cost
from seqmesh.planner.cost.host import optimizer_terms
from seqmesh.planner.cost.network import Group
from seqmesh.planner.cost.recurrent import RecurrentLayers
from seqmesh.planner.cost.ring_load import RingLoad, StageLoad
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point

ALONE = Group(size=1, per_node=1, nodes=1, gpus_per_node=1)


class FloorModel(CostModel):
    """The cost model of a job whose attention exchanges nothing and is balanced."""

    def __init__(self, costs: CostModel) -> None:
        # Experts that are spread as far as can be, evenly, are the least work and the least to exchange.
        job, assumed = costs.job, costs.job.assumptions
        even = (
            job
            if assumed.expert_balance == 1
            else replace(job, assumptions=assumed.moved("expert_balance", 1))
        )
        super().__init__(even, costs.loads)
        self.recurrent = RecurrentLayers(even, costs.loads, self.network, scouts=False)
        self._least = lru_cache(maxsize=None)(_least_load)

    def attention(self, point: Point) -> AttentionCost:
        """A layer's attention of one micro-batch, at the least."""
        job = self.job
        sequences = 1 if not job.documents else point.micro_batch
        load = self._least(job, point.ring, sequences)
        return attention_cost(job, load, self.attention_shape(point), ALONE, ALONE)

    def floor(self, mesh: Point, zero_stages: Sequence[int], micro_batches: Sequence[int]) -> float:
        """Seconds that a mesh takes with any of these, ascending micro-batches, and any savers.

        Of a mixture the mesh has a spread of experts, and of pipelines the order that idles least.
        """
        large = mesh.but(micro_batch=micro_batches[-1])
        bubble = (mesh.pp - 1) / self.job.micro_batches(mesh.but(micro_batch=micro_batches[0]))
        bubble = 0.0 if mesh.pipeline == "zero-bubble" else bubble / mesh.virtual
        work = sum(term.seconds for term in self._work(large, self.attention(large)))
        work += self._tensor_parallel(large).exposed + sum(term.exposed for term in self._experts(large))
        return (1 + bubble) * work + min(self._weights_floor(large.but(zero=zero)) for zero in zero_stages)

    def _weights_floor(self, point: Point) -> float:
        terms = (*self._weights(point, inf), *optimizer_terms(self.job, self.compute, point))
        return sum(term.exposed for term in terms)


def _least_load(job: Job, ring: int, sequences: int) -> RingLoad:
    """A ring rank with the mean number of pairs of so many sequences in a row, as one block."""
    tokens = job.seq_len * sequences
    pairs = job.area * sequences / job.global_batch / ring
    rows = -(-tokens // ring)
    one = StageLoad(
        count=1,
        hop=0,
        pairs=round(pairs),
        slow_pairs=pairs * (1 + job.assumptions.attention_half_rows / rows),
        blocks=0,
        q_rows=0,
        sent=0,
        received=0,
    )
    return RingLoad(
        layout=layouts.contiguous(
            tokens, 1
        ),  # of as many spans as ranks it would take long, and says nothing
        stages=(one,),
        asked=None,
        exchanges=0,
        hops=((),),
        imbalance=1.0,
        rows_moved=0,
    )
