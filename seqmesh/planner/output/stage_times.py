"""Seconds of each stage of one attention call on the ring, which the estimate has only as a sum."""

from dataclasses import dataclass, replace

from seqmesh.planner.cost.attention import AttentionCost, Pass, attention_cost
from seqmesh.planner.cost.ring_load import RingLoad, StageLoad
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.point import Point


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Seconds of one ring stage: its compute, and the fetch of its rows beside the stage before."""

    kernel: float
    merge: float
    fetch: float
    exposed: float
    """The part of `fetch` that the stage before does not hide."""

    def times(self, share: float) -> "StageTime":
        """So much of it."""
        return StageTime(
            kernel=share * self.kernel,
            merge=share * self.merge,
            fetch=share * self.fetch,
            exposed=share * self.exposed,
        )


@dataclass(frozen=True)
class StageTimes:
    """The stages of one attention call, in their order."""

    forward: list[StageTime]
    backward: list[StageTime]


def stage_times(costs: CostModel, point: Point) -> StageTimes:
    """The stages of one attention call; they add up to `costs.attention(point)`.

    Where layers see more or less, a call is the mean of theirs: the stages of one kind, then of the other,
    each as long as its share of the layers.
    """
    found = StageTimes([], [])
    for key, share in costs.loads.keys(point):
        of_kind = _of_load(costs, point, costs.loads.of(key))
        found.forward.extend(stage.times(share) for stage in of_kind.forward)
        found.backward.extend(stage.times(share) for stage in of_kind.backward)
    return found


def _of_load(costs: CostModel, point: Point, ring: RingLoad) -> StageTimes:
    """The stages in layers with this load.

    Each is the cost of a call that has this stage alone. How much of its fetch is exposed depends on the
    stage before: that is what the two together have more than the one before has alone.
    """
    job = costs.job
    shape = costs.attention_shape(point)
    ulysses_group, ring_group = costs.group(point, "ulysses"), costs.group(point, "ring")

    def cost_of(*stages: StageLoad) -> AttentionCost:
        only = replace(ring, stages=tuple(replace(stage, count=1) for stage in stages))
        return attention_cost(job, only, shape, ulysses_group, ring_group)

    forward: list[StageTime] = []
    backward: list[StageTime] = []
    before: StageLoad | None = None
    for stage in ring.stages:
        for number in range(min(stage.count, 2)):  # those after the second are like the second
            times = stage.count - 1 if number else 1
            alone = cost_of(stage)
            if before is None:
                forward += [_time(alone.forward, alone.forward.rows_exposed_s)] * times
                backward += [_time(alone.backward, alone.backward.rows_exposed_s)] * times
            else:
                lead, pair = cost_of(before), cost_of(before, stage)
                forward += [_time(alone.forward, _more(pair.forward, lead.forward))] * times
                backward += [_time(alone.backward, _more(pair.backward, lead.backward))] * times
            before = stage
    return StageTimes(forward, backward)


def _more(pair: Pass, lead: Pass) -> float:
    """What the second of a pair of stages adds to the exposed seconds of the first."""
    return pair.rows_exposed_s - lead.rows_exposed_s


def _time(alone: Pass, exposed: float) -> StageTime:
    return StageTime(kernel=alone.kernel_s, merge=alone.merge_s, fetch=alone.rows_s, exposed=exposed)
