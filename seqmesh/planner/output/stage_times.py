"""Seconds of each stage of one attention call on the ring, which the estimate has only as a sum."""

from dataclasses import replace

from seqmesh.planner.cost.attention import AttentionCost, attention_cost, mean_cost
from seqmesh.planner.cost.ring_load import StageLoad
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.point import Point


def stage_times(costs: CostModel, point: Point) -> list[AttentionCost]:
    """The stages of one attention call: they add up to `costs.attention(point)`, but for heads and bytes.

    A stage is what a call costs that has it and the stage before, less one that has only that: the stage
    before is there since it hides the fetch of this one's rows. Where layers see more or less, a call is the
    mean of theirs: the stages of one kind, then of the other, each as long as its share of the layers.
    """
    shape = costs.attention_shape(point)
    groups = costs.group(point, "ulysses"), costs.group(point, "ring")
    found = []
    for key, share in costs.loads.keys(point):
        ring = costs.loads.of(key)
        before: tuple[StageLoad, ...] = ()
        for stage in ring.stages:
            one = replace(stage, count=1)
            for _ in range(stage.count):
                longer, shorter = (
                    attention_cost(costs.job, replace(ring, stages=stages), shape, *groups)
                    for stages in ((*before, one), before)
                )
                found.append(mean_cost(((longer, share), (shorter, -share))))
                before = (one,)
    return found
