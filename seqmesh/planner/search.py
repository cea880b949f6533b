"""The search: every legal point of a job, best first, in well under the time that pricing all would take.

    1. every mesh, micro-batch and ZeRO stage     its time without a memory saver: a lower bound
    2. in the order of that bound                 add savers (tiling, checkpointing, offload) until it fits
    3. stop                                       when the next bound is above the worst of the best few

A saver never makes a step faster, so once a point fits, the same point with one saver more is dominated and
never priced; and a mesh whose bound is above the best few cannot enter them. Nothing else is left out:
`tests/test_plan_search.py` compares with brute force.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import nsmallest
from math import inf

from seqmesh.planner.candidates import Mesh, Pins, mesh_of, meshes, with_savers
from seqmesh.planner.cost.estimate import StepEstimate
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.legality import is_legal, is_pool, violations
from seqmesh.planner.inputs.point import CHOICES, KEYS, Point, as_pin


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found."""

    best: tuple[StepEstimate, ...]
    """Points that fit, best first, one for every mesh."""
    infeasible: tuple[StepEstimate, ...]
    """Points that do not fit, the smallest shortfall first: filled if nothing fits or something is pinned."""
    meshes: int
    """Legal meshes that were compared."""


@dataclass(frozen=True)
class _Bound:
    """A legal point with the fewest savers, and the seconds that no point with more of them goes below."""

    seconds: float
    """inf if it cannot fit with any savers."""
    point: Point


def search(costs: CostModel, pins: Pins, top: int = 5) -> Found:
    """The best points of a job.

    Args:
        costs: of the job.
        pins: values that are fixed, by the keys of `Point`.
        top: how many meshes to return.

    Raises:
        ValueError: no legal point has these pins; the message is the rule that they break.
    """
    bounds = sorted(_bounds(costs, pins), key=lambda bound: bound.seconds)
    if not bounds:
        raise ValueError(explain_pins(costs.job, pins))
    best = _best_of_meshes(costs, bounds, pins, top)
    ranked = nsmallest(top, best.values(), key=lambda estimate: (estimate.seconds, estimate.memory.total))
    infeasible = () if ranked and not pins else _infeasible(costs, pins, top)
    compared = {mesh_of(bound.point) for bound in bounds}
    return Found(best=tuple(ranked), infeasible=infeasible, meshes=len(compared))


def _best_of_meshes(costs: CostModel, bounds: list[_Bound], pins: Pins, top: int) -> dict[Mesh, StepEstimate]:
    """The fastest point that fits of each mesh, of at least the `top` fastest meshes."""
    best: dict[Mesh, StepEstimate] = {}
    limit = inf
    for bound in bounds:
        if bound.seconds > limit or bound.seconds == inf:
            break
        for estimate in _fitting(costs, bound.point, pins):
            mesh = mesh_of(estimate.point)
            if mesh not in best or estimate.seconds < best[mesh].seconds:
                best[mesh] = estimate
        if len(best) >= top:
            limit = nsmallest(top, (estimate.seconds for estimate in best.values()))[-1]
    return best


def _bounds(costs: CostModel, pins: Pins) -> Iterator[_Bound]:
    """Every legal mesh, micro-batch and ZeRO stage with the fewest savers that the pins allow."""
    for point in meshes(costs.job, pins):
        legal = next((p for p in with_savers(costs.job, point, pins) if is_legal(costs.job, p)), None)
        if legal is not None:
            yield _Bound(costs.seconds(legal) if _could_fit(costs, point, pins) else inf, legal)


def _could_fit(costs: CostModel, point: Point, pins: Pins) -> bool:
    """Whether a lower bound of the memory with all savers that the pins allow is within the capacity."""
    savers = costs.job.stack.savers
    # The last value of these two takes the least memory.
    smallest = point.but(
        tiling=pins.get("tiling", savers["tiling"][-1]), offload=pins.get("offload", savers["offload"][-1])
    )
    # Neither kind is always the smaller: with checkpoints one layer's activations are there besides.
    kinds = [pins["checkpointing"]] if "checkpointing" in pins else savers["checkpointing"]
    return any(costs.memory.floor(smallest.but(checkpointing=kind)) <= costs.job.capacity for kind in kinds)


def _fitting(costs: CostModel, base: Point, pins: Pins) -> Iterator[StepEstimate]:
    """The points of a mesh that fit and that no other that fits dominates.

    Savers are added one value at a time.
    """
    fitted: list[Point] = []
    for point in with_savers(costs.job, base, pins):
        if costs.memory.floor(point) > costs.job.capacity:
            continue
        if any(_dominates(smaller, point) for smaller in fitted):
            continue
        if is_legal(costs.job, point) and costs.memory.of(point).fits(costs.job):
            fitted.append(point)
            yield costs.estimate(point)


def _dominates(a: Point, b: Point) -> bool:
    """Whether b has every saver of a, at the same value or one that saves more."""
    for saver, values in CHOICES.items():
        if values.index(getattr(a, saver)) > values.index(getattr(b, saver)):
            return False
    # Offload is no chain: of activations and of the optimizer, neither has the other.
    return a.offload == b.offload or a.offload == "none" or b.offload == "both"


@dataclass(frozen=True)
class _Misfit:
    """A legal point that does not fit."""

    over: int
    """Bytes too much."""
    point: Point


def _infeasible(costs: CostModel, pins: Pins, top: int) -> tuple[StepEstimate, ...]:
    """Of the meshes where nothing fits, the smallest points, those with the smallest shortfall first."""
    smallest: list[_Misfit] = []
    for base in meshes(costs.job, pins):
        if "micro_batch" not in pins and base.micro_batch > 1:
            continue  # a larger micro-batch never takes less memory
        misfit = _smallest_misfit(costs, base, pins)
        if misfit is not None:
            smallest.append(misfit)
    nearest = nsmallest(top, smallest, key=lambda misfit: misfit.over)
    return tuple(costs.estimate(misfit.point) for misfit in nearest)


def _smallest_misfit(costs: CostModel, base: Point, pins: Pins) -> _Misfit | None:
    """Of a mesh the point with the smallest shortfall; None if some point fits, or none is legal."""
    misfits: list[_Misfit] = []
    for point in with_savers(costs.job, base, pins):
        if not is_legal(costs.job, point):
            continue
        memory = costs.memory.of(point)
        if memory.fits(costs.job):
            return None
        misfits.append(_Misfit(memory.over(costs.job), point))
    return min(misfits, key=lambda misfit: misfit.over, default=None)


def fits_at_all(costs: CostModel, pins: Pins) -> bool:
    """Whether any legal point with these pins fits. No time is computed."""
    job = costs.job
    # Tiling takes no memory anywhere, so its last value is enough; other savers trade one for another.
    tiled = {**pins, "tiling": pins.get("tiling", job.stack.savers["tiling"][-1])}
    for mesh in meshes(job, pins):
        for point in with_savers(job, mesh, tiled):
            if costs.memory.floor(point) > job.capacity or not is_legal(job, point):
                continue
            if costs.memory.of(point).fits(job):
                return True
    return False


def any_legal(costs: CostModel, pins: Pins) -> bool:
    """Whether any legal point has these pins, whether it fits or not."""
    job = costs.job
    for mesh in meshes(job, pins):
        if any(is_legal(job, point) for point in with_savers(job, mesh, pins)):
            return True
    return False


def explain_pins(job: Job, pins: Pins) -> str:
    """Why no legal point has these pins: the rule that the nearest point breaks."""
    named = {key: value for key, value in pins.items() if key in KEYS}
    point = Point(zero=job.stack.zero_stages[0]).but(**named)
    # The GPUs that the pins leave over go to the first axis that is free, so that their number is no mistake.
    free = [key for key in ("ring", "dp", "ulysses", "tp", "pp") if key not in pins]
    rest = job.cluster.gpus // max(1, point.gpus)
    if free and job.cluster.gpus % point.gpus == 0:
        point = point.but(**{free[0]: rest * getattr(point, free[0])})
    if "pool" not in pins:
        point = point.but(pool=is_pool(job, point))
    broken = next(violations(job, point), "no degrees divide these GPUs and this batch; change one of them")
    what = ", ".join(as_pin(key, value) for key, value in pins.items()) or f"{job.cluster.gpus} GPUs"
    return f"no legal mesh with {what}: {broken}"
