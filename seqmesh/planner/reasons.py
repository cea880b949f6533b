"""Why a point is the answer: what the best of its rivals takes, by the search that made the table.

The practices are the paper's: (1) unified rather than pure sequence parallelism, (2) data parallelism before
sequence parallelism, (3) ZeRO-1 or 2 with it, ZeRO-3 and offload for memory, (4, 5) tensor parallelism, (7)
the order of the axes on the links.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from seqmesh.planner.cost.estimate import COMPUTE, PIPELINE, StepEstimate
from seqmesh.planner.cost.network import NETWORK, PCIE, SCALE_UP
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.errors import TIE
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.units import format_bytes, format_seconds
from seqmesh.planner.remedies import best_with, shortfall
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
    why = _Why(searched, estimate)
    return [
        why.limit(),
        *why.layout(),
        *why.pool(),
        *why.unified(),
        *why.data_parallel(),
        *why.zero(),
        *why.tensor(),
        *why.experts(),
        *why.savers(),
        *why.order(),
    ]


class _Why:
    """The lines about one point that fits: each names a choice, and what the best without it takes."""

    def __init__(self, searched: Search, estimate: StepEstimate) -> None:
        self.searched = searched
        self.costs = searched.costs
        self.job = searched.costs.job
        self.estimate = estimate
        self.point = estimate.point

    def against(self, key: str, said: str, accept: Callable[[Point], bool]) -> Iterator[str]:
        """How the best of all points that are accepted does: by the search, as every line of its table.

        Nothing is said of a key that is pinned, for nothing was chosen.
        """
        if key in self.searched.pins:
            return
        other = self.searched.best_where(accept)
        if other is None:
            yield f"{said} fits nowhere, whatever is saved"
        else:
            yield f"{said} at best, {point_words(other.point)}, {self.difference(other.seconds)}"

    def difference(self, seconds: float) -> str:
        """How much longer something takes than the point."""
        share = seconds / self.estimate.seconds - 1
        if abs(share) < 0.0005:
            return "takes as long"
        return f"takes {abs(share):.1%} {'longer' if share > 0 else 'less'}"

    def limit(self) -> str:
        """The causes with the largest shares of the step."""
        whole = self.estimate.seconds
        causes = self.estimate.by_cause(lambda term: term.exposed)
        shares = [
            f"{CAUSES[cause]} {seconds / whole:.0%}"
            for cause, seconds in sorted(causes.items(), key=lambda item: -item[1])
            if seconds > 0.005 * whole
        ]
        return f"limited by {CAUSES[self.estimate.bound_by]}: {', '.join(shares)} of the step"

    def layout(self) -> Iterator[str]:
        """Exchanges of the ring and how even its work is, for every kind of layer."""
        if self.point.ring == 1:
            return
        found: list[str] = []
        for key, _ in self.costs.loads.keys(self.point):
            load = self.costs.loads.of(key)
            where = f"{key.reach.layers} layers of window {key.reach.window}: " if found else ""
            merged = ' (stages="auto")' if load.asked == "auto" else ""
            found.append(
                f"{where}{load.exchanges} exchange{'s' if load.exchanges != 1 else ''}{merged},"
                f" the busiest rank computes {load.imbalance:.3f}x the mean"
            )
        yield f"layout {self.estimate.layout} over ring {self.point.ring}: {'; '.join(found)}"

    def pool(self) -> Iterator[str]:
        """With a pool against without, and against groups that are packed by tokens alone."""
        p, pins = self.point, self.searched.pins
        if not self.job.documents or self.job.global_batch == 1:
            return
        without = "groups" if p.pool else "one pool"
        found = list(self.against("pool", without, lambda other: other.pool != p.pool))
        if not found:
            return
        by_tokens = CostModel(replace(self.job, layout="zigzag", evened=False))
        other = best_with(by_tokens, {**pins, "pool": False, "micro_batch": 1})
        if other is not None:
            text = self.difference(other.seconds)
            found.append(f"zigzag in groups packed by tokens alone, {mesh_words(other.point)}, {text}")
        kind = f"one pool of {p.ring} ring ranks" if p.pool else f"{p.dp} groups, evened by area"
        yield f"{kind}: {'; '.join(found)}"

    def unified(self) -> Iterator[str]:
        """Either form of sequence parallelism alone."""
        p = self.point
        found: list[str] = []
        if p.ulysses > 1:
            found += self.against("ulysses", "ring alone", lambda o: o.ulysses == 1 and o.ring > 1)
        if p.ring > 1:
            found += self.against("ring", "ulysses alone", lambda o: o.ring == 1 and o.ulysses > 1)
        if found:
            mixed = p.ulysses > 1 and p.ring > 1
            kind = "practice 1: unified, not pure" if mixed else "pure, where practice 1 is to mix"
            yield f"ulysses {p.ulysses} x ring {p.ring} ({kind}): {'; '.join(found)}"

    def data_parallel(self) -> Iterator[str]:
        """More data parallelism."""
        p, batch = self.point, self.job.global_batch
        if p.sp > 1 and p.dp < batch:
            more = "more data parallelism (practice 2: dp first)"
            yield from self.against("dp", more, lambda other: other.dp > p.dp)
        elif p.sp > 1 and "dp" not in self.searched.pins:
            yield (
                f"sequence parallelism because a batch of {batch} cannot be split over more than dp={batch}"
                " (practice 2: dp first)"
            )

    def zero(self) -> Iterator[str]:
        """ZeRO-1 in place of a higher stage."""
        p = self.point
        if p.replicas > 1 and p.zero > 1:
            said = f"ZeRO-{p.zero} (practice 3: ZeRO-1 or 2 where it fits): ZeRO-1"
            yield from self.against("zero", said, lambda other: other.zero <= 1)
        elif p.replicas > 1 and p.zero == 1:
            size = self.estimate.memory.categories.get("optimizer", 0)
            where = f"takes {format_bytes(size)} of a rank" if size else "is on the host"
            yield f"ZeRO-1 over dp x sp = {p.replicas} ranks (practice 3: ZeRO-1 or 2): the optimizer {where}"

    def tensor(self) -> Iterator[str]:
        """Without tensor parallelism if it is used, or with it if it is not."""
        used = self.point.tp > 1
        unpriced = self.job.model.not_shared_by_tp
        if not unpriced:
            name = "without tensor parallelism" if used else "with tensor parallelism"
            said = f"{name} (practices 4 and 5: SP in place of TP)"
            yield from self.against("tp", said, lambda other: (other.tp > 1) != used)
        elif "tp" not in self.searched.pins:
            yield f"tensor parallelism is not priced with {unpriced}"

    def experts(self) -> Iterator[str]:
        """Without experts spread if they are, or with them if they are not."""
        spread = self.point.experts > 1
        said = "without experts spread:" if spread else "with experts spread over ranks:"
        if self.job.model.mixture is not None:
            yield from self.against("experts", said, lambda other: (other.experts > 1) != spread)

    def savers(self) -> Iterator[str]:
        """Without each saver that is used."""
        for key, value in self.point.savers.items():
            said = f"{key}={value}:"
            without = self.against(key, f"{said} without", _without(key))
            yield next(without, f"{said} pinned")

    def order(self) -> Iterator[str]:
        """Ulysses and ring with their places on the links exchanged."""
        p, axes = self.point, self.job.axes
        if p.ulysses == 1 or p.ring == 1:
            return
        swap = {"ulysses": "ring", "ring": "ulysses"}
        other = self.costs.with_axes(tuple(swap.get(axis, axis) for axis in axes))
        faster, slower = sorted(("ulysses", "ring"), key=axes.index)
        practice = "practice 7: faster links inside" if faster == "ulysses" else "against practice 7"
        text = self.difference(other.seconds(p))
        yield f"{faster} inside, {slower} outside ({practice}): the other way round {text}"


def _without(saver: str) -> Callable[[Point], bool]:
    return lambda other: saver not in other.savers


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
