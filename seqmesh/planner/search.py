"""The search: every legal point of a job, best first, in well under the time that pricing all of them would
take.

    1. every mesh (tp, ulysses, ring, dp, pp), micro-batch and ZeRO stage     priced without a memory saver: a lower bound of its time
    2. in the order of that bound                                             add savers (tiling, checkpointing, offload) until it fits
    3. stop                                                                   when the next bound is above the worst of the best few

A saver never makes a step faster, so once a point fits, the same point with one saver more is dominated and
never priced; and a mesh whose bound is above the best few cannot enter them. Nothing else is left out:
`tests/test_plan_search.py` compares with brute force.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from heapq import nsmallest
from itertools import product
from math import inf

from seqmesh.planner.cost.estimate import Price
from seqmesh.planner.cost.step import Pricer
from seqmesh.planner.inputs.job import CHECKPOINTING, KEYS, OFFLOAD, TILING, Job, Point, is_legal, violations

SAVERS: dict[str, tuple[int | str, ...]] = {
    "tiling": TILING,
    "checkpointing": CHECKPOINTING,
    "offload": OFFLOAD,
}
"""Values of each saver, each one at least as slow as those before it."""

Pins = Mapping[str, int | str]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found."""

    best: tuple[Price, ...]
    """Points that fit, best first, one for every mesh."""
    misfits: tuple[Price, ...]
    """Points that do not fit, the smallest shortfall first: filled if nothing fits or something is pinned."""
    meshes: int
    """Legal meshes that were compared."""


def search(pricer: Pricer, pins: Pins, top: int = 5) -> Found:
    """The best points of a job.

    Args:
        pricer: of the job.
        pins: values that are fixed, by the keys of `Point`.
        top: how many meshes to return.

    Raises:
        ValueError: no legal point has these pins; the message is the rule that they break.
    """
    bounds = sorted(_bounds(pricer, pins), key=lambda bound: bound[0])
    if not bounds:
        raise ValueError(explain_pins(pricer.job, pins))
    best: dict[tuple[int, ...], Price] = {}
    limit = inf
    for seconds, base in bounds:
        if seconds > limit or seconds == inf:
            break
        for price in _fitting(pricer, base, pins):
            mesh = mesh_of(price.point)
            if mesh not in best or price.seconds < best[mesh].seconds:
                best[mesh] = price
        if len(best) >= top:
            limit = nsmallest(top, (price.seconds for price in best.values()))[-1]
    ranked = tuple(nsmallest(top, best.values(), key=lambda price: (price.seconds, price.memory.total)))
    misfits = () if ranked and not pins else _misfits(pricer, pins, top)
    return Found(best=ranked, misfits=misfits, meshes=len({mesh_of(base) for _, base in bounds}))


def mesh_of(point: Point) -> tuple[int, ...]:
    """The degrees of a point."""
    return point.tp, point.ulysses, point.ring, point.dp, point.pp


def _bounds(pricer: Pricer, pins: Pins) -> Iterator[tuple[float, Point]]:
    """Every legal mesh, micro-batch and ZeRO stage with the fewest savers that the pins allow, and its time:
    inf if it cannot fit.
    """
    for point in meshes(pricer.job, pins):
        legal = next((p for p in _savers(point, pins) if is_legal(pricer.job, p)), None)
        if legal is not None:
            yield pricer.seconds(legal) if _could_fit(pricer, point, pins) else inf, legal


def _could_fit(pricer: Pricer, point: Point, pins: Pins) -> bool:
    """Whether a lower bound of the memory with all savers that the pins allow is within the capacity."""
    if pricer.job.stack == "trainer":
        return True
    least = {"tiling": "mlp", "offload": "both"} | {
        key: value for key, value in pins.items() if key in SAVERS
    }
    kinds = [pins["checkpointing"]] if "checkpointing" in pins else CHECKPOINTING
    return any(
        pricer.memory.floor(point.but(**(least | {"checkpointing": kind}))) <= pricer.job.capacity
        for kind in kinds
    )


def meshes(job: Job, pins: Pins) -> Iterator[Point]:
    """Every way to write the number of GPUs as tp x ulysses x ring x dp x pp, with every micro-batch and ZeRO
    stage the pins allow.

    ZeRO-0 is left out unless pinned: where there are replicas, ZeRO-1 sends no more and takes less memory.
    """
    m = job.model

    def options(key: str, left: int, most: int) -> list[int]:
        if key in pins:
            return [int(pins[key])] if left % int(pins[key]) == 0 else []
        return [d for d in divisors(left) if d <= most]

    gpus = job.cluster.gpus
    for tp in options("tp", gpus, m.kv_heads):
        for ulysses in options("ulysses", gpus // tp, max(1, m.heads // tp)):
            for pp in options("pp", gpus // tp // ulysses, m.layers):
                for dp in options("dp", gpus // tp // ulysses // pp, job.global_batch):
                    ring = gpus // tp // ulysses // pp // dp
                    if pins.get("ring", ring) != ring or job.global_batch % dp:
                        continue
                    micro = (
                        [int(pins["micro_batch"])]
                        if "micro_batch" in pins
                        else divisors(job.global_batch // dp)
                    )
                    sharded = ulysses * ring * dp > 1 and job.stack != "trainer"
                    stages = [int(pins["zero"])] if "zero" in pins else [1, 2, 3] if sharded else [0]
                    for zero, micro_batch in product(stages, micro):
                        yield Point(
                            tp=tp,
                            ulysses=ulysses,
                            ring=ring,
                            dp=dp,
                            pp=pp,
                            zero=zero,
                            micro_batch=micro_batch,
                        )


def divisors(n: int) -> list[int]:
    """The divisors of n, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _savers(point: Point, pins: Pins) -> Iterator[Point]:
    """A mesh with every combination of savers that the pins allow, fewest first."""
    for changes in _combinations(tuple(pins.get(key) for key in SAVERS)):
        yield point.but(**changes)


@lru_cache(maxsize=256)
def _combinations(pinned: tuple[int | str | None, ...]) -> list[dict[str, int | str]]:
    values = [SAVERS[key] if value is None else (value,) for key, value in zip(SAVERS, pinned, strict=True)]
    ordered = sorted(
        product(*(enumerate(options) for options in values)), key=lambda c: sum(level for level, _ in c)
    )
    return [
        {key: value for key, (_, value) in zip(SAVERS, combination, strict=True)} for combination in ordered
    ]


def _fitting(pricer: Pricer, base: Point, pins: Pins) -> Iterator[Price]:
    """The points of a mesh that fit and that no other that fits dominates: savers are added one level at a
    time.
    """
    fitted: list[Point] = []
    for point in _savers(base, pins):
        if pricer.memory.floor(point) > pricer.job.capacity or any(
            _dominates(smaller, point) for smaller in fitted
        ):
            continue
        if is_legal(pricer.job, point) and pricer.memory.of(point).fits(pricer.job):
            fitted.append(point)
            yield pricer.price(point)


def _dominates(a: Point, b: Point) -> bool:
    """Whether b has every saver of a, at the same or a higher level."""
    levels = ((SAVERS[key].index(getattr(a, key)), SAVERS[key].index(getattr(b, key))) for key in SAVERS)
    return all(x <= y for x, y in levels) and (
        a.offload == b.offload or a.offload == "none" or b.offload == "both"
    )


def _misfits(pricer: Pricer, pins: Pins, top: int) -> tuple[Price, ...]:
    """Of the meshes where nothing fits, the smallest points, those with the smallest shortfall first."""
    smallest: list[tuple[int, Point]] = []
    for base in meshes(pricer.job, pins):
        if "micro_batch" not in pins and base.micro_batch > 1:
            continue
        legal = [p for p in _savers(base, pins) if is_legal(pricer.job, p)]
        sizes = [(pricer.memory.of(p), p) for p in legal]
        if sizes and not any(memory.fits(pricer.job) for memory, _ in sizes):
            memory, point = min(sizes, key=lambda size: size[0].over(pricer.job))
            smallest.append((memory.over(pricer.job), point))
    return tuple(pricer.price(point) for _, point in nsmallest(top, smallest, key=lambda size: size[0]))


def fits_at_all(pricer: Pricer, pins: Pins) -> bool:
    """Whether any legal point with these pins fits. No time is computed."""
    for mesh in meshes(pricer.job, pins):
        # tiling has no memory cost; other savers have
        tiled = {} if pricer.job.stack == "trainer" else {"tiling": pins.get("tiling", TILING[-1])}
        small = (p for p in _savers(mesh, {**pins, **tiled}) if pricer.memory.floor(p) <= pricer.job.capacity)
        if any(pricer.memory.of(p).fits(pricer.job) for p in small if is_legal(pricer.job, p)):
            return True
    return False


def any_legal(pricer: Pricer, pins: Pins) -> bool:
    """Whether any legal point has these pins, whether it fits or not."""
    return any(is_legal(pricer.job, p) for mesh in meshes(pricer.job, pins) for p in _savers(mesh, pins))


def explain_pins(job: Job, pins: Pins) -> str:
    """Why no legal point has these pins: the rule that the nearest point breaks."""
    named = {key: value for key, value in pins.items() if key in KEYS}
    point = Point(zero=0 if job.stack == "trainer" else 1).but(**named)
    free = [key for key in ("ring", "dp", "ulysses", "tp", "pp") if key not in pins]
    rest = job.cluster.gpus // max(1, point.gpus)
    if free and job.cluster.gpus % point.gpus == 0:
        point = point.but(**{free[0]: rest * getattr(point, free[0])})
    broken = list(violations(job, point))
    what = ", ".join(f"{key}={value}" for key, value in pins.items()) or f"{job.cluster.gpus} GPUs"
    return f"no legal mesh with {what}: {broken[0] if broken else 'no degrees divide these GPUs and this batch; change one of them'}"
