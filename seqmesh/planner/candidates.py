"""The points that a search goes through: every mesh on the GPUs, micro-batch, ZeRO stage and saver.

Most of them are legal; the few that are not (inputs/legality.py) are left out by those who ask.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import product
from math import gcd

from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.legality import is_pool, layers_of_a_stage
from seqmesh.planner.inputs.point import Point

Pins = Mapping[str, int | str]
"""Values that are fixed, by the keys of `Point`."""

Mesh = tuple[int, ...]
"""The degrees of a point: tp, ulysses, ring, dp, pp; and 1 for one pool."""


MANY_SIZES = 16
"""So many micro-batches are all tried."""
SIZES_APART = 1.5
"""Else each is so many times the one before: steps of neighbours differ by less than the model's error."""


def mesh_of(point: Point) -> Mesh:
    """The degrees of a point. One pool is another mesh than the same ring for sequence after sequence."""
    return point.tp, point.ulysses, point.ring, point.dp, point.pp, int(point.pool)


def divisors(n: int) -> list[int]:
    """The divisors of n, ascending."""
    return list(_divisors(n))


@lru_cache(maxsize=4096)
def _divisors(n: int) -> tuple[int, ...]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


def meshes(job: Job, pins: Pins) -> Iterator[Point]:
    """Every way to write the number of GPUs as tp x ulysses x ring x dp x pp, without savers.

    Each comes with every micro-batch and ZeRO stage that the pins allow and the stack tries.
    """
    for mesh in bare_meshes(job, pins):
        yield from variants(job, mesh, pins)


def bare_meshes(job: Job, pins: Pins) -> Iterator[Point]:
    """The same, each once: with any micro-batch and ZeRO stage."""
    m = job.model
    gpus = job.cluster.gpus
    fixed = {key: pins[key] for key in ("pipeline", "virtual") if key in pins}
    most_tp = 1 if m.not_shared_by_tp else m.kv_heads
    for tp in _degrees("tp", gpus, most_tp, pins):
        after_tp = gpus // tp
        for ulysses in _degrees("ulysses", after_tp, max(1, m.heads // tp), pins):
            after_ulysses = after_tp // ulysses
            for pp in _degrees("pp", after_ulysses, m.layers, pins):
                after_pp = after_ulysses // pp
                for dp in _degrees("dp", after_pp, job.global_batch, pins):
                    ring = after_pp // dp
                    if pins.get("ring", ring) == ring and job.global_batch % dp == 0:
                        yield Point(tp=tp, ulysses=ulysses, ring=ring, dp=dp, pp=pp).but(**fixed)


def _degrees(axis: str, left: int, most: int, pins: Pins) -> list[int]:
    """Degrees of an axis that divide the GPUs that are left: the pinned one, or all up to `most`."""
    if axis in pins:
        pinned = int(pins[axis])
        return [pinned] if left % pinned == 0 else []
    return [degree for degree in divisors(left) if degree <= most]


def zero_stages_of(job: Job, mesh: Point, pins: Pins) -> tuple[int, ...]:
    """The ZeRO stages to try on a mesh, the usual one first."""
    if "zero" in pins:
        return (int(pins["zero"]),)
    return job.stack.zero_stages if mesh.replicas > 1 else (0,)


def micro_batches_of(job: Job, mesh: Point, pins: Pins) -> Sequence[int]:
    """The micro-batches to try on a mesh, ascending. Of very many, each is at least half as large again."""
    if "micro_batch" in pins:
        return (int(pins["micro_batch"]),)
    return _apart(_divisors(job.global_batch // mesh.dp))


@lru_cache(maxsize=4096)
def _apart(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """All sizes if they are few, else those of them that are far enough apart to tell, and the largest."""
    if len(sizes) <= MANY_SIZES:
        return sizes
    kept = [sizes[0]]
    for size in sizes[1:-1]:
        if size >= SIZES_APART * kept[-1]:
            kept.append(size)
    return (*kept, sizes[-1])


def experts_of(job: Job, mesh: Point, pins: Pins) -> Sequence[int]:
    """The ranks to try to spread experts over, on a mesh, ascending."""
    if "experts" in pins:
        return (int(pins["experts"]),)
    return _divisors(gcd(mesh.replicas, job.model.mixture.experts)) if job.model.mixture else (1,)


def variants(job: Job, mesh: Point, pins: Pins) -> Iterator[Point]:
    """A mesh with every ZeRO stage, spread of experts and micro-batch."""
    micro_batches = micro_batches_of(job, mesh, pins)
    spreads = product(zero_stages_of(job, mesh, pins), experts_of(job, mesh, pins))
    for zero, experts in spreads:
        if experts > 1 and zero < job.stack.experts_from_zero:
            continue
        for micro_batch in micro_batches:
            point = mesh.but(zero=zero, experts=experts, micro_batch=micro_batch)
            pooled = is_pool(job, point)  # the degrees say it: there is nothing to choose
            if pins.get("pool", pooled) == pooled:
                yield point.but(pool=True) if pooled else point


def orders_of(job: Job, point: Point, pins: Pins) -> list[Point]:
    """A point in every order of its pipeline that the pins allow and the stack tries, 1F1B first.

    Stages are interleaved where layers and micro-batches fill them evenly; zero-bubble has to be pinned.
    """
    pinned = "pipeline" in pins or "virtual" in pins
    if pinned or point.pp == 1 or job.stack.most_virtual == 1 or job.micro_batches(point) % point.pp:
        return [point]
    most = min(job.stack.most_virtual, job.layers(point))
    alike = partial(layers_of_a_stage, job.model.layers, point.pp, counts_ends=job.stack.counts_ends)
    tried = filter(alike, range(2, most + 1))
    return [point, *(point.but(pipeline="interleaved", virtual=virtual) for virtual in tried)]


def with_savers(job: Job, point: Point, pins: Pins) -> Iterator[Point]:
    """A point with every combination of savers that the pins allow and the stack tries, fewest first."""
    tried = job.stack.savers
    options = tuple((str(pins[saver]),) if saver in pins else values for saver, values in tried.items())
    for values in _combinations(options):
        yield point.but(**dict(zip(tried, values, strict=True)))


@lru_cache(maxsize=256)
def _combinations(options: tuple[tuple[str, ...], ...]) -> list[tuple[str, ...]]:
    """One value of each saver, in every combination; those closest to the first values first."""

    def distance(values: tuple[str, ...]) -> int:
        """How far the values are from the first ones, together."""
        return sum(option.index(value) for option, value in zip(options, values, strict=True))

    return sorted(product(*options), key=distance)
