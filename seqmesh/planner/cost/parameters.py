"""Weights of a rank before ZeRO shards them: a pipeline stage's share of a tensor-parallel shard.

The first stage holds the embedding, the last one the output head; where the two are one matrix (tied), the
last stage of several holds a copy. Layers of several kinds are taken to lie evenly over the stages. Of
experts that are spread a rank holds its share.
"""

from typing import NamedTuple

from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point


class RankWeights(NamedTuple):
    """Weights of a rank, in elements."""

    dense: float
    """That all replicas hold."""
    experts: float = 0
    """That one of `point.experts` replicas holds."""

    @property
    def whole(self) -> float:
        """All."""
        return self.dense + self.experts

    def sharded(self, point: Point) -> float:
        """A rank's part where those that hold the same weights share them."""
        return self.dense / point.replicas + self.experts * point.experts / point.replicas


def stage_parameters(job: Job, point: Point, *, first: bool = True, last: bool = True) -> RankWeights:
    """Weights of one rank of a pipeline stage, which may be the first, the last, or both."""
    model = job.model
    layers = job.layers(point)
    experts = layers * model.expert_parameters // (model.layers * point.experts)
    if point.pp == 1:
        return RankWeights((model.parameters - model.expert_parameters) // point.tp, experts)
    ends = int(first) + int(last)
    body = layers * (model.body_parameters - model.expert_parameters) // model.layers
    return RankWeights((body + ends * model.embedding_parameters) // point.tp, experts)


def fullest_parameters(job: Job, point: Point) -> RankWeights:
    """Weights of a rank of the fuller end stage of the pipeline."""
    if point.pp == 1:
        return stage_parameters(job, point)
    return max(stage_parameters(job, point, last=False), stage_parameters(job, point, first=False))


def mean_parameters(job: Job, point: Point) -> RankWeights:
    """Weights of a rank, on average over the pipeline's stages."""
    if point.pp == 1:
        return stage_parameters(job, point)
    model = job.model
    dense = model.body_parameters - model.expert_parameters + 2 * model.embedding_parameters
    return RankWeights(dense / point.tp / point.pp, model.expert_parameters / point.experts / point.pp)
