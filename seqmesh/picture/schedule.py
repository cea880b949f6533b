"""The picture of a schedule, and its text form: who computes which pair at which stage, and which rows travel
for it.

    left    the mask, query down and key across: colour = ring rank that computes the pair, shade = stage
    right   a row per ring rank, a column per stage: rows received and sent, and the blocks in the rank's own indices, to scale

Both sides are read off the `ring_schedule` of every rank, never off the mask, so a wrong schedule makes a
wrong picture.

Trade-off: pictures end at 8 ring ranks; `describe` has no limit.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqmesh.layouts import Layout
from seqmesh.masks import Band, Mask
from seqmesh.picture.canvas import (
    COLORS,
    EMPTY,
    FAINT,
    INK,
    box,
    check_degrees,
    figure,
    inches,
    rgb,
    save,
    shade,
)
from seqmesh.schedule.ring import RingSchedule, Stage, ring_schedule

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SAMPLES = 768
"""The grid shows at most this many queries and keys, evenly spaced."""
INCHES_OF_GRID, INCHES_OF_LABEL, INCHES_PER_STAGE, INCHES_PER_RANK, INCHES_OF_BOX = 3.6, 0.98, 1.02, 1.2, 0.8


def _schedules(mask: Mask, layout: Layout, stages: int | None) -> list[RingSchedule]:
    if mask.q_len != mask.k_len:
        raise ValueError(
            f"a mask of {mask.q_len} queries and {mask.k_len} keys: pictures show self-attention; use equal lengths"
        )
    return [ring_schedule(mask, layout, layout, rank, stages) for rank in range(layout.ring)]


def _totals(mask: Mask, schedules: Sequence[RingSchedule]) -> str:
    """The last line of both forms: balance, and traffic against a ring that passes every shard to every rank."""
    busiest, moved = max(s.area for s in schedules), sum(s.rows_received for s in schedules)
    rotating = sum(s.kv_rows for s in schedules) * (len(schedules) - 1)
    balance = (
        f"busiest rank {busiest * len(schedules) / mask.area:.2f} x the mean"
        if mask.area
        else "nothing to compute"
    )
    share = f", {100 * moved / rotating:.0f} % of the {rotating:,} of a rotating ring" if rotating else ""
    return f"{mask.area:,} pairs, {balance}; {moved:,} K/V rows move{share}"


def describe(mask: Mask, layout: Layout, stages: int | None = None) -> str:
    """The schedule of every ring rank as a table: a line per rank and stage, then the totals.

    Args:
        mask: of s queries and s keys.
        layout: of s tokens.
        stages: see `ring_schedule`.

    Raises:
        ValueError: a mask whose lengths differ, or a layout that does not fit it.
    """
    schedules = _schedules(mask, layout, stages)
    table = [("rank", "stage", "receives", "sends", "computes", "pairs")]
    for schedule in schedules:
        for number, stage in enumerate(schedule.stages):
            received, sent = _peers(stage.receives, "from"), _peers(stage.sends, "to")
            pairs = f"{sum(block.area for block in stage.blocks):,}"
            table.append((str(schedule.ring_rank), str(number), received, sent, _kinds(stage.blocks), pairs))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False))
        + "  "
        + row[-1].rjust(widths[-1])
        for row in table
    ]
    return "\n".join(
        [
            f"{layout.name} layout of {layout.s:,} tokens over ring={layout.ring}",
            *lines,
            _totals(mask, schedules),
        ]
    )


def _peers(transfers: Sequence[Any], word: str) -> str:
    """`16 from 3`: rows and the peers they come from or go to."""
    if not transfers:
        return "-"
    return f"{sum(t.rows for t in transfers):,} {word} {', '.join(str(t.peer) for t in transfers)}"


def _kinds(blocks: Sequence[Band]) -> str:
    """`1 causal, 2 full`."""
    kinds = [
        "full" if b.lo is None and b.hi is None else "causal" if b.hi is None else "band" for b in blocks
    ]
    return (
        ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("causal", "full", "band") if kind in kinds)
        or "-"
    )


def draw_schedule(mask: Mask, layout: Layout, path: Path, stages: int | None = None) -> None:
    """Draw the schedules of all ring ranks to a file (the name's ending says the format: .png, .svg, .pdf).

    Args:
        mask: of s queries and s keys.
        layout: of s tokens, over at most 8 ring ranks.
        path: file to write.
        stages: see `ring_schedule`.

    Raises:
        ValueError: more than 8 ring ranks, a mask whose lengths differ, or a layout that does not fit it.
        ImportError: matplotlib is not installed.
    """
    check_degrees(ring=layout.ring)
    schedules = _schedules(mask, layout, stages)
    longest_text = max(
        len(_peers(t, "from")) for s in schedules for stage in s.stages for t in (stage.receives, stage.sends)
    )
    pitch = max(INCHES_PER_STAGE, 0.35 + 0.058 * longest_text)
    left = INCHES_OF_GRID + 0.55
    width = left + INCHES_OF_LABEL + pitch * len(schedules[0].stages)
    height = 0.95 + max(INCHES_OF_GRID + 0.55, INCHES_PER_RANK * layout.ring)
    page = figure(width, height)
    sheet = inches(page, 0, 0, width, height)
    title = f"{layout.name} layout, ring of {layout.ring}: who computes which pair, and when"
    sheet.text(0.1, 0.2, title, fontsize=10.5, fontweight="bold", color=INK, va="center")
    sheet.text(0.1, height - 0.18, _totals(mask, schedules), fontsize=8.5, color=INK, va="center")
    _draw_grid(inches(page, 0.3, 0.62, INCHES_OF_GRID, INCHES_OF_GRID), mask, layout, schedules)
    _draw_timelines(inches(page, left, 0.34, width - left, height - 0.34), schedules, pitch)
    save(page, path)


def _draw_grid(axes: Any, mask: Mask, layout: Layout, schedules: Sequence[RingSchedule]) -> None:
    """The mask, query down and key across, with the owner of the tokens along both edges."""
    s = mask.q_len
    if not s:
        return
    import numpy as np

    rank_of, place_of = _sampled(layout)
    edge, look = 0.028 * s, {"interpolation": "nearest", "aspect": "equal"}
    owners = np.array([rgb(color) for color in COLORS])[rank_of]
    axes.imshow(_owners_image(rank_of, place_of, schedules), extent=(0, s, s, 0), **look)
    axes.imshow(owners[:, None], extent=(-1.6 * edge, -0.6 * edge, s, 0), **look)
    axes.imshow(owners[None, :], extent=(0, s, -0.6 * edge, -1.6 * edge), **look)
    axes.set_xlim(-1.6 * edge, s)
    axes.set_ylim(s, -1.6 * edge)
    axes.text(s / 2, s * 1.015, f"key 0 ... {s - 1:,}", ha="center", va="top", fontsize=8, color=FAINT)
    axes.text(
        -2 * edge,
        s / 2,
        f"query 0 ... {s - 1:,}",
        ha="right",
        va="center",
        rotation=90,
        fontsize=8,
        color=FAINT,
    )
    legend = "strips: the ring rank that holds a token\nsquare: the ring rank that computes a pair; lighter = at a later stage"
    axes.text(-1.6 * edge, s * 1.09, legend, va="top", fontsize=7.5, color=FAINT, linespacing=1.4)


def _sampled(layout: Layout) -> "tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]":
    """Of evenly spaced tokens, all if they are few: the ring rank that holds each, and its place there."""
    import numpy as np

    rank_of, place_of = np.empty(layout.s, np.int64), np.empty(layout.s, np.int64)
    for rank in range(layout.ring):
        held = np.fromiter(layout.positions(rank), np.int64)
        rank_of[held], place_of[held] = rank, np.arange(len(held))
    sampled = np.linspace(0, max(0, layout.s - 1), min(layout.s, SAMPLES)).astype(np.int64)
    return rank_of[sampled], place_of[sampled]


def _owners_image(
    rank_of: Any, place_of: Any, schedules: Sequence[RingSchedule]
) -> "npt.NDArray[np.float64]":
    """(samples, samples, 3): the colour of the rank and stage that compute each pair, read off the schedules'
    blocks.
    """
    import numpy as np

    image = np.ones((len(rank_of), len(rank_of), 3)) * rgb(EMPTY)
    for schedule in schedules:
        mine = np.flatnonzero(rank_of == schedule.ring_rank)
        for number, stage in enumerate(schedule.stages):
            column = _places_in_buffer(stage, number, schedule.ring_rank, rank_of, place_of)
            color = shade(COLORS[schedule.ring_rank], number, len(schedule.stages))
            for q_start, q_stop, k_start, k_stop, lo, hi in stage.blocks:
                rows = mine[(place_of[mine] >= q_start) & (place_of[mine] < q_stop)]
                columns = np.flatnonzero((column >= k_start) & (column < k_stop))
                difference = place_of[rows][:, None] - column[columns]
                inside = np.ones_like(difference, dtype=bool) if lo is None else difference >= lo
                if hi is not None:
                    inside &= difference <= hi
                down, across = np.nonzero(inside)
                image[rows[down], columns[across]] = color
    return image


def _places_in_buffer(
    stage: Stage, number: int, ring_rank: int, rank_of: Any, place_of: Any
) -> "npt.NDArray[np.int64]":
    """Where each sampled key lies in what a stage computes on: own storage, or the receive buffer; -1 where
    it does not.
    """
    import numpy as np

    if number == 0:
        return np.where(rank_of == ring_rank, place_of, -1)
    runs = [(t.peer, start, stop) for t in stage.receives for start, stop in t.runs]
    column = np.full(len(place_of), -1, np.int64)
    for (peer, start, stop), base in zip(
        runs, accumulate((stop - start for _, start, stop in runs), initial=0), strict=False
    ):
        here = (rank_of == peer) & (place_of >= start) & (place_of < stop)
        column[here] = base + place_of[here] - start
    return column


def _draw_timelines(axes: Any, schedules: Sequence[RingSchedule], pitch: float) -> None:
    """A row per rank, a column per stage: blocks to scale, queries down and keys across, what arrives above,
    what leaves below.
    """
    stages = len(schedules[0].stages)
    longest = max(max(s.q_rows, s.kv_rows, *(stage.rows_received for stage in s.stages)) for s in schedules)
    for number in range(stages):
        axes.text(
            INCHES_OF_LABEL + pitch * number,
            0.1,
            f"stage {number}",
            fontsize=8.5,
            color=INK,
            fontweight="bold",
            va="center",
        )
    for row, schedule in enumerate(schedules):
        top = 0.2 + INCHES_PER_RANK * row
        axes.text(
            0, top + 0.2, f"ring rank {row}", fontsize=8.5, color=COLORS[row], fontweight="bold", va="center"
        )
        detail = f"{schedule.q_rows:,} tokens\n{schedule.area:,} pairs\n{schedule.rows_received:,} rows in\n{schedule.rows_sent:,} rows out"
        axes.text(0, top + 0.31, detail, fontsize=7.5, color=FAINT, va="top", linespacing=1.3)
        for number in range(stages):
            color = shade(COLORS[row], number, stages)
            _draw_stage(
                axes,
                (INCHES_OF_LABEL + pitch * number, top),
                schedule,
                number,
                INCHES_OF_BOX / max(1, longest),
                color,
            )


def _draw_stage(
    axes: Any, corner: tuple[float, float], schedule: RingSchedule, number: int, scale: float, color: Any
) -> None:
    """One rank's stage: a box as wide as the keys there and as high as the rank's queries, with the blocks in
    it.
    """
    from matplotlib.patches import Polygon

    stage, (x, y) = schedule.stages[number], corner
    keys = stage.rows_received if number else schedule.kv_rows
    arrives = (
        f"in {_peers(stage.receives, 'from')}" if stage.receives else "nothing in" if number else "own rows"
    )
    leaves = f"out {_peers(stage.sends, 'to')}" if stage.sends else "nothing out"
    axes.text(x, y + 0.07, arrives, fontsize=7.5, color=INK, va="center")
    below = y + 0.16 + scale * schedule.q_rows + 0.09
    if number:
        axes.text(x, below, leaves, fontsize=7.5, color=FAINT, va="center")
    if not keys or not schedule.q_rows:
        return
    frame = (x, y + 0.16, scale * keys, scale * schedule.q_rows)
    box(axes, frame, EMPTY)
    for block in stage.blocks:
        corners = [(x + scale * k, y + 0.16 + scale * q) for q, k in outline(block)]
        axes.add_patch(Polygon(corners, closed=True, facecolor=color, edgecolor="white", linewidth=0.4))
    box(axes, frame, "none", FAINT)


def outline(band: Band) -> list[tuple[float, float]]:
    """Corners (query, key) of a band's pairs: its rectangle, clipped halfway between the diagonals inside and
    outside.
    """
    q_start, q_stop, k_start, k_stop, lo, hi = band
    corners: list[tuple[float, float]] = [
        (q_start, k_start),
        (q_start, k_stop),
        (q_stop, k_stop),
        (q_stop, k_start),
    ]
    if lo is not None:
        corners = _clip(corners, 1, lo - 0.5)
    if hi is not None:
        corners = _clip(corners, -1, -(hi + 0.5))
    return corners


def _clip(corners: Sequence[tuple[float, float]], sign: int, least: float) -> list[tuple[float, float]]:
    """The part of a convex polygon with sign * (q - k) >= least (Sutherland & Hodgman 1974)."""
    kept: list[tuple[float, float]] = []
    for (q, k), (next_q, next_k) in zip(corners, [*corners[1:], corners[0]], strict=True):
        here, there = sign * (q - k) - least, sign * (next_q - next_k) - least
        if here >= 0:
            kept.append((q, k))
        if (here < 0) != (there < 0):
            along = here / (here - there)
            kept.append((q + along * (next_q - q), k + along * (next_k - k)))
    return kept
