"""Why the best point is the best: each reason is a comparison with a point that differs in one thing, in
numbers.

The practices are the paper's: (1) unified rather than pure sequence parallelism, (2) data parallelism before
sequence parallelism, (3) ZeRO-1 or 2 with it, ZeRO-3 and offload for memory, (4, 5) tensor parallelism, (7)
the order of the axes on the links.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from seqmesh.planner.cost.estimate import COMPUTE, PIPELINE, Price
from seqmesh.planner.cost.step import Pricer
from seqmesh.planner.inputs.job import Point, is_legal
from seqmesh.planner.inputs.units import format_bytes, format_seconds, format_tokens
from seqmesh.planner.search import Pins, divisors, fits_at_all, search

SWING = 0.2
"""How far an assumption is moved, each way, to see what rests on it."""

MOST_GPUS = 16384
"""Machines beyond which none is suggested."""
NODES_TRIED = (2, 4, 8, 16, 32, 64)
"""Multiples of the machine that `remedy` tries."""


def reasons(pricer: Pricer, price: Price, pins: Pins) -> list[str]:
    """Why a point is as it is; for a point that does not fit, what would make it fit."""
    if not price.fits:
        return [shortfall(pricer, price, pins)]
    parts = (
        _limit(price),
        _unified(pricer, price),
        _data_parallel(pricer, price),
        _zero(pricer, price, pins),
        _tensor(pricer, price),
    )
    return [text for part in (*parts, _savers(pricer, price, pins), _order(pricer, price)) for text in part]


def _limit(price: Price) -> Iterator[str]:
    causes = sorted(price.by_cause(lambda piece: piece.exposed).items(), key=lambda item: -item[1])
    shares = ", ".join(
        f"{_cause(cause)} {seconds / price.seconds:.0%}"
        for cause, seconds in causes
        if seconds > 0.005 * price.seconds
    )
    yield f"limited by {_cause(price.bound_by)}: {shares} of the step"


def _cause(cause: str) -> str:
    return {
        COMPUTE: "compute",
        PIPELINE: "the pipeline's bubble",
        "scale_up": "scale-up links",
        "pcie": "PCIe",
        "network": "the node network",
    }.get(cause, cause)


def _compared(pricer: Pricer, price: Price, other: Point) -> str | None:
    """How another point does, or None if it is not legal."""
    if not is_legal(pricer.job, other):
        return None
    memory = pricer.memory.of(other)
    if not memory.fits(pricer.job):
        return f"does not fit ({format_bytes(memory.over(pricer.job))} too much)"
    return _difference(pricer.seconds(other) / price.seconds - 1)


def _difference(share: float) -> str:
    if abs(share) < 0.0005:
        return "takes as long"
    return f"takes {abs(share):.1%} {'longer' if share > 0 else 'less'}"


def _unified(pricer: Pricer, price: Price) -> Iterator[str]:
    p, heads = price.point, pricer.job.model.heads
    if p.sp == 1:
        return
    found = []
    for name, other in (
        ("ring alone", p.but(ulysses=1, ring=p.sp)),
        ("ulysses alone", p.but(ulysses=p.sp, ring=1)),
    ):
        if (other.ulysses, other.ring) == (p.ulysses, p.ring):
            continue
        if other.ulysses > heads // p.tp:
            found.append(f"{name} is impossible with {heads // p.tp} query heads a rank")
        elif text := _compared(pricer, price, other):
            found.append(f"{name} {text}")
    if p.ring > 1:
        busiest = f"the busiest rank computes {price.imbalance:.3f}x the mean"
        yield f"layout {price.layout} over ring {p.ring}, {price.exchanges} exchange{'s' if price.exchanges > 1 else ''}: {busiest}"
    if found:
        mixed = p.ulysses > 1 and p.ring > 1
        kind = "practice 1: unified, not pure" if mixed else "pure, where practice 1 is to mix"
        yield f"ulysses {p.ulysses} x ring {p.ring} ({kind}): {'; '.join(found)}"


def _data_parallel(pricer: Pricer, price: Price) -> Iterator[str]:
    p, batch = price.point, pricer.job.global_batch
    if p.sp == 1:
        return
    if p.dp == batch:
        yield f"sequence parallelism because a batch of {batch} cannot be split over more than dp={batch} (practice 2: dp first)"
        return
    for ulysses, ring in ((p.ulysses, p.ring // 2), (p.ulysses // 2, p.ring)):
        other = p.but(ulysses=max(1, ulysses), ring=max(1, ring), dp=p.dp * 2)
        if text := _compared(pricer, price, other):
            yield f"more dp and less sequence parallelism (practice 2: dp first), u{other.ulysses} r{other.ring} dp{other.dp}: {text}"
            return


def _zero(pricer: Pricer, price: Price, pins: Pins) -> Iterator[str]:
    p = price.point
    if p.replicas == 1:
        return
    if p.zero > 1 and (text := _compared(pricer, price, p.but(zero=1))):
        yield f"ZeRO-{p.zero} {_purpose('zero', text, pins)} (practice 3: ZeRO-1 or 2 where it fits): with ZeRO-1 it {text}"
    elif p.zero == 1:
        size = price.memory.categories.get("optimizer", 0)
        where = f"takes {format_bytes(size)} of a rank" if size else "is on the host"
        yield f"ZeRO-1 over dp x sp = {p.replicas} ranks (practice 3: ZeRO-1 or 2): the optimizer {where}"


def _purpose(key: str, compared: str, pins: Pins) -> str:
    """Why a saver is there, by how the point without it does."""
    return "for memory" if "does not fit" in compared else "pinned" if key in pins else "chosen"


def _tensor(pricer: Pricer, price: Price) -> Iterator[str]:
    """The best mesh without tensor parallelism if it is used, or with it if it is not, all else equal."""
    p = price.point
    factors = [p.tp] if p.tp > 1 else divisors(pricer.job.model.kv_heads)[1:]
    others = []
    for factor in factors:
        for axis in ("ulysses", "ring", "dp"):
            degree = getattr(p, axis)
            if p.tp > 1:
                others.append(p.but(tp=1, **{axis: degree * factor}))
            elif degree % factor == 0:
                others.append(p.but(tp=factor, **{axis: degree // factor}))
    legal = [other for other in others if is_legal(pricer.job, other)]
    if legal:
        fitting = [other for other in legal if pricer.memory.of(other).fits(pricer.job)]
        best = min(fitting or legal, key=pricer.seconds)
        name = "without tensor parallelism" if p.tp > 1 else "with tensor parallelism"
        text = _compared(pricer, price, best)
        yield f"{name} (practices 4 and 5: SP in place of TP), tp{best.tp} u{best.ulysses} r{best.ring} dp{best.dp} at best: {text}"


def _savers(pricer: Pricer, price: Price, pins: Pins) -> Iterator[str]:
    """Each saver against the next lower one; without checkpoints there are none to offload."""
    p = price.point
    without_checkpoints = {
        "none": "none",
        "activations": "none",
        "optimizer": "optimizer",
        "both": "optimizer",
    }
    lower = {
        "tiling": p.but(tiling={"none": "none", "loss": "none", "mlp": "loss"}[p.tiling]),
        "checkpointing": p.but(checkpointing="none", offload=without_checkpoints[p.offload]),
        "offload": p.but(offload="none"),
    }
    for key, other in lower.items():
        value = getattr(p, key)
        if value != "none" and (text := _compared(pricer, price, other)):
            instead = f"with {key}={getattr(other, key)}" if getattr(other, key) != "none" else "without"
            yield f"{key}={value} {_purpose(key, text, pins)}: {instead} it {text}"


def _order(pricer: Pricer, price: Price) -> Iterator[str]:
    p = price.point
    if p.ulysses == 1 or p.ring == 1:
        return
    swap = {"ulysses": "ring", "ring": "ulysses"}
    other = pricer.with_axes(tuple(swap.get(axis, axis) for axis in pricer.job.axes))
    text = _difference(other.seconds(p) / price.seconds - 1)
    faster, slower = sorted(("ulysses", "ring"), key=pricer.job.axes.index)
    practice = "practice 7: faster links inside" if faster == "ulysses" else "against practice 7"
    yield f"{faster} inside, {slower} outside ({practice}): the other way round {text}"


def why_not(best: Price, other: Price) -> str:
    """What the runner-up loses by."""
    mine = {piece.name: piece.exposed for piece in best.pieces}
    theirs = {piece.name: piece.exposed for piece in other.pieces}
    lost = sorted(((theirs.get(n, 0.0) - mine.get(n, 0.0), n) for n in {*mine, *theirs}), reverse=True)
    shown = [
        f"{name} +{format_seconds(seconds)}" for seconds, name in lost[:3] if seconds > 0.001 * best.seconds
    ]
    won, where = lost[-1]
    shown += [f"though {where} {format_seconds(won)}"] if won < -0.001 * best.seconds else []
    gap = other.seconds - best.seconds
    return f"{other.point}: {format_seconds(gap)} slower ({gap / best.seconds:.1%}): {', '.join(shown) or 'a little of everything'}"


def shortfall(pricer: Pricer, price: Price, pins: Pins) -> str:
    """By how much a point does not fit, and the cheapest thing that would make it fit."""
    return f"{overflow(pricer, price)}; {remedy(pricer, pins)}"


def overflow(pricer: Pricer, price: Price) -> str:
    """By how much a point does not fit."""
    short, capacity, taken, where = (
        price.memory.over(pricer.job),
        pricer.job.capacity,
        price.memory.total,
        "a GPU",
    )
    if price.memory.total <= capacity:
        capacity, taken, where = (
            round(pricer.job.assumptions.host_bytes),
            price.memory.host,
            "the host for each GPU",
        )
    return f"{price.point} takes {format_bytes(taken)} of the {format_bytes(capacity)} of {where}, {format_bytes(short)} too much"


def remedy(pricer: Pricer, pins: Pins) -> str:
    """What would make a job fit that does not: one pin to release, all of them, more nodes, or a shorter
    sequence.
    """
    job = pricer.job
    released = [(_fits(pricer, {k: v for k, v in pins.items() if k != key}), key) for key in pins]
    found = [(price.seconds, key, price) for price, key in released if price is not None]
    if found:
        seconds, key, price = min(found, key=lambda one: one[0])
        return f"{key}={getattr(price.point, key)} would make it fit ({format_seconds(seconds)} a step)"
    if pins and (free := _fits(pricer, {})):
        return f"{free.point} would fit ({format_seconds(free.seconds)} a step)"
    if job.stack == "trainer":
        return "--stack fused prices what shards weights or recomputes, which seqmesh train does not do yet"
    for times in (n for n in NODES_TRIED if n * job.cluster.gpus <= MOST_GPUS):
        bigger = pricer.with_nodes(job.cluster.nodes * times)
        if fits_at_all(bigger, {}):
            return f"--nodes {job.cluster.nodes * times} would make it fit"
    from seqmesh.planner.longest import longest  # it searches with this module's neighbours

    length = longest(pricer, {})
    return (
        f"the longest sequence that fits is {format_tokens(length)}"
        if length
        else "the weights alone do not fit; use a smaller model"
    )


def _fits(pricer: Pricer, pins: Pins) -> Price | None:
    try:
        return next(iter(search(pricer, pins, top=1).best), None)
    except ValueError:
        return None


@dataclass(frozen=True, kw_only=True)
class Rests:
    """What moving one assumption does."""

    name: str
    cases: tuple[tuple[float, float, Point | None], ...]
    """(value, change of the best point's time as a share, the point that wins in its place) for each value
    that was tried.
    """

    @property
    def strength(self) -> float:
        """The largest change of time."""
        return max(abs(change) for _, change, _ in self.cases)

    @property
    def flips(self) -> bool:
        """Whether another point wins in some case."""
        return any(winner is not None for *_, winner in self.cases)


def rests_on(pricer: Pricer, best: Sequence[Price], pins: Pins) -> list[Rests]:
    """Every assumption that the best point's time, or its place as the best, rests on, the strongest first.

    The points in `best` compete anew under each changed assumption, with more savers too in case they no
    longer fit.
    """
    rivals = _rivals(pricer, best, pins)
    found = []
    for name, value, *_ in pricer.job.assumptions.explain():
        cases = []
        for moved in _moved(name, value):
            other = pricer.with_assumption(name, moved)
            fitting = [point for point in rivals if other.memory.of(point).fits(other.job)]
            times = [(other.seconds(point), point) for point in fitting]
            mine = other.seconds(best[0].point)
            first = min(times, key=lambda one: one[0], default=(mine, best[0].point))
            lost = best[0].point not in fitting or first[0] < mine * (1 - 1e-6)
            cases.append(
                (moved, mine / best[0].seconds - 1, first[1] if lost and first[1] != best[0].point else None)
            )
        found.append(Rests(name=name, cases=tuple(cases)))
    found.sort(key=lambda rests: -rests.strength)
    return [rests for rests in found if rests.strength > 1e-4 or rests.flips]


def _rivals(pricer: Pricer, best: Sequence[Price], pins: Pins) -> list[Point]:
    points = dict.fromkeys(price.point for price in best)
    for point in list(points):
        variants = [point.but(tiling=tiling) for tiling in ("none", "loss", "mlp")] + [
            point.but(zero=zero) for zero in (1, 2, 3)
        ]
        for variant in variants:
            pinned = all(getattr(variant, key) == value for key, value in pins.items())
            if pinned and is_legal(pricer.job, variant):
                points[variant] = None
    return list(points)


def _moved(name: str, value: float) -> tuple[float, ...]:
    """Values to try: 20% to each side; the other one of a yes or no; a half, or three times, where it is zero
    or near it.
    """
    if name == "one_nic_per_partial_node":
        return (1 - value,)
    if name in ("gradient_overlap", "prefetch") and value < 1:
        return (value + (1 - value) / 2,)
    if name == "overhead":
        return (3 * value,)
    return ((1 - SWING) * value, (1 + SWING) * value) if value else ()
