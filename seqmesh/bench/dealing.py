"""How long data-parallel ranks wait for the busiest one, by exact counts: nothing is run or timed.

    in turn    a step's sequences to one rank after the other
    evened     as `seqmesh train` deals them (train/data/evening.py)
    one pool   no groups: all sequences of a step on one ring, by the balanced layout (mesh.pool)

Documents are log-normal in length and packed as the trainer packs them, without padding. A rank's work is its
FLOPs of a Llama-3 8B: 6 a weight and token, 12 x layers x heads x head dim a pair. Ratios are means over some
steps, in parts of the mean rank's work: the time of a step if only computing took time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

import numpy as np

from seqmesh import layouts, masks
from seqmesh.bench.figures import Figure
from seqmesh.bench.schedules import TAILS, Tail, given_tail
from seqmesh.layouts import Layout, load
from seqmesh.masks import Mask
from seqmesh.planner.inputs.models import load_model
from seqmesh.train.data.corpus import Piece
from seqmesh.train.data.evening import MicroBatch, deal
from seqmesh.train.data.packing import Epoch, area_of

DEAL_SECTION = "data-parallel ranks, busiest / mean FLOPs of an 8B: evened (in turn)"
POOL_SECTION = "64 ranks, 8 sequences of 131,072 tokens: one pool (dp 8 x cp 8)"
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


def in_turn(count: int, ranks: int, micro_batches: int) -> list[list[MicroBatch]]:
    """What `deal` is measured against: micro-batches in the sequences' order, to one rank after the other."""
    size = count // (ranks * micro_batches)
    cut = [tuple(range(first, first + size)) for first in range(0, count, size)]
    return [cut[rank::ranks] for rank in range(ranks)]


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
