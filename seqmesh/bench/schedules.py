"""What a schedule costs to make, and how well it spreads the load of long-tailed packed documents.

A schedule is built once per batch on every rank, so its time must vanish beside a training step. The layout
and the schedule are timed apart: the layout sees the whole mask, a rank's schedule only its own part.
Documents are log-normal in length, as in real corpora: exp(mu + sigma N) tokens, at least 16.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from seqmesh import layouts, masks
from seqmesh.bench.figures import Figure, Spread
from seqmesh.layouts import Layout, load
from seqmesh.masks import Mask
from seqmesh.schedule.ring import ring_schedule

TIME_SECTION = "one rank's schedule, built anew"
LOAD_SECTION = "load of log-normal documents, balanced layout"
AREA_TARGET = 1.05
"""Largest load of a rank, in parts of the mean."""
SHORTEST_DOCUMENT = 16
SIGMA = 1.3
"""Of the logarithm of document lengths, where their number is given."""

LAYOUTS: dict[str, Callable[[Mask, int], Layout]] = {
    "auto": layouts.auto,
    "balanced": layouts.balanced,
    "zigzag": lambda mask, ring: layouts.zigzag(mask.q_len, ring),
}


@dataclass(frozen=True, kw_only=True)
class TimedBatch:
    """A batch whose schedule is timed."""

    name: str
    tokens: int
    documents: int
    ring: int
    target_s: float
    seeds: int = 3


@dataclass(frozen=True, kw_only=True)
class Tail:
    """A distribution of document lengths, and the ring that shares them."""

    mu: float
    sigma: float
    tokens: int = 2**20
    ring: int = 64
    seeds: int = 4


BATCHES = (
    TimedBatch(name="1M tokens, 1,000 documents, R=64", tokens=2**20, documents=1000, ring=64, target_s=0.05),
    TimedBatch(
        name="10M tokens, 10,000 documents, R=1024",
        tokens=10 * 2**20,
        documents=10_000,
        ring=1024,
        target_s=1.0,
    ),
)
TAILS = (Tail(mu=7, sigma=1.3), Tail(mu=8, sigma=1.5))


def given_count(tokens: int, documents: int, seed: int) -> list[int]:
    """`documents` log-normal lengths that add up to `tokens`, each at least 16."""
    rng = random.Random(seed)
    weights = [rng.lognormvariate(0, SIGMA) for _ in range(documents)]
    shared = tokens - documents * SHORTEST_DOCUMENT
    cuts = [round(shared * part / sum(weights)) for part in accumulate(weights, initial=0.0)]
    return [SHORTEST_DOCUMENT + stop - start for start, stop in pairwise(cuts)]


def given_tail(tail: Tail, seed: int) -> list[int]:
    """Log-normal lengths until there are enough tokens; the last is cut."""
    rng = random.Random(seed)
    lengths: list[int] = []
    left = tail.tokens
    while left:
        drawn = int(rng.lognormvariate(tail.mu, tail.sigma))
        lengths.append(min(left, max(SHORTEST_DOCUMENT, drawn)))
        left -= lengths[-1]
    return lengths


def measure_times(batches: Sequence[TimedBatch] = BATCHES) -> Iterator[Figure]:
    """Two figures per batch and layout: the layout's time, which has no target, and the schedule's."""
    for batch in batches:
        for name, make in LAYOUTS.items():
            layout_s: list[float] = []
            schedule_s: list[float] = []
            for seed in range(batch.seeds):
                times = _times(batch, make, seed)
                layout_s.append(times.layout_s)
                schedule_s.append(times.schedule_s)
            yield _time_figure(f"{batch.name}, {name}: layout", layout_s, None)
            yield _time_figure(f"{batch.name}, {name}: schedule", schedule_s, batch.target_s)


def _time_figure(what: str, seconds: Sequence[float], target_s: float | None) -> Figure:
    spread = Spread.of([1000 * one for one in seconds])
    return Figure(
        section=TIME_SECTION,
        what=what,
        measured=spread.text(0, " ms"),
        target="" if target_s is None else f"<= {1000 * target_s:.0f} ms",
        ok=None if target_s is None else spread.median <= 1000 * target_s,
        exact=False,
        values=spread.values("milliseconds"),
    )


class Times(NamedTuple):
    """Seconds of one batch."""

    layout_s: float
    schedule_s: float
    """Of one rank."""


def _times(batch: TimedBatch, make: Callable[[Mask, int], Layout], seed: int) -> Times:
    """Times of one seed: every seed is another batch, so that no cache helps."""
    mask = masks.documents(given_count(batch.tokens, batch.documents, seed))
    rank = batch.ring * (seed + 1) // (batch.seeds + 1)  # another one each time, spread over the ring
    start = time.perf_counter()
    layout = make(mask, batch.ring)
    middle = time.perf_counter()
    ring_schedule(mask, layout, layout, rank)
    return Times(layout_s=middle - start, schedule_s=time.perf_counter() - middle)


def measure_load(tails: Sequence[Tail] = TAILS) -> Iterator[Figure]:
    """Two figures per distribution: the busiest rank's pairs, and its rows received against zigzag's.

    Worst of the seeds.
    """
    for tail in tails:
        balanced: list[BusiestRank] = []
        zigzag: list[BusiestRank] = []
        for seed in range(tail.seeds):
            mask = masks.documents(given_tail(tail, seed))
            balanced.append(_busiest_rank(mask, layouts.balanced(mask, tail.ring)))
            zigzag.append(_busiest_rank(mask, layouts.zigzag(mask.q_len, tail.ring)))
        what = f"mu {tail.mu:g}, sigma {tail.sigma:g}, {tail.tokens:,} tokens, R={tail.ring}"
        yield _area_figure(what, balanced, zigzag)
        yield _rows_figure(what, balanced, zigzag)


class BusiestRank(NamedTuple):
    """The most that a rank of one batch has."""

    area_ratio: float
    """Pairs in parts of the mean."""
    rows: int
    """Received rows."""


def _busiest_rank(mask: Mask, layout: Layout) -> BusiestRank:
    mean = mask.area / layout.ring
    return BusiestRank(
        area_ratio=max(load.areas(mask, layout)) / mean, rows=max(load.rows_received(mask, layout))
    )


def _area_figure(what: str, balanced: Sequence[BusiestRank], zigzag: Sequence[BusiestRank]) -> Figure:
    worst = max(busiest.area_ratio for busiest in balanced)
    worst_zigzag = max(busiest.area_ratio for busiest in zigzag)
    return Figure(
        section=LOAD_SECTION,
        what=f"{what}: busiest rank's pairs / mean",
        measured=f"{worst:.3f} (zigzag {worst_zigzag:.1f})",
        target=f"<= {AREA_TARGET}",
        ok=worst <= AREA_TARGET,
        exact=True,
        values={"balanced_area_ratio": worst, "zigzag_area_ratio": worst_zigzag},
    )


def _rows_figure(what: str, balanced: Sequence[BusiestRank], zigzag: Sequence[BusiestRank]) -> Figure:
    worst_ratio = max(ours.rows / theirs.rows for ours, theirs in zip(balanced, zigzag, strict=True))
    rows = max(busiest.rows for busiest in balanced)
    zigzag_rows = max(busiest.rows for busiest in zigzag)
    return Figure(
        section=LOAD_SECTION,
        what=f"{what}: rows received by the busiest / zigzag's",
        measured=f"{worst_ratio:.2f} ({rows:,} rows)",
        target="<= 1",
        ok=worst_ratio <= 1,
        exact=True,
        values={"rows_ratio": worst_ratio, "balanced_rows": rows, "zigzag_rows": zigzag_rows},
    )
