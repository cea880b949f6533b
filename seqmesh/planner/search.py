"""The search: every legal point of a job, best first, in well under the time that pricing all would take.

    1. every mesh                        a floor of its time: work, weights and bubble, and what nothing hides
                                         of experts' and tensor parallelism's exchanges
    2. the mesh with the lowest floor    its micro-batches and ZeRO stages without a memory saver: bounds,
                                         of their layers at first, then of every order of a pipeline
    3. the point with the lowest bound   savers (tiling, checkpointing, offload) until it fits with room
    4. stop                              when the next is above the worst of the best few, and no tie

A saver never makes a step faster, so once a point fits with room to spare, the same point with one saver more
is dominated and never priced; and what has a floor above the best few cannot enter them. Nothing else is left
out: `tests/test_plan_search.py` compares with brute force.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heappop, heappush, nsmallest
from itertools import groupby, takewhile
from math import inf
from operator import attrgetter

from seqmesh.planner.candidates import (
    Mesh,
    Pins,
    bare_meshes,
    experts_of,
    mesh_of,
    meshes,
    micro_batches_of,
    orders_of,
    variants,
    with_savers,
    zero_stages_of,
)
from seqmesh.planner.cost.estimate import StepEstimate
from seqmesh.planner.cost.floor import FloorModel
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.errors import TIE, is_roomy
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.legality import (
    is_legal,
    is_pool,
    knob_violations,
    mesh_violations,
    violations,
)
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
    tied: tuple[StepEstimate, ...] = ()
    """Points within TIE of the fastest, one for every mesh, the one that we would run first."""


@dataclass(frozen=True)
class _Bound:
    """A legal point with the fewest savers, and the seconds that no point with more of them goes below."""

    seconds: float
    point: Point
    is_exact: bool
    """Whether they are what the point itself takes; or what its layers do, in a pipeline's best order."""


@dataclass(frozen=True)
class _LegalMesh:
    """A mesh and a spread of experts of which some point is legal, and the seconds that none goes below."""

    floor: float
    mesh: Point
    """Its degrees, and the ranks that share experts."""


def search(costs: CostModel, pins: Pins, top: int = 5) -> Found:
    """The best points of a job: see `Search`.

    Args:
        costs: of the job.
        pins: values that are fixed, by the keys of `Point`.
        top: how many meshes to return.

    Raises:
        ValueError: no legal point has these pins; the message is the rule that they break.
    """
    return Search(costs, pins).found(top)


class Search:
    """The legal points of a job, of which the best can be asked for again and again.

    Raises:
        ValueError: no legal point has these pins; the message is the rule that they break.
    """

    def __init__(self, costs: CostModel, pins: Pins) -> None:
        self.costs = costs
        self.pins = pins
        self._meshes = list(self._legal_meshes())
        if not self._meshes:
            raise ValueError(explain_pins(costs.job, pins))
        self._bounds = lru_cache(maxsize=None)(self._bounds_of_mesh)
        self._fitting = lru_cache(maxsize=None)(self._fitting_of_bound)
        self._seconds = lru_cache(maxsize=None)(costs.seconds)

    def found(self, top: int) -> Found:
        """The best few meshes, and those that tie with the first."""
        priced = self._best_first(top, lambda _: True)
        best = _of_meshes(priced, _by_time)
        ties = [one for one in priced if one.seconds <= (1 + TIE) * best[0].seconds] if best else []
        return Found(
            best=best[:top],
            infeasible=() if best and not self.pins else _infeasible(self.costs, self.pins, top),
            meshes=len({mesh_of(legal.mesh) for legal in self._meshes}),
            tied=_of_meshes(ties, lambda one: preference(self.costs.job, one)),
        )

    def best_where(self, accept: Callable[[Point], bool]) -> StepEstimate | None:
        """The fastest of all points that fit and are accepted, or None."""
        return min(self._best_first(1, accept), key=_by_time, default=None)

    def _legal_meshes(self) -> Iterator[_LegalMesh]:
        job, pins = self.costs.job, self.pins
        floors = FloorModel(self.costs)
        for mesh in bare_meshes(job, pins):
            if any(mesh_violations(job, mesh)):
                continue
            for experts in experts_of(job, mesh, pins):
                spread = mesh.but(experts=experts)
                if any(map(self._with_fewest_savers, self._variants(spread))):
                    zero_stages = zero_stages_of(job, mesh, pins)
                    sizes = micro_batches_of(job, mesh, pins)
                    orders = orders_of(job, spread, pins)
                    floor = min(floors.floor(one, zero_stages, sizes) for one in orders)
                    yield _LegalMesh(floor, spread)

    def _variants(self, mesh: Point) -> Iterator[Point]:
        """A mesh with its spread of experts, and every ZeRO stage and micro-batch."""
        return variants(self.costs.job, mesh, {**self.pins, "experts": mesh.experts})

    def _with_fewest_savers(self, point: Point) -> Point | None:
        """Of a legal mesh's point, the one with the fewest savers that the pins and the rules allow."""
        job = self.costs.job
        found = with_savers(job, point, self.pins)
        return next((p for p in found if not any(knob_violations(job, p))), None)

    def _best_first(self, top: int, accept: Callable[[Point], bool]) -> list[StepEstimate]:
        """Points that fit: of the `top` fastest meshes, all that tie with the fastest, and some more."""
        # (seconds, number, what): the number tells things of equal seconds apart.
        queue: list[tuple[float, int, _LegalMesh | _Bound]] = []
        queue += ((mesh.floor, number, mesh) for number, mesh in enumerate(self._meshes))
        heapify(queue)
        number = len(queue)
        priced: list[StepEstimate] = []
        fastest: dict[Mesh, float] = {}
        limit = inf
        while queue and queue[0][0] <= limit:
            _, _, what = heappop(queue)
            if isinstance(what, _LegalMesh):
                for bound in self._bounds(what):
                    if accept(bound.point):
                        heappush(queue, (bound.seconds, number, bound))
                        number += 1
                continue
            if not what.is_exact:
                for point in orders_of(self.costs.job, what.point, self.pins):
                    exact = _Bound(self._seconds(point), point, is_exact=True)
                    heappush(queue, (exact.seconds, number, exact))
                    number += 1
                continue
            for one in self._fitting(what.point):
                if accept(one.point):
                    priced.append(one)
                    mesh = mesh_of(one.point)
                    fastest[mesh] = min(one.seconds, fastest.get(mesh, inf))
            if len(fastest) >= top:
                worst_shown = nsmallest(top, fastest.values())[-1]
                limit = max(worst_shown, (1 + TIE) * min(fastest.values()))
        return priced

    def _bounds_of_mesh(self, legal: _LegalMesh) -> tuple[_Bound, ...]:
        """The points of a mesh that could fit with savers, each with what its layers take without them."""
        found = []
        least: dict[Point, float] = {}  # by points without a ZeRO stage, where it says nothing of layers
        for _, alike in groupby(self._variants(legal.mesh), key=attrgetter("zero")):
            for point in self._that_could_fit(list(alike)):
                fewest = self._with_fewest_savers(point)
                if fewest is None:
                    continue
                known = fewest if self.costs.job.documents else fewest.but(zero=0)
                if known not in least:
                    orders = orders_of(self.costs.job, fewest, self.pins)
                    least[known] = min(map(self.costs.seconds_of_layers, orders))
                found.append(_Bound(least[known], fewest, is_exact=False))
        return tuple(found)

    def _that_could_fit(self, points: list[Point]) -> Iterable[Point]:
        """Of points of ascending micro-batches: no larger one fits than the first that does not."""

        def could_fit(point: Point) -> bool:
            return _could_fit(self.costs, point, self.pins)

        return points if could_fit(points[-1]) else takewhile(could_fit, points)

    def _fitting_of_bound(self, base: Point) -> tuple[StepEstimate, ...]:
        """The points of a mesh that fit and that no other that fits with room dominates.

        Savers are added one value at a time.
        """
        costs = self.costs
        roomy: list[Point] = []
        found = []
        for point in with_savers(costs.job, base, self.pins):
            if costs.memory.floor(point) > costs.job.capacity:
                continue
            if any(_dominates(smaller, point) for smaller in roomy):
                continue
            if any(knob_violations(costs.job, point)):
                continue
            memory = costs.memory.of(point)
            if memory.fits(costs.job):
                found.append(costs.estimate(point))
                if is_roomy(costs.job, memory):
                    roomy.append(point)
        return tuple(found)


def _by_time(one: StepEstimate) -> tuple[float, ...]:
    return one.seconds, one.memory.total


def preference(job: Job, one: StepEstimate) -> tuple[float, ...]:
    """What comes first among ties: room to spare, the fewest savers and stages, most headroom, time."""
    p = one.point
    savers = sum(values.index(getattr(p, saver)) for saver, values in CHOICES.items())
    return not is_roomy(job, one.memory), savers + (p.zero == 3), p.virtual, one.memory.total, one.seconds


def _of_meshes(
    priced: list[StepEstimate], key: Callable[[StepEstimate], tuple[float, ...]]
) -> tuple[StepEstimate, ...]:
    """The first of every mesh, in the order of `key`."""
    first: dict[Mesh, StepEstimate] = {}
    for one in sorted(priced, key=key):
        first.setdefault(mesh_of(one.point), one)
    return tuple(first.values())


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
    zero = job.stack.zero_stages[-1 if "experts" in pins else 0]
    point = Point(zero=zero).but(**named)
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
