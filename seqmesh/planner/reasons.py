"""Why the best point is the best: each reason is a comparison with a point that differs in one thing.

The practices are the paper's: (1) unified rather than pure sequence parallelism, (2) data parallelism before
sequence parallelism, (3) ZeRO-1 or 2 with it, ZeRO-3 and offload for memory, (4, 5) tensor parallelism, (7)
the order of the axes on the links.
"""

from collections.abc import Iterator
from dataclasses import replace

from seqmesh.planner.candidates import Pins, divisors
from seqmesh.planner.cost.estimate import COMPUTE, PIPELINE, StepEstimate
from seqmesh.planner.cost.network import NETWORK, PCIE, SCALE_UP
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.legality import is_legal
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.units import format_bytes, format_seconds
from seqmesh.planner.remedies import shortfall
from seqmesh.planner.search import search

CAUSES = {
    COMPUTE: "compute",
    PIPELINE: "the pipeline's bubble",
    SCALE_UP: "scale-up links",
    PCIE: "PCIe",
    NETWORK: "the node network",
}


def reasons(costs: CostModel, estimate: StepEstimate, pins: Pins) -> list[str]:
    """Why a point is as it is; for a point that does not fit, what would make it fit."""
    if not estimate.fits:
        return [shortfall(costs, estimate, pins)]
    return [
        *_limit(estimate),
        *_layout(estimate),
        *_pool(costs, estimate, pins),
        *_unified(costs, estimate),
        *_data_parallel(costs, estimate),
        *_zero(costs, estimate, pins),
        *_tensor(costs, estimate),
        *_savers(costs, estimate, pins),
        *_order(costs, estimate),
    ]


def _limit(estimate: StepEstimate) -> Iterator[str]:
    causes = estimate.by_cause(lambda term: term.exposed)
    largest_first = sorted(causes.items(), key=lambda item: -item[1])
    shares = [
        f"{_cause(cause)} {seconds / estimate.seconds:.0%}"
        for cause, seconds in largest_first
        if seconds > 0.005 * estimate.seconds
    ]
    yield f"limited by {_cause(estimate.bound_by)}: {', '.join(shares)} of the step"


def _cause(cause: str) -> str:
    return CAUSES.get(cause, cause)


def _compared(costs: CostModel, estimate: StepEstimate, other: Point) -> str | None:
    """How another point does, or None if it is not legal."""
    if not is_legal(costs.job, other):
        return None
    memory = costs.memory.of(other)
    if not memory.fits(costs.job):
        return f"does not fit ({format_bytes(memory.over(costs.job))} too much)"
    return _difference(costs.seconds(other) / estimate.seconds - 1)


def _difference(share: float) -> str:
    if abs(share) < 0.0005:
        return "takes as long"
    return f"takes {abs(share):.1%} {'longer' if share > 0 else 'less'}"


def _layout(estimate: StepEstimate) -> Iterator[str]:
    p = estimate.point
    if p.ring > 1:
        merged = ' (stages="auto")' if estimate.stages == "auto" else ""
        yield (
            f"layout {estimate.layout} over ring {p.ring},"
            f" {estimate.exchanges} exchange{'s' if estimate.exchanges != 1 else ''}{merged}:"
            f" the busiest rank computes {estimate.imbalance:.3f}x the mean"
        )


def _pool(costs: CostModel, estimate: StepEstimate, pins: Pins) -> Iterator[str]:
    """The best with a pool against the best without, and against groups that are packed by tokens alone."""
    job = costs.job
    if not job.documents or job.global_batch == 1 or "pool" in pins:
        return
    p = estimate.point
    found = []
    if other := _best(costs, {**pins, "pool": not p.pool}):
        name = "data-parallel groups" if p.pool else "one pool"
        text = _difference(other.seconds / estimate.seconds - 1)
        found.append(f"the best of {name}, {_degrees(other.point)}, {text}")
    by_tokens = CostModel(replace(job, layout="zigzag", evened=False))
    if other := _best(by_tokens, {**pins, "pool": False, "micro_batch": 1}):
        text = _difference(other.seconds / estimate.seconds - 1)
        found.append(f"zigzag and groups packed by tokens alone, {_degrees(other.point)}, {text}")
    if found:
        kind = f"one pool of {p.ring} ring ranks" if p.pool else f"no pool, dp {p.dp} evened by area"
        yield f"{kind}: {'; '.join(found)}"


def _best(costs: CostModel, pins: Pins) -> StepEstimate | None:
    """The best point with these pins, if one is legal and fits."""
    try:
        best = search(costs, pins, top=1).best
    except ValueError:
        return None
    return best[0] if best else None


def _degrees(point: Point) -> str:
    """tp2 u4 r2 dp2 pp1."""
    return str(point).partition(",")[0]


def _unified(costs: CostModel, estimate: StepEstimate) -> Iterator[str]:
    """The same ranks in one of the two forms of sequence parallelism alone."""
    p = estimate.point
    if p.sp == 1:
        return
    heads = costs.job.model.heads // p.tp
    found = []
    for name, other in (
        ("ring alone", p.but(ulysses=1, ring=p.sp)),
        ("ulysses alone", p.but(ulysses=p.sp, ring=1)),
    ):
        if other == p:
            continue
        if other.ulysses > heads:
            found.append(f"{name} is impossible with {heads} query heads a rank")
        elif text := _compared(costs, estimate, other):
            found.append(f"{name} {text}")
    if found:
        mixed = p.ulysses > 1 and p.ring > 1
        kind = "practice 1: unified, not pure" if mixed else "pure, where practice 1 is to mix"
        yield f"ulysses {p.ulysses} x ring {p.ring} ({kind}): {'; '.join(found)}"


def _data_parallel(costs: CostModel, estimate: StepEstimate) -> Iterator[str]:
    """Twice the data parallelism at half the sequence parallelism: less ring, or else less ulysses."""
    p = estimate.point
    batch = costs.job.global_batch
    if p.sp == 1:
        return
    if p.dp == batch:
        yield (
            f"sequence parallelism because a batch of {batch} cannot be split over more than dp={batch}"
            " (practice 2: dp first)"
        )
        return
    for other in (
        p.but(ring=max(1, p.ring // 2), dp=p.dp * 2),
        p.but(ulysses=max(1, p.ulysses // 2), dp=p.dp * 2),
    ):
        if text := _compared(costs, estimate, other):
            yield (
                "more dp and less sequence parallelism (practice 2: dp first),"
                f" u{other.ulysses} r{other.ring} dp{other.dp}: {text}"
            )
            return


def _zero(costs: CostModel, estimate: StepEstimate, pins: Pins) -> Iterator[str]:
    p = estimate.point
    if p.replicas == 1:
        return
    if p.zero > 1 and (text := _compared(costs, estimate, p.but(zero=1))):
        purpose = _purpose("zero", text, pins)
        yield f"ZeRO-{p.zero} {purpose} (practice 3: ZeRO-1 or 2 where it fits): with ZeRO-1 it {text}"
    elif p.zero == 1:
        size = estimate.memory.categories.get("optimizer", 0)
        where = f"takes {format_bytes(size)} of a rank" if size else "is on the host"
        yield (f"ZeRO-1 over dp x sp = {p.replicas} ranks (practice 3: ZeRO-1 or 2): the optimizer {where}")


def _purpose(key: str, compared: str, pins: Pins) -> str:
    """Why a saver is there, by how the point without it does."""
    if "does not fit" in compared:
        return "for memory"
    return "pinned" if key in pins else "chosen"


def _tensor(costs: CostModel, estimate: StepEstimate) -> Iterator[str]:
    """The best mesh without tensor parallelism if it is used, or with it if it is not, all else equal."""
    used = estimate.point.tp > 1
    others = _without_tensor(estimate.point) if used else _with_tensor(costs, estimate.point)
    legal = [other for other in others if is_legal(costs.job, other)]
    if not legal:
        return
    # The fairest rival is the fastest that fits; where none fits, any of them shows by how much.
    fitting = [other for other in legal if costs.memory.of(other).fits(costs.job)]
    best = min(fitting or legal, key=costs.seconds)
    name = "without tensor parallelism" if used else "with tensor parallelism"
    yield (
        f"{name} (practices 4 and 5: SP in place of TP),"
        f" tp{best.tp} u{best.ulysses} r{best.ring} dp{best.dp} at best: {_compared(costs, estimate, best)}"
    )


def _without_tensor(point: Point) -> Iterator[Point]:
    """Its tensor-parallel ranks given to one of the other axes."""
    for axis in ("ulysses", "ring", "dp"):
        yield point.but(tp=1, **{axis: getattr(point, axis) * point.tp})


def _with_tensor(costs: CostModel, point: Point) -> Iterator[Point]:
    """Some ranks of one of the other axes made tensor parallel: as many as split K/V heads evenly."""
    for factor in divisors(costs.job.model.kv_heads)[1:]:
        for axis in ("ulysses", "ring", "dp"):
            degree = getattr(point, axis)
            if degree % factor == 0:
                yield point.but(tp=factor, **{axis: degree // factor})


LOWER_TILING = {"none": "none", "loss": "none", "mlp": "loss"}
OFFLOAD_WITHOUT_CHECKPOINTS = {
    "none": "none",
    "activations": "none",
    "optimizer": "optimizer",
    "both": "optimizer",
}
"""Without checkpoints there are none to offload."""


def _savers(costs: CostModel, estimate: StepEstimate, pins: Pins) -> Iterator[str]:
    """Each saver that is used against the next lower one."""
    p = estimate.point
    lower = {
        "tiling": p.but(tiling=LOWER_TILING[p.tiling]),
        "checkpointing": p.but(checkpointing="none", offload=OFFLOAD_WITHOUT_CHECKPOINTS[p.offload]),
        "offload": p.but(offload="none"),
    }
    for key, other in lower.items():
        value = p.savers.get(key)
        if value is None:
            continue
        if text := _compared(costs, estimate, other):
            instead = f"with {key}={other.savers[key]}" if key in other.savers else "without"
            yield f"{key}={value} {_purpose(key, text, pins)}: {instead} it {text}"


def _order(costs: CostModel, estimate: StepEstimate) -> Iterator[str]:
    """Ulysses and ring with their places on the links exchanged."""
    p = estimate.point
    axes = costs.job.axes
    if p.ulysses == 1 or p.ring == 1:
        return
    swap = {"ulysses": "ring", "ring": "ulysses"}
    other = costs.with_axes(tuple(swap.get(axis, axis) for axis in axes))
    text = _difference(other.seconds(p) / estimate.seconds - 1)
    faster, slower = sorted(("ulysses", "ring"), key=axes.index)
    practice = "practice 7: faster links inside" if faster == "ulysses" else "against practice 7"
    yield f"{faster} inside, {slower} outside ({practice}): the other way round {text}"


def why_not(best: StepEstimate, other: StepEstimate) -> str:
    """What the runner-up loses by: its three largest losses, and what it wins if that is anything."""
    mine = {term.name: term.exposed for term in best.terms}
    theirs = {term.name: term.exposed for term in other.terms}
    lost = [(theirs.get(name, 0.0) - mine.get(name, 0.0), name) for name in {*mine, *theirs}]
    lost.sort(reverse=True)
    least = 0.001 * best.seconds  # not worth a word
    shown = [f"{name} +{format_seconds(seconds)}" for seconds, name in lost[:3] if seconds > least]
    won, where = lost[-1]
    if won < -least:
        shown.append(f"though {where} {format_seconds(won)}")
    gap = other.seconds - best.seconds
    return (
        f"{other.point}: {format_seconds(gap)} slower ({gap / best.seconds:.1%}):"
        f" {', '.join(shown) or 'a little of everything'}"
    )
