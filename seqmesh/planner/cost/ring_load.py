"""The load of a ring degree: what the busiest rank computes and moves at each stage of the very schedule that
would be executed.

    mask, layout, R -> areas and rows of every rank (load.py) -> the busiest rank's schedule (schedule.py) ->
    stages, alike ones together

All wait for the busiest rank. A block's pairs are weighed by how short its shorter side is: 1 + half_rows /
rows (assumptions.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from seqmesh import layouts, masks
from seqmesh.layouts import Layout, load, split_evenly
from seqmesh.masks import Mask
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
    """Number of the first of them; 0 for a rank's own rows.

    In a ring of R - 1 exchanges, the distance in ring ranks.
    """
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
    exchanges: int
    """Stages after the first: R - 1 of a ring, 1 of an all-gather."""
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
        hops = split_evenly(ring - 1, max(1, self.exchanges))
        moved = left = 0.0
        for stage in self.stages[1:]:
            for number in range(stage.hop, stage.hop + stage.count):
                spanned = range(hops[number - 1] + 1, hops[number] + 1)
                share = sum(min(1.0, hop / per_node, (ring - hop) / per_node) for hop in spanned) / len(
                    spanned
                )
                moved += stage.received
                left += stage.received * share
        return left / moved if moved else 0.0


def ring_load(
    mask: Mask, layout: str, ring: int, half_rows: float, exchanges: Sequence[int | None] = (None,)
) -> list[RingLoad]:
    """The load of a ring degree under a layout of this name (the name is one of `Schedule.build`'s), for each
    number of exchanges.
    """
    laid = _layout(mask, layout, ring)
    areas, received = _areas_and_rows(mask, laid)
    busiest = max(range(ring), key=lambda r: areas[r] + layouts.DEFAULT_PAIRS_PER_ROW * received[r])
    imbalance = max(areas) * ring / mask.area if mask.area else 1.0
    plans = [ring_schedule(mask, laid, laid, busiest, stages) for stages in exchanges]
    return [
        RingLoad(
            layout=laid,
            stages=_runs(plan, half_rows),
            exchanges=len(plan.stages) - 1,
            imbalance=imbalance,
            rows_moved=sum(received),
        )
        for plan in plans
    ]


def _areas_and_rows(mask: Mask, laid: Layout) -> tuple[list[int], list[int]]:
    """Pairs and rows received of every rank.

    Strided spans are measured by rank 0's schedule where token by token would take long.
    """
    if mask.q_len > STRIDED_TOKENS and any(span.stride > 1 for span in laid.ranks[0]):
        plan = ring_schedule(mask, laid, laid, 0)
        return [plan.area] * laid.ring, [plan.rows_received] * laid.ring
    return load.areas(mask, laid), load.rows_received(mask, laid)


def _runs(plan: RingSchedule, half_rows: float) -> tuple[StageLoad, ...]:
    """The stages of a schedule, those that are alike and follow one another together."""
    alike = [(number, _measure(stage, half_rows)) for number, stage in enumerate(plan.stages)]
    stages = []
    for key, run in groupby(alike, key=lambda item: (item[0] == 0, item[1])):
        members = list(run)
        pairs, slow, blocks, q_rows, sent, got = key[1]
        stages.append(
            StageLoad(
                count=len(members),
                hop=members[0][0],
                pairs=pairs,
                slow_pairs=slow,
                blocks=blocks,
                q_rows=q_rows,
                sent=sent,
                received=got,
            )
        )
    return tuple(stages)


def _layout(mask: Mask, name: str, ring: int) -> Layout:
    if name == "auto" and ring > 1 and mask.q_len >= ZIGZAG_ROWS * ring and mask == masks.causal(mask.q_len):
        return layouts.zigzag(mask.q_len, ring)  # what auto picks, without comparing (a test shows it)
    return layouts.named(name, mask, mask.q_len, ring)


def _measure(stage: Stage, half_rows: float) -> tuple[int, float, int, int, int, int]:
    pairs, slow, q_rows = 0, 0.0, 0
    for block in stage.blocks:
        rows, area = block.q_stop - block.q_start, block.area
        pairs += area
        slow += area * (1 + half_rows / min(rows, area / rows))
        q_rows += rows
    return pairs, slow, len(stage.blocks), q_rows, stage.rows_sent, stage.rows_received
