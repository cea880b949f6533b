"""How long data-parallel ranks wait for the busiest one, by exact counts: nothing is run or timed.

    in turn    a step's sequences to one rank after the other
    evened     as `seqmesh train` deals them (train/evening.py)
    one pool   no groups: all sequences of a step on one ring, by the balanced layout (mesh.pool)

Documents are log-normal in length and packed as the trainer packs them, without padding. A rank's work is its
FLOPs of a Llama-3 8B: 6 a weight and token, 12 x layers x heads x head dim a pair. Ratios are means over some
steps, in parts of the mean rank's work: the time of a step if only computing took time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import NamedTuple

import numpy as np

from seqmesh import layouts, masks
from seqmesh.bench.figures import Figure, Spread
from seqmesh.bench.schedules import TAILS, Tail, given_tail
from seqmesh.layouts import Layout, load
from seqmesh.masks import Mask
from seqmesh.planner.cost.dealing import in_turn
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.point import Point
from seqmesh.train.data.corpus import Piece
from seqmesh.train.data.packing import Epoch, area_of, lengths_of
from seqmesh.train.evening import MicroBatch, deal

DEAL_SECTION = "data-parallel ranks, busiest / mean FLOPs of an 8B: evened (in turn)"
POOL_SECTION = "64 ranks, 8 sequences of 131,072 tokens: one pool (dp 8 x cp 8)"
PLANNED_SECTION = "64 H100, the same: predicted step of dp 8 x ring 8 zigzag, by tokens, over one pool's"
MODEL = "llama3-8b"


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Training steps whose sequences are dealt."""

    tail: Tail
    seq_len: int = 131_072
    ranks: int
    """Data-parallel."""
    micro_batches: int = 8
    """Of each rank, of one sequence."""
    steps: int = 4


CASES = tuple(Steps(tail=tail, ranks=ranks) for tail in TAILS for ranks in (2, 8, 64))


def sequences_of(tail: Tail, seq_len: int, count: int, seed: int) -> list[tuple[Piece, ...]]:
    """`count` packed sequences of log-normal documents."""
    drawn = Tail(mu=tail.mu, sigma=tail.sigma, tokens=count * seq_len)
    epoch = Epoch(np.array(given_tail(drawn, seed), np.int64), seq_len, seed, 0)
    return [epoch.sequence(number) for number in range(count)]


class Flops:
    """Of some tokens and pairs."""

    def __init__(self) -> None:
        model = load_model(MODEL)
        self._of_a_token = 6.0 * model.matmul_parameters
        self._of_a_pair = 12.0 * model.layers * model.heads * model.head_dim

    def __call__(self, tokens: int, area: int) -> float:
        return self._of_a_token * tokens + self._of_a_pair * area


class Waiting(NamedTuple):
    """A step's time in parts of the mean rank's work."""

    each_micro_batch: float
    """Ranks wait for the busiest after every one: ZeRO-3."""
    at_the_end: float
    """They wait once a step: ZeRO 0 to 2."""


def waiting(work: Sequence[float], dealt: Sequence[Sequence[MicroBatch]]) -> Waiting:
    """How long a step takes as it is dealt.

    Args:
        work: of each sequence.
        dealt: [rank][micro-batch] -> numbers of sequences.
    """
    loads = [[sum(work[number] for number in batch) for batch in rank] for rank in dealt]
    least = sum(map(sum, loads)) / len(loads)
    return Waiting(
        each_micro_batch=sum(map(max, zip(*loads, strict=True))) / least,
        at_the_end=max(map(sum, loads)) / least,
    )


def measure_dealing(cases: Sequence[Steps] = CASES) -> Iterator[Figure]:
    """Two figures per case: waiting after every micro-batch, and at the end of the step."""
    flops = Flops()
    for case in cases:
        evened: list[Waiting] = []
        turns: list[Waiting] = []
        count = case.ranks * case.micro_batches
        for seed in range(case.steps):
            step = sequences_of(case.tail, case.seq_len, count, seed)
            areas = [area_of(sequence) for sequence in step]
            work = [flops(case.seq_len, area) for area in areas]
            evened.append(waiting(work, deal(areas, case.ranks, case.micro_batches)))
            turns.append(waiting(work, in_turn(count, case.ranks, case.micro_batches)))
        for name, ours, theirs in zip(Waiting._fields, _means(evened), _means(turns), strict=True):
            yield _dealt_figure(case, name, ours, theirs)


def _means(steps: Sequence[Waiting]) -> Waiting:
    return Waiting(*map(mean, zip(*steps, strict=True)))


def _dealt_figure(case: Steps, name: str, evened: float, turns: float) -> Figure:
    tail = case.tail
    return Figure(
        section=DEAL_SECTION,
        what=f"mu {tail.mu:g}, sigma {tail.sigma:g}, dp {case.ranks}, {case.micro_batches} micro-batches:"
        f" waits {name.replace('_', ' ')}",
        measured=f"{evened:.3f} ({turns:.3f})",
        target="<= in turn",
        ok=evened <= turns,
        exact=True,
        values={"evened": evened, "in_turn": turns},
    )


class RankLoads(NamedTuple):
    """What each rank of a step has."""

    flops: list[float]
    rows: list[int]
    """Received."""


def measure_pool(tails: Sequence[Tail] = TAILS, groups: int = 8, ring: int = 8) -> Iterator[Figure]:
    """Three figures per distribution: FLOPs of the busiest rank, its rows, and the rows of all ranks.

    The mean of the seeds; rows are in parts of those of zigzag in each group.
    """
    flops = Flops()
    seq_len = 131_072
    for tail in tails:
        pools: list[RankLoads] = []
        apart: list[RankLoads] = []
        for seed in range(tail.seeds):
            step = sequences_of(tail, seq_len, groups, seed)
            together = _mask([piece for sequence in step for piece in sequence])
            pools.append(_loads(flops, together, layouts.balanced(together, groups * ring)))
            zigzag = layouts.zigzag(seq_len, ring)
            each = [_loads(flops, _mask(sequence), zigzag) for sequence in step]
            every_flops = [flops_of_rank for group in each for flops_of_rank in group.flops]
            every_rows = [rows for group in each for rows in group.rows]
            apart.append(RankLoads(every_flops, every_rows))
        yield from _pool_figures(tail, pools, apart)


def _mask(pieces: Sequence[Piece]) -> Mask:
    return masks.documents([piece.stop - piece.start for piece in pieces])


def _loads(flops: Flops, mask: Mask, layout: Layout) -> RankLoads:
    areas = load.areas(mask, layout)
    return RankLoads(
        [flops(tokens, area) for tokens, area in zip(layout.counts, areas, strict=True)],
        load.rows_received(mask, layout),
    )


def _pool_figures(tail: Tail, pools: Sequence[RankLoads], apart: Sequence[RankLoads]) -> Iterator[Figure]:
    what = f"mu {tail.mu:g}, sigma {tail.sigma:g}:"
    busiest = mean(max(one.flops) / mean(one.flops) for one in pools)
    busiest_apart = mean(max(one.flops) / mean(one.flops) for one in apart)
    yield Figure(
        section=POOL_SECTION,
        what=f"{what} busiest / mean FLOPs",
        measured=f"{busiest:.3f} ({busiest_apart:.3f})",
        target="<= 1.05",
        ok=busiest <= 1.05,
        exact=True,
        values={"pool": busiest, "groups": busiest_apart},
    )
    both = list(zip(pools, apart, strict=True))
    ratios = {
        "busiest rank's rows": mean(max(pool.rows) / max(group.rows) for pool, group in both),
        "rows of all ranks": mean(sum(pool.rows) / sum(group.rows) for pool, group in both),
    }
    for name, ratio in ratios.items():
        yield Figure(
            section=POOL_SECTION,
            what=f"{what} {name} / those of zigzag in each group",
            measured=f"{ratio:.2f}",
            target="",
            ok=None,
            exact=True,
            values={"rows_ratio": ratio},
        )


PLANNED = {
    "pool of ulysses 8 x ring 8": Point(ulysses=8, ring=8, zero=3, tiling="loss", micro_batch=8, pool=True),
    "pool of ring 64": Point(ring=64, zero=3, tiling="loss", micro_batch=8, pool=True),
}
"""One pool on 8 x 8 GPUs, of `Point`s that fit."""
GROUPS = Point(ring=8, dp=8, zero=3, tiling="loss")
"""What is compared with them: a node a group, one sequence each, in zigzag."""


def measure_planned(tails: Sequence[Tail] = TAILS, gpu: str = "h100-sxm") -> Iterator[Figure]:
    """Two figures per distribution: the step that the planner predicts of groups, over that of one pool."""
    for tail in tails:
        ratios: dict[str, list[float]] = {what: [] for what in PLANNED}
        for seed in range(tail.seeds):
            job = _planned_job(tail, gpu, seed)
            groups = CostModel(replace(job, layout="zigzag", evened=False)).seconds(GROUPS)
            pools = CostModel(job)
            for what, point in PLANNED.items():
                ratios[what].append(groups / pools.seconds(point))
        for what, found in ratios.items():
            spread = Spread.of(found)
            average = mean(found)
            yield Figure(
                section=PLANNED_SECTION,
                what=f"mu {tail.mu:g}, sigma {tail.sigma:g}: {what}",
                measured=f"mean {average:.2f}, median {spread.text(2)}",
                target=">= 1.40",
                ok=average >= 1.4 and spread.median >= 1.4,
                exact=True,
                values={"speedup_mean": average, **spread.values("speedup")},
            )


def _planned_job(tail: Tail, gpu: str, seed: int) -> Job:
    """A step of 8 sequences on 8 nodes of 8 GPUs."""
    seq_len = 131_072
    step = sequences_of(tail, seq_len, 8, seed)
    return Job(
        model=load_model(MODEL),
        cluster=Cluster(gpu=load_gpu(gpu), nodes=8, gpus_per_node=8),
        seq_len=seq_len,
        global_batch=8,
        documents=tuple(length for sequence in step for length in lengths_of(sequence)),
    )
