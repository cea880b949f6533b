"""Seconds of each stage of one attention call on the ring, which the estimate has only as a sum."""

from collections.abc import Iterator
from dataclasses import replace

from seqmesh.planner.cost.attention import AttentionCost, Pass, attention_cost
from seqmesh.planner.cost.ring_load import RingLoad, StageLoad
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.point import Point


def stage_times(costs: CostModel, point: Point) -> list[AttentionCost]:
    """The stages of one attention call: they add up to `costs.attention(point)`, but for heads and bytes.

    Where layers see more or less, a call is the mean of theirs: the stages of one kind, then of the other,
    each as long as its share of the layers.
    """
    found = []
    for key, share in costs.loads.keys(point):
        for longer, shorter in _one_by_one(costs, point, costs.loads.of(key)):
            forward = _added(longer.forward, shorter.forward, share)
            backward = _added(longer.backward, shorter.backward, share)
            found.append(AttentionCost(forward=forward, backward=backward))
    return found


def _one_by_one(
    costs: CostModel, point: Point, ring: RingLoad
) -> Iterator[tuple[AttentionCost, AttentionCost]]:
    """For every stage the cost of a call that has it and the stage before, and of one that has only that.

    The stage before is there since it hides the fetch of this one's rows.
    """
    shape = costs.attention_shape(point)
    groups = costs.group(point, "ulysses"), costs.group(point, "ring")

    def cost_of(*stages: StageLoad) -> AttentionCost:
        return attention_cost(costs.job, replace(ring, stages=stages), shape, *groups)

    before: tuple[StageLoad, ...] = ()
    for stage in ring.stages:
        for _ in range(stage.count):
            one = replace(stage, count=1)
            yield cost_of(*before, one), cost_of(*before)
            before = (one,)


def _added(longer: Pass, shorter: Pass, share: float) -> Pass:
    """What a stage adds to a call, in a share of the layers."""
    return Pass(
        kernel_s=share * (longer.kernel_s - shorter.kernel_s),
        merge_s=share * (longer.merge_s - shorter.merge_s),
        rows_s=share * (longer.rows_s - shorter.rows_s),
        rows_exposed_s=share * (longer.rows_exposed_s - shorter.rows_exposed_s),
    )
