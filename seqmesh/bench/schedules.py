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

from seqmesh import layouts, masks
from seqmesh.bench.figures import Figure, Spread
from seqmesh.layouts import Layout, load
from seqmesh.masks import Mask
from seqmesh.schedule.ring import ring_schedule

TIME_SECTION = "one rank's schedule, built anew"
LOAD_SECTION = "load of log-normal documents, balanced layout"
AREA_TARGET = 1.05
SHORTEST_DOCUMENT = 16
SIGMA = 1.3

LAYOUTS: dict[str, Callable[[Mask, int], Layout]] = {
    "auto": layouts.auto,
    "balanced": layouts.balanced,
    "zigzag": lambda mask, ring: layouts.zigzag(mask.q_len, ring),
}


@dataclass(frozen=True, kw_only=True)
class Batch:
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
    Batch(name="1M tokens, 1,000 documents, R=64", tokens=2**20, documents=1000, ring=64, target_s=0.05),
    Batch(
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
    rng, lengths, left = random.Random(seed), list[int](), tail.tokens
    while left:
        lengths.append(min(left, max(SHORTEST_DOCUMENT, int(rng.lognormvariate(tail.mu, tail.sigma)))))
        left -= lengths[-1]
    return lengths


def measure_times(batches: Sequence[Batch] = BATCHES) -> Iterator[Figure]:
    """Two figures per batch and layout: the layout's time, which has no target, and the schedule's."""
    for batch in batches:
        for name, make in LAYOUTS.items():
            layout_s, schedule_s = zip(
                *(_times(batch, make, seed) for seed in range(batch.seeds)), strict=True
            )
            for what, times, target_s in (
                ("layout", layout_s, None),
                ("schedule", schedule_s, batch.target_s),
            ):
                spread = Spread.of([1000 * seconds for seconds in times])
                yield Figure(
                    section=TIME_SECTION,
                    what=f"{batch.name}, {name}: {what}",
                    measured=spread.text(0, " ms"),
                    target="" if target_s is None else f"<= {1000 * target_s:.0f} ms",
                    ok=None if target_s is None else spread.median <= 1000 * target_s,
                    exact=False,
                    values=spread.values("milliseconds"),
                )


def _times(batch: Batch, make: Callable[[Mask, int], Layout], seed: int) -> tuple[float, float]:
    """Seconds for the layout and for a rank's schedule. Every seed is another batch, so that no cache helps."""
    mask = masks.documents(given_count(batch.tokens, batch.documents, seed))
    start = time.perf_counter()
    layout = make(mask, batch.ring)
    middle = time.perf_counter()
    ring_schedule(mask, layout, layout, batch.ring * (seed + 1) // (batch.seeds + 1))
    return middle - start, time.perf_counter() - middle


def measure_load(tails: Sequence[Tail] = TAILS) -> Iterator[Figure]:
    """Two figures per distribution: the busiest rank's pairs, and its rows received against zigzag's.

    Worst of the seeds.
    """
    for tail in tails:
        area, zigzag_area, rows, zigzag_rows = zip(
            *(_loads(tail, seed) for seed in range(tail.seeds)), strict=True
        )
        what = f"mu {tail.mu:g}, sigma {tail.sigma:g}, {tail.tokens:,} tokens, R={tail.ring}"
        yield Figure(
            section=LOAD_SECTION,
            what=f"{what}: busiest rank's pairs / mean",
            measured=f"{max(area):.3f} (zigzag {max(zigzag_area):.1f})",
            target=f"<= {AREA_TARGET}",
            ok=max(area) <= AREA_TARGET,
            exact=True,
            values={"balanced_area_ratio": max(area), "zigzag_area_ratio": max(zigzag_area)},
        )
        share = [ours / theirs for ours, theirs in zip(rows, zigzag_rows, strict=True)]
        yield Figure(
            section=LOAD_SECTION,
            what=f"{what}: rows received by the busiest / zigzag's",
            measured=f"{max(share):.2f} ({max(rows):,} rows)",
            target="<= 1",
            ok=max(share) <= 1,
            exact=True,
            values={"rows_ratio": max(share), "balanced_rows": max(rows), "zigzag_rows": max(zigzag_rows)},
        )


def _loads(tail: Tail, seed: int) -> tuple[float, float, int, int]:
    """Of one batch: the busiest rank's pairs in parts of the mean, balanced and zigzag; and the most rows
    received, likewise.
    """
    mask = masks.documents(given_tail(tail, seed))
    ours, zigzag = (LAYOUTS[name](mask, tail.ring) for name in ("balanced", "zigzag"))
    mean = mask.area / tail.ring
    areas = [max(load.areas(mask, layout)) / mean for layout in (ours, zigzag)]
    return areas[0], areas[1], max(load.rows_received(mask, ours)), max(load.rows_received(mask, zigzag))
