"""The text form of a schedule: a table with a line per rank and stage, for any size, and what it adds up to.

It is read off the `ring_schedule` of every rank, never off the mask, so a wrong schedule makes a wrong table.
"""

from collections.abc import Sequence

from seqmesh.layouts import Layout
from seqmesh.masks import Band, Mask
from seqmesh.schedule.ring import RingSchedule, Stage, Transfer, ring_schedule

HEADER = ("rank", "stage", "receives", "sends", "computes", "pairs")


def describe(mask: Mask, layout: Layout, stages: int | None = None) -> str:
    """The schedule of every ring rank as a table: a line per rank and stage, then the totals.

    Args:
        mask: of s queries and s keys.
        layout: of s tokens.
        stages: see `ring_schedule`.

    Raises:
        ValueError: a mask whose lengths differ, or a layout that does not fit it.
    """
    schedules = schedules_of_ranks(mask, layout, stages)
    table: list[tuple[str, ...]] = [HEADER]
    for schedule in schedules:
        for number, stage in enumerate(schedule.stages):
            table.append(_row(schedule.ring_rank, number, stage))
    title = f"{layout.name} layout of {layout.s:,} tokens over ring={layout.ring}"
    return "\n".join([title, *_aligned(table), totals(mask, schedules)])


def schedules_of_ranks(mask: Mask, layout: Layout, stages: int | None) -> list[RingSchedule]:
    """The schedule of every ring rank.

    Raises:
        ValueError: a mask whose lengths differ, or a layout that does not fit it.
    """
    if mask.q_len != mask.k_len:
        raise ValueError(
            f"a mask of {mask.q_len} queries and {mask.k_len} keys:"
            " pictures show self-attention; use equal lengths"
        )
    return [ring_schedule(mask, layout, layout, rank, stages) for rank in range(layout.ring)]


def totals(mask: Mask, schedules: Sequence[RingSchedule]) -> str:
    """The last line: balance, and traffic against a ring that passes every shard to every rank."""
    busiest = max(schedule.area for schedule in schedules)
    moved = sum(schedule.rows_received for schedule in schedules)
    rotating = sum(schedule.kv_rows for schedule in schedules) * (len(schedules) - 1)
    balance = "nothing to compute"
    if mask.area:
        balance = f"busiest rank {busiest * len(schedules) / mask.area:.2f} x the mean"
    share = ""
    if rotating:
        share = f", {100 * moved / rotating:.0f} % of the {rotating:,} of a rotating ring"
    return f"{mask.area:,} pairs, {balance}; {moved:,} K/V rows move{share}"


def peers(transfers: Sequence[Transfer], word: str) -> str:
    """`16 from 3`: rows and the peers they come from or go to."""
    if not transfers:
        return "-"
    rows = sum(transfer.rows for transfer in transfers)
    return f"{rows:,} {word} {', '.join(str(transfer.peer) for transfer in transfers)}"


def _row(ring_rank: int, number: int, stage: Stage) -> tuple[str, ...]:
    """The cells of a stage, in the order of the header."""
    return (
        str(ring_rank),
        str(number),
        peers(stage.receives, "from"),
        peers(stage.sends, "to"),
        _kinds(stage.blocks),
        f"{sum(block.area for block in stage.blocks):,}",
    )


def _kinds(blocks: Sequence[Band]) -> str:
    """`1 causal, 2 full`."""
    kinds = [_kind(block) for block in blocks]
    counted = [f"{kinds.count(kind)} {kind}" for kind in ("causal", "full", "band") if kind in kinds]
    return ", ".join(counted) or "-"


def _kind(block: Band) -> str:
    if block.hi is not None:
        return "band"
    return "full" if block.lo is None else "causal"


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns to the left, the last one, of numbers, to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines: list[str] = []
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        cells[-1] = row[-1].rjust(widths[-1])
        lines.append("  ".join(cells))
    return lines
