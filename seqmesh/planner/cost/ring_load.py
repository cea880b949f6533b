"""The load of a ring degree: what the busiest rank does at each stage of the schedule that would run.

    mask, layout, R -> pairs and rows of every rank                     layouts/load.py
                    -> the busiest rank's schedule                      schedule/ring.py
                    -> its stages, alike ones together

All wait for the busiest rank. A block's pairs are weighed by how short its shorter side is: 1 + half_rows /
rows (assumptions.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from seqmesh import layouts, masks
from seqmesh.layouts import Layout, load
from seqmesh.masks import Mask
from seqmesh.schedule.hops import Stages, exchanges
from seqmesh.schedule.ring import RingSchedule, Stage, ring_schedule

STRIDED_TOKENS = 65536
"""Beyond so many tokens the ranks of a striped layout are taken to be alike: they are, to a token a row."""
ZIGZAG_ROWS = 4096
"""From so many rows of a rank on, `auto` picks zigzag for a causal mask whatever the ring degree."""


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """What one stage of the busiest rank computes and moves, and how many such stages follow one another."""

    count: int
    hop: int
    """Number of the first of them; 0 for a rank's own rows."""
    pairs: int
    slow_pairs: float
    """Pairs, each weighed by the inverse of its block's efficiency."""
    blocks: int
    q_rows: int
    """Query rows of all blocks: what is merged."""
    sent: int
    received: int


@dataclass(frozen=True, kw_only=True)
class RingLoad:
    """One ring degree: the busiest rank's stages, and what all ranks move."""

    layout: Layout
    stages: tuple[StageLoad, ...]
    asked: Stages
    """`stages` of Schedule.build, which these stages come of."""
    exchanges: int
    """Stages after the first: one for each hop that is used, of a ring; 1 of an all-gather."""
    hops: tuple[tuple[int, ...], ...]
    """Of each stage, one by one, the distances in ring ranks that rows travel."""
    imbalance: float
    """Pairs of the busiest rank over the mean."""
    rows_moved: int
    """K/V rows that all ring ranks send in a forward."""

    def off_node(self, per_node: int) -> float:
        """Share of the rows that leave their node when so many neighbours of the ring share one.

        Hop t is to the t-th neighbour.
        """
        ring = self.layout.ring
        if per_node >= ring:
            return 0.0
        moved = left = 0.0
        for stage in self.stages[1:]:
            for number in range(stage.hop, stage.hop + stage.count):
                spanned = self.hops[number]
                # Of a node's ranks the last `hop` have that neighbour on another node; the ring is closed.
                shares = (min(1.0, hop / per_node, (ring - hop) / per_node) for hop in spanned)
                moved += stage.received
                left += stage.received * (sum(shares) / len(spanned))
        return left / moved if moved else 0.0


def ring_load(
    mask: Mask, layout: str | Layout, ring: int, half_rows: float, tried: Sequence[Stages] = (None,)
) -> list[RingLoad]:
    """The load of a ring degree, for each value of `stages` that gives other exchanges than those before it.

    Args:
        mask: of one sequence.
        layout: or its name, one of `Schedule.build`'s.
        ring: ring degree.
        half_rows: rows of a block that runs at half efficiency.
        tried: values of `stages` of `ring_schedule`.
    """
    laid = layout if isinstance(layout, Layout) else lay_out([mask], [1], layout, ring)
    areas, received = _areas_and_rows(mask, laid)
    busiest = max(range(ring), key=lambda r: areas[r] + layouts.DEFAULT_PAIRS_PER_ROW * received[r])
    imbalance = max(areas) * ring / mask.area if mask.area else 1.0
    loads = []
    known = set()
    for stages in tried:
        hops = exchanges(mask, laid, laid, stages)
        if hops in known:
            continue
        known.add(hops)
        schedule = ring_schedule(mask, laid, laid, busiest, stages)
        loads.append(
            RingLoad(
                layout=laid,
                stages=_stage_loads(schedule, half_rows),
                asked=stages,
                exchanges=len(hops),
                hops=tuple(stage.hops for stage in schedule.stages),
                imbalance=imbalance,
                rows_moved=sum(received),
            )
        )
    return loads


def lay_out(found: Sequence[Mask], layers: Sequence[int], name: str, ring: int) -> Layout:
    """The layout of a name for masks of so many layers each, as the trainer takes it (parallel/batch.py).

    Args:
        found: the masks, of one length.
        layers: of each.
        name: one of `Schedule.build`'s.
        ring: ring degree.
    """
    mask = found[0]
    if len(found) > 1 and name in ("auto", "balanced"):
        return (layouts.auto if name == "auto" else layouts.balanced)(found, ring, weights=layers)
    if name == "auto" and ring > 1 and mask.q_len >= ZIGZAG_ROWS * ring and mask == masks.causal(mask.q_len):
        return layouts.zigzag(mask.q_len, ring)  # what auto picks, without comparing (a test shows it)
    return layouts.named(name, mask, mask.q_len, ring)


def _areas_and_rows(mask: Mask, laid: Layout) -> tuple[list[int], list[int]]:
    """Pairs and rows received of every rank.

    Strided spans are measured by rank 0's schedule where token by token would take long.
    """
    if mask.q_len > STRIDED_TOKENS and any(span.stride > 1 for span in laid.ranks[0]):
        schedule = ring_schedule(mask, laid, laid, 0)
        return [schedule.area] * laid.ring, [schedule.rows_received] * laid.ring
    return load.areas(mask, laid), load.rows_received(mask, laid)


@dataclass(frozen=True, kw_only=True)
class _Measure:
    """What one stage computes and moves: stages are alike if all of this is."""

    own: bool
    """Whether it is a rank's first stage, of its own rows: nothing is merged or received there."""
    pairs: int
    slow_pairs: float
    blocks: int
    q_rows: int
    sent: int
    received: int


def _measure(number: int, stage: Stage, half_rows: float) -> _Measure:
    pairs = q_rows = 0
    slow_pairs = 0.0
    for block in stage.blocks:
        rows = block.q_stop - block.q_start
        area = block.area
        shorter = min(rows, area / rows)  # the mean number of keys of a row is the block's other side
        pairs += area
        slow_pairs += area * (1 + half_rows / shorter)
        q_rows += rows
    return _Measure(
        own=number == 0,
        pairs=pairs,
        slow_pairs=slow_pairs,
        blocks=len(stage.blocks),
        q_rows=q_rows,
        sent=stage.rows_sent,
        received=stage.rows_received,
    )


def _stage_loads(schedule: RingSchedule, half_rows: float) -> tuple[StageLoad, ...]:
    """The stages of a schedule, those that are alike and follow one another together."""
    measures = [_measure(number, stage, half_rows) for number, stage in enumerate(schedule.stages)]
    loads = []
    hop = 0
    for measure, alike in groupby(measures):
        count = len(list(alike))
        loads.append(
            StageLoad(
                count=count,
                hop=hop,
                pairs=measure.pairs,
                slow_pairs=measure.slow_pairs,
                blocks=measure.blocks,
                q_rows=measure.q_rows,
                sent=measure.sent,
                received=measure.received,
            )
        )
        hop += count
    return tuple(loads)
