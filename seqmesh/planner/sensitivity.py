"""What an answer rests on: each assumption of the cost model moved, and who wins then."""

from collections.abc import Sequence
from dataclasses import dataclass

from seqmesh.planner.candidates import Pins
from seqmesh.planner.cost.estimate import StepEstimate
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.errors import TIE
from seqmesh.planner.inputs.legality import is_legal
from seqmesh.planner.inputs.point import Point

SWING = 0.2
"""How far an assumption is moved, each way."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one value of an assumption does."""

    value: float
    change: float
    """Of the best point's time, as a share of it."""
    winner: Point | None
    """The point that wins in its place, if one does."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What moving one assumption does."""

    name: str
    trials: tuple[Trial, ...]
    """For each value that was tried."""

    @property
    def strength(self) -> float:
        """The largest change of time; 0 for an assumption of 0, of which there is no share to move."""
        return max((abs(trial.change) for trial in self.trials), default=0.0)

    @property
    def flips(self) -> bool:
        """Whether another point wins in some trial."""
        return any(trial.winner is not None for trial in self.trials)


def sensitivities(costs: CostModel, best: Sequence[StepEstimate], pins: Pins) -> list[Sensitivity]:
    """Every assumption that the best point's time, or its place as the best, rests on, the strongest first.

    The points in `best` compete anew under each changed assumption, with more savers too in case they no
    longer fit.
    """
    rivals = _rivals(costs, best, pins)
    found = []
    for assumed in costs.job.assumptions.explain():
        values = _moved(assumed.name, assumed.value)
        trials = tuple(_trial(costs, best[0], rivals, assumed.name, value) for value in values)
        found.append(Sensitivity(name=assumed.name, trials=trials))
    found.sort(key=lambda one: -one.strength)
    return [one for one in found if one.strength > 1e-4 or one.flips]


def _trial(costs: CostModel, best: StepEstimate, rivals: Sequence[Point], name: str, value: float) -> Trial:
    """The best point against its rivals with one assumption at another value."""
    other = costs.with_assumption(name, value)
    fitting = [point for point in rivals if other.memory.of(point).fits(other.job)]
    seconds = other.seconds(best.point)
    first = min(fitting, key=other.seconds, default=best.point)
    lost = best.point not in fitting or other.seconds(first) < seconds * (1 - TIE)
    return Trial(
        value=value,
        change=seconds / best.seconds - 1,
        winner=first if lost and first != best.point else None,
    )


def _rivals(costs: CostModel, best: Sequence[StepEstimate], pins: Pins) -> list[Point]:
    """The best points and, of each, the variants that save other amounts of memory."""
    stack = costs.job.stack
    points = dict.fromkeys(estimate.point for estimate in best)
    for point in list(points):
        variants = [point.but(tiling=tiling) for tiling in stack.savers["tiling"]]
        variants += [point.but(zero=zero) for zero in stack.zero_stages]
        for variant in variants:
            pinned = all(getattr(variant, key) == value for key, value in pins.items())
            if pinned and is_legal(costs.job, variant):
                points[variant] = None
    return list(points)


def _moved(name: str, value: float) -> tuple[float, ...]:
    """Values to try: 20% to each side, but for those that this would tell nothing about."""
    if name == "one_nic_per_partial_node":  # a yes or no
        return (1 - value,)
    if name in ("gradient_overlap", "prefetch") and value < 1:  # may be 0: half of what is missing to 1
        return (value + (1 - value) / 2,)
    if name == "expert_balance":  # at least 1
        return ((1 + SWING) * value,)
    if name == "overhead":  # so small that 20% of it decides nothing
        return (3 * value,)
    return ((1 - SWING) * value, (1 + SWING) * value) if value else ()
