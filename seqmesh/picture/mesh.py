"""A picture of a mesh: which ranks swap heads for rows, which exchange K/V rows, and what each rank holds
before and after.
"""

from pathlib import Path
from typing import Any

from seqmesh.picture.canvas import FAINT, INK, box, check_degrees, figure, inches, rgb, save

ULYSSES_COLOR, RING_COLOR, HELD_COLOR = "#2b6cb0", "#c05621", "#2f855a"
ACROSS, DOWN = 1.62, 1.24
"""Inches from one rank to the next."""
LEFT, TOP, NARROWEST = 1.02, 0.72, 7.4
"""Inches to the first rank, and the width that the legend needs."""


def draw_mesh(ulysses: int, ring: int, path: Path) -> None:
    """Draw the ranks of a mesh, which groups exchange what, and what each rank holds before and after the
    exchange of heads.

    Args:
        ulysses: ulysses degree, at most 8.
        ring: ring degree, at most 8.
        path: file to write; its ending says the format.

    Raises:
        ValueError: a degree below 1 or above 8.
        ImportError: matplotlib is not installed.
    """
    check_degrees(ulysses=ulysses, ring=ring)
    width, height = max(NARROWEST, LEFT + 0.13 + ACROSS * ulysses), 1.75 + DOWN * ring
    page = figure(width, height)
    axes = inches(page, 0, 0, width, height)
    title = f"{ulysses * ring} ranks = ulysses {ulysses} x ring {ring}"
    axes.text(0.1, 0.2, title, fontsize=10.5, fontweight="bold", color=INK, va="center")
    for u in range(ulysses):
        _group(axes, (LEFT + ACROSS * u, TOP, ACROSS - 0.2, DOWN * ring - 0.04), RING_COLOR)
        axes.text(
            LEFT - 0.1 + ACROSS * (u + 0.5),
            TOP - 0.14,
            f"ulysses rank {u}",
            fontsize=8.5,
            color=RING_COLOR,
            ha="center",
            va="center",
        )
    for r in range(ring):
        _group(
            axes, (LEFT - 0.12, TOP + 0.14 + DOWN * r, ACROSS * ulysses + 0.04, DOWN - 0.32), ULYSSES_COLOR
        )
        middle = TOP - 0.02 + DOWN * (r + 0.5)
        axes.text(
            LEFT - 0.22, middle, f"ring rank {r}", fontsize=8.5, color=ULYSSES_COLOR, ha="right", va="center"
        )
        for u in range(ulysses):
            _draw_rank(axes, LEFT + 0.1 + ACROSS * u, TOP + 0.22 + DOWN * r, (u, r), (ulysses, ring))
    _draw_mesh_legend(axes, height - 0.86, ulysses, ring)
    save(page, path)


def _group(axes: Any, place: tuple[float, float, float, float], color: str) -> None:
    """A process group: a rounded frame with a little colour in it."""
    from matplotlib.patches import FancyBboxPatch

    x, y, width, height = place
    rounded, fill = "round,pad=0,rounding_size=0.1", (*rgb(color), 0.07)
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle=rounded, facecolor=fill, edgecolor=color, linewidth=1.2
        )
    )


def _draw_rank(axes: Any, x: float, y: float, at: tuple[int, int], degrees: tuple[int, int]) -> None:
    """A rank: its number, and the whole tensor with the part it holds, before and after the exchange of
    heads.
    """
    (u, r), (ulysses, ring) = at, degrees
    number = r * ulysses + u
    axes.text(
        x + 0.61,
        y + 0.14,
        f"rank {number}",
        fontsize=8.5,
        fontweight="bold",
        color=INK,
        ha="center",
        va="center",
    )
    side, top, after = 0.5, y + 0.28, x + 0.72
    for left, across, down, part_width, part_height in (
        (x, 0.0, number / (ulysses * ring), 1.0, 1 / (ulysses * ring)),
        (after, u / ulysses, r / ring, 1 / ulysses, 1 / ring),
    ):
        box(axes, (left, top, side, side), "white")
        box(
            axes, (left + side * across, top + side * down, side * part_width, side * part_height), HELD_COLOR
        )
        box(axes, (left, top, side, side), "none", FAINT)
    arrow = {"arrowstyle": "->", "color": ULYSSES_COLOR, "linewidth": 1.2}
    axes.annotate(
        "", xy=(after - 0.02, top + side / 2), xytext=(x + side + 0.02, top + side / 2), arrowprops=arrow
    )


def _draw_mesh_legend(axes: Any, y: float, ulysses: int, ring: int) -> None:
    """What rows, columns and squares mean."""
    lines = (
        (
            ULYSSES_COLOR,
            "blue row: a ulysses group. One all-to-all swaps sequence shards for head shards, and one swaps back.",
        ),
        (
            RING_COLOR,
            "orange column: a ring group. K/V rows travel, stage by stage, to the ranks whose queries need them.",
        ),
        (
            FAINT,
            f"squares: tokens (down) x heads (across). A rank holds {_share(ulysses * ring)} tokens with all heads, and after the",
        ),
        (FAINT, f"exchange {_share(ring)} tokens (its ring rank's) with {_share(ulysses)} heads."),
    )
    for number, (color, line) in enumerate(lines):
        axes.text(0.1, y + 0.19 * number + 0.1, line, fontsize=8, color=color, va="center")


def _share(parts: int) -> str:
    return "all" if parts == 1 else f"1/{parts} of the"
