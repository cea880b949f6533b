"""The picture of a schedule: who computes which pair at which stage, and which rows travel for it.

    left    the mask, query down and key across: colour = ring rank that computes the pair, shade = stage
    right   a row per ring rank, a column per stage: rows received and sent, and the blocks in the rank's own
            indices, to scale

Both sides are read off the `ring_schedule` of every rank, never off the mask, so a wrong schedule makes a
wrong picture.

Trade-off: pictures end at 8 ring ranks; `describe` has no limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    save,
    shade,
)
from seqmesh.picture.grid import draw_grid
from seqmesh.picture.text import peers, schedules_of_ranks, totals
from seqmesh.schedule.ring import RingSchedule

INCHES_OF_GRID = 3.6
LEFT_OF_STAGES = INCHES_OF_GRID + 0.55
INCHES_OF_LABEL = 0.98
INCHES_PER_STAGE = 1.02
"""Wider where what a stage receives and sends takes more text."""
INCHES_PER_RANK = 1.2
INCHES_OF_BOX = 0.8
"""The longest side of any stage's box."""


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
    drawing = ScheduleDrawing.of(mask, layout, stages)
    page = figure(drawing.width, drawing.height)
    drawing.put(page, top=0.0)
    save(page, path)


@dataclass(frozen=True, kw_only=True)
class ScheduleDrawing:
    """The picture of a schedule, and the room that it takes."""

    layout: Layout
    schedules: Sequence[RingSchedule]
    totals: str
    """The line below."""
    pitch: float
    """Inches from one stage to the next."""

    @staticmethod
    def of(mask: Mask, layout: Layout, stages: int | None = None) -> "ScheduleDrawing":
        """Of all ring ranks; what is refused is refused here, see `draw_schedule`."""
        check_degrees(ring=layout.ring)
        schedules = schedules_of_ranks(mask, layout, stages)
        return ScheduleDrawing(
            layout=layout,
            schedules=schedules,
            totals=totals(mask, schedules),
            pitch=max(INCHES_PER_STAGE, 0.35 + 0.058 * _longest_text(schedules)),  # of a character at 7.5 pt
        )

    @property
    def width(self) -> float:
        """Inches."""
        return LEFT_OF_STAGES + INCHES_OF_LABEL + self.pitch * len(self.schedules[0].stages)

    @property
    def height(self) -> float:
        """Inches."""
        return 0.95 + max(INCHES_OF_GRID + 0.55, INCHES_PER_RANK * self.layout.ring)

    def put(self, page: Any, top: float) -> None:
        """Draw it on a page, so many inches below its upper edge."""
        sheet = inches(page, 0, top, self.width, self.height)
        title = f"{self.layout.name} layout, ring of {self.layout.ring}: who computes which pair, and when"
        sheet.text(0.1, 0.2, title, fontsize=10.5, fontweight="bold", color=INK, va="center")
        sheet.text(0.1, self.height - 0.18, self.totals, fontsize=8.5, color=INK, va="center")
        grid = inches(page, 0.3, top + 0.62, INCHES_OF_GRID, INCHES_OF_GRID)
        draw_grid(grid, self.layout, self.schedules)
        right = self.width - LEFT_OF_STAGES
        timelines = inches(page, LEFT_OF_STAGES, top + 0.34, right, self.height - 0.34)
        _draw_timelines(timelines, self.schedules, self.pitch)


def _longest_text(schedules: Sequence[RingSchedule]) -> int:
    """Characters of the longest text above or below a stage's box."""
    longest = 0
    for schedule in schedules:
        for stage in schedule.stages:
            for transfers in (stage.receives, stage.sends):
                longest = max(longest, len(peers(transfers, "from")))  # the wider word, for both
    return longest


def _draw_timelines(axes: Any, schedules: Sequence[RingSchedule], pitch: float) -> None:
    """A row per rank, a column per stage, all to one scale."""
    stages = len(schedules[0].stages)
    scale = INCHES_OF_BOX / max(1, _longest_side(schedules))
    for number in range(stages):
        x = INCHES_OF_LABEL + pitch * number
        axes.text(x, 0.1, f"stage {number}", fontsize=8.5, color=INK, fontweight="bold", va="center")
    for row, schedule in enumerate(schedules):
        top = 0.2 + INCHES_PER_RANK * row
        look = {"fontsize": 8.5, "color": COLORS[row], "fontweight": "bold", "va": "center"}
        axes.text(0, top + 0.2, f"ring rank {row}", **look)
        detail = (
            f"{schedule.q_rows:,} tokens\n{schedule.area:,} pairs\n"
            f"{schedule.rows_received:,} rows in\n{schedule.rows_sent:,} rows out"
        )
        axes.text(0, top + 0.31, detail, fontsize=7.5, color=FAINT, va="top", linespacing=1.3)
        for number in range(stages):
            color = shade(COLORS[row], number, stages)
            _draw_stage(axes, (INCHES_OF_LABEL + pitch * number, top), schedule, number, scale, color)


def _longest_side(schedules: Sequence[RingSchedule]) -> int:
    """Rows of the longest side of any stage's box."""
    longest = 0
    for schedule in schedules:
        longest = max(longest, schedule.q_rows, schedule.kv_rows)
        for stage in schedule.stages:
            longest = max(longest, stage.rows_received)
    return longest


def _draw_stage(
    axes: Any, corner: tuple[float, float], schedule: RingSchedule, number: int, scale: float, color: Any
) -> None:
    """One rank's stage: what arrives above, what leaves below, and a box with the blocks in it.

    The box is as wide as the keys there and as high as the rank's queries.
    """
    from matplotlib.patches import Polygon

    stage = schedule.stages[number]
    x, y = corner
    top = y + 0.16
    keys = stage.rows_received if number else schedule.kv_rows
    axes.text(x, y + 0.07, _arrives(schedule, number), fontsize=7.5, color=INK, va="center")
    if number:  # stage 0 sends nothing: what it computes on is there already
        leaves = f"out {peers(stage.sends, 'to')}" if stage.sends else "nothing out"
        below = top + scale * schedule.q_rows + 0.09
        axes.text(x, below, leaves, fontsize=7.5, color=FAINT, va="center")
    if not keys or not schedule.q_rows:
        return
    frame = (x, top, scale * keys, scale * schedule.q_rows)
    box(axes, frame, EMPTY)
    for block in stage.blocks:
        corners = [(x + scale * k, top + scale * q) for q, k in outline(block)]
        axes.add_patch(Polygon(corners, closed=True, facecolor=color, edgecolor="white", linewidth=0.4))
    box(axes, frame, "none", FAINT)  # last: blocks must not cover the edge


def _arrives(schedule: RingSchedule, number: int) -> str:
    receives = schedule.stages[number].receives
    if receives:
        return f"in {peers(receives, 'from')}"
    return "nothing in" if number else "own rows"


def outline(band: Band) -> list[tuple[float, float]]:
    """Corners (query, key) of a band's pairs: its rectangle, clipped at its diagonals.

    A pair is a square of side 1, so an edge runs halfway between the last diagonal inside and the first one
    outside, and cuts the squares of a staircase into equal parts.
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
        here = sign * (q - k) - least
        there = sign * (next_q - next_k) - least
        if here >= 0:
            kept.append((q, k))
        if (here < 0) != (there < 0):
            # The side crosses the line: the crossing is a corner of what is kept.
            along = here / (here - there)
            kept.append((q + along * (next_q - q), k + along * (next_k - k)))
    return kept
