"""What a rank sends for its weights: gradients to be reduced, and weights to be gathered, by ZeRO stage."""

from dataclasses import dataclass

from seqmesh.planner.cost.experts import expert_group
from seqmesh.planner.cost.network import Group
from seqmesh.planner.cost.parameters import RankWeights
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point


@dataclass(frozen=True, kw_only=True)
class SentForWeights:
    """Bytes that a rank sends in a step for its weights, and in how many collectives."""

    gradients: float
    weights: float
    reductions: int
    """Collectives that reduce gradients."""
    gathers: int
    """Collectives that gather weights."""


def sent_in_groups(
    job: Job, point: Point, weights: RankWeights, replicas: Group
) -> list[tuple[Group, SentForWeights]]:
    """What a rank sends for its weights to its replicas, and for experts that are spread to fewer of them."""
    if point.experts == 1:
        return [(replicas, sent_for_weights(job, point, weights.whole, point.replicas))]
    copies = point.replicas // point.experts
    return [
        (replicas, sent_for_weights(job, point, weights.dense, point.replicas)),
        (expert_group(job, point, copies=True), sent_for_weights(job, point, weights.experts, copies)),
    ]


def sent_for_weights(job: Job, point: Point, parameters: float, ranks: int) -> SentForWeights:
    """What a rank with so many weights sends to the ranks that hold the same ones, itself among them.

    ZeRO-2 and 3 reduce every layer's gradients after every micro-batch; FSDP2 that keeps weights whole, only
    after the last. ZeRO-3 gathers in the forward and in the backward of each.
    """
    count, layers = job.micro_batches(point), job.layers(point)
    stack = job.stack
    passes = 1 if point.zero == 2 and stack.shards_masters else count
    if point.zero < 2:
        reductions = layers if stack.gathers_ahead else 1
        sent = 1 if point.zero else 2  # an all-reduce sends what a reduce-scatter and an all-gather do
    else:
        reductions, sent = layers * passes, passes
    if point.zero == 3:
        gathers, gathered = 2 * layers * count, 2 * count
    else:
        gathers, gathered = layers if stack.gathers_ahead else 1, min(1, point.zero)
    part = parameters * (ranks - 1) / ranks
    return SentForWeights(
        gradients=job.numerics.gradient * part * sent,
        weights=job.numerics.element * part * gathered,
        reductions=reductions,
        gathers=gathers,
    )
