"""Why a point is the answer: what the best of its rivals takes, by the search that made the table.

The practices are the paper's: (1) unified rather than pure sequence parallelism, (2) data parallelism before
sequence parallelism, (3) ZeRO-1 or 2 with it, ZeRO-3 and offload for memory, (4, 5) tensor parallelism, (7)
the order of the axes on the links.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from seqmesh.planner.cost.estimate import COMPUTE, PIPELINE, StepEstimate
from seqmesh.planner.cost.network import NETWORK, PCIE, SCALE_UP
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.errors import TIE
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.units import format_bytes, format_seconds
from seqmesh.planner.remedies import shortfall
from seqmesh.planner.search import Search
from seqmesh.planner.words import mesh_words, point_words

CAUSES = {
    COMPUTE: "compute",
    PIPELINE: "the pipeline's bubble",
    SCALE_UP: "scale-up links",
    PCIE: "PCIe",
    NETWORK: "the node network",
}


def reasons(searched: Search, estimate: StepEstimate) -> list[str]:
    """Why a point is as it is; for a point that does not fit, what would make it fit."""
    if not estimate.fits:
        return [shortfall(searched.costs, estimate, searched.pins)]
    return [
        *_limit(estimate),
        *_layout(searched.costs, estimate),
        *_pool(searched, estimate),
        *_unified(searched, estimate),
        *_data_parallel(searched, estimate),
        *_zero(searched, estimate),
        *_tensor(searched, estimate),
        *_experts(searched, estimate),
        *_savers(searched, estimate),
        *_order(searched.costs, estimate),
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


def _best_of(searched: Search, estimate: StepEstimate, accept: Callable[[Point], bool]) -> str:
    """How the best of all points that are accepted does: found by the search, as every line of its table."""
    other = searched.best_where(accept)
    if other is None:
        return "fits nowhere, whatever is saved"
    return f"at best, {point_words(other.point)}, {_difference(other.seconds / estimate.seconds - 1)}"


def _difference(share: float) -> str:
    if abs(share) < 0.0005:
        return "takes as long"
    return f"takes {abs(share):.1%} {'longer' if share > 0 else 'less'}"


def _layout(costs: CostModel, estimate: StepEstimate) -> Iterator[str]:
    p = estimate.point
    if p.ring == 1:
        return
    found: list[str] = []
    for key, _ in costs.loads.keys(p):
        load = costs.loads.of(key)
        where = f"{key.reach.layers} layers of window {key.reach.window}: " if found else ""
        merged = ' (stages="auto")' if load.asked == "auto" else ""
        found.append(
            f"{where}{load.exchanges} exchange{'s' if load.exchanges != 1 else ''}{merged},"
            f" the busiest rank computes {load.imbalance:.3f}x the mean"
        )
    yield f"layout {estimate.layout} over ring {p.ring}: {'; '.join(found)}"


def _pool(searched: Search, estimate: StepEstimate) -> Iterator[str]:
    """The best with a pool against the best without, and against groups that are packed by tokens alone."""
    job, p = searched.costs.job, estimate.point
    if not job.documents or job.global_batch == 1 or "pool" in searched.pins:
        return
    without = "groups" if p.pool else "one pool"
    found = [f"{without} {_best_of(searched, estimate, lambda other: other.pool != p.pool)}"]
    by_tokens = CostModel(replace(job, layout="zigzag", evened=False))
    try:
        other = Search(by_tokens, {**searched.pins, "pool": False, "micro_batch": 1}).best_where(
            lambda _: True
        )
    except ValueError:  # nothing legal is left to pack by tokens
        other = None
    if other is not None:
        text = _difference(other.seconds / estimate.seconds - 1)
        found.append(f"zigzag in groups packed by tokens alone, {mesh_words(other.point)}, {text}")
    kind = f"one pool of {p.ring} ring ranks" if p.pool else f"{p.dp} groups, evened by area"
    yield f"{kind}: {'; '.join(found)}"


def _unified(searched: Search, estimate: StepEstimate) -> Iterator[str]:
    """The best of the two forms of sequence parallelism alone."""
    p = estimate.point
    if p.sp == 1:
        return
    found = []
    if p.ulysses > 1 and "ulysses" not in searched.pins:
        alone = _best_of(searched, estimate, lambda other: other.ulysses == 1 and other.ring > 1)
        found.append(f"ring alone {alone}")
    if p.ring > 1 and "ring" not in searched.pins:
        alone = _best_of(searched, estimate, lambda other: other.ring == 1 and other.ulysses > 1)
        found.append(f"ulysses alone {alone}")
    if found:
        mixed = p.ulysses > 1 and p.ring > 1
        kind = "practice 1: unified, not pure" if mixed else "pure, where practice 1 is to mix"
        yield f"ulysses {p.ulysses} x ring {p.ring} ({kind}): {'; '.join(found)}"


def _data_parallel(searched: Search, estimate: StepEstimate) -> Iterator[str]:
    """More data parallelism."""
    p = estimate.point
    batch = searched.costs.job.global_batch
    if p.sp == 1 or "dp" in searched.pins:
        return
    if p.dp == batch:
        yield (
            f"sequence parallelism because a batch of {batch} cannot be split over more than dp={batch}"
            " (practice 2: dp first)"
        )
        return
    text = _best_of(searched, estimate, lambda other: other.dp > p.dp)
    yield f"more data parallelism (practice 2: dp first) {text}"


def _zero(searched: Search, estimate: StepEstimate) -> Iterator[str]:
    p = estimate.point
    if p.replicas == 1:
        return
    if p.zero > 1 and "zero" not in searched.pins:
        text = _best_of(searched, estimate, lambda other: other.zero <= 1)
        yield f"ZeRO-{p.zero} (practice 3: ZeRO-1 or 2 where it fits): ZeRO-1 {text}"
    elif p.zero == 1:
        size = estimate.memory.categories.get("optimizer", 0)
        where = f"takes {format_bytes(size)} of a rank" if size else "is on the host"
        yield (f"ZeRO-1 over dp x sp = {p.replicas} ranks (practice 3: ZeRO-1 or 2): the optimizer {where}")


def _experts(searched: Search, estimate: StepEstimate) -> Iterator[str]:
    """The best without experts spread if they are, or with them if they are not."""
    spread = estimate.point.experts > 1
    if searched.costs.job.model.mixture is None or "experts" in searched.pins:
        return
    name = "without experts spread" if spread else "with experts spread over ranks"
    yield f"{name}: {_best_of(searched, estimate, lambda other: (other.experts > 1) != spread)}"


def _tensor(searched: Search, estimate: StepEstimate) -> Iterator[str]:
    """The best without tensor parallelism if it is used, or with it if it is not."""
    used = estimate.point.tp > 1
    if "tp" in searched.pins:
        return
    if what := searched.costs.job.model.not_shared_by_tp:
        yield f"tensor parallelism is not priced with {what}"
        return
    name = "without tensor parallelism" if used else "with tensor parallelism"
    text = _best_of(searched, estimate, lambda other: (other.tp > 1) != used)
    yield f"{name} (practices 4 and 5: SP in place of TP) {text}"


def _savers(searched: Search, estimate: StepEstimate) -> Iterator[str]:
    """The best without each saver that is used."""
    for key, value in estimate.point.savers.items():
        if key in searched.pins:
            yield f"{key}={value}: pinned"
            continue
        text = _best_of(searched, estimate, partial(_has, key, "none"))
        yield f"{key}={value}: without {text}"


def _has(key: str, value: str, point: Point) -> bool:
    return bool(getattr(point, key) == value)


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
    """What another point loses by: its three largest losses, and what it wins if that is anything."""
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
    tie = ", a tie" if abs(gap) <= TIE * best.seconds else ""
    how = "slower" if gap >= 0 else "faster"
    return (
        f"{other.point}: {format_seconds(abs(gap))} {how} ({abs(gap) / best.seconds:.1%}{tie}):"
        f" {', '.join(shown) or 'a little of everything'}"
    )
