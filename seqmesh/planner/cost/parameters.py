"""Weights of a rank before ZeRO shards them: a pipeline stage's share of a tensor-parallel shard.

The first stage holds the embedding, the last one the output head; where the two are one matrix (tied), the
last stage of several holds a copy.
"""

from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point


def stage_parameters(job: Job, point: Point, *, first: bool = True, last: bool = True) -> int:
    """Weights of one rank of a pipeline stage, which may be the first, the last, or both."""
    model = job.model
    if point.pp == 1:
        return model.parameters // point.tp
    ends = int(first) + int(last)
    return (job.layers(point) * model.layer_parameters + ends * model.embedding_parameters) // point.tp


def fullest_parameters(job: Job, point: Point) -> int:
    """Weights of a rank of the fuller end stage of the pipeline."""
    if point.pp == 1:
        return stage_parameters(job, point)
    return max(stage_parameters(job, point, last=False), stage_parameters(job, point, first=False))


def mean_parameters(job: Job, point: Point) -> float:
    """Weights of a rank, on average over the pipeline's stages."""
    if point.pp == 1:
        return stage_parameters(job, point)
    model = job.model
    return (model.layers * model.layer_parameters + 2 * model.embedding_parameters) / point.tp / point.pp
