"""A picture of a mesh: which ranks swap heads for rows, which exchange K/V rows, and what each rank holds."""

from pathlib import Path
from typing import Any

from seqmesh.picture.canvas import FAINT, INK, box, check_degrees, figure, inches, rgb, save

ULYSSES_COLOR = "#2b6cb0"
RING_COLOR = "#c05621"
HELD_COLOR = "#2f855a"
ACROSS = 1.62
"""Inches from one ulysses rank to the next."""
DOWN = 1.24
"""Inches from one ring rank to the next."""
LEFT = 1.02
"""Inches from the left edge to the first rank."""
TOP = 0.72
"""Inches from the upper edge to the first rank."""
SIDE = 0.5
"""Inches of a square that stands for a tensor."""
NARROWEST = 7.4
"""Inches that the legend needs."""


def draw_mesh(ulysses: int, ring: int, path: Path) -> None:
    """Draw the ranks of a mesh, which groups exchange what, and what each holds before and after.

    Args:
        ulysses: ulysses degree, at most 8.
        ring: ring degree, at most 8.
        path: file to write; its ending says the format.

    Raises:
        ValueError: a degree below 1 or above 8.
        ImportError: matplotlib is not installed.
    """
    width, height = mesh_size(ulysses, ring)
    page = figure(width, height)
    put_mesh(page, 0.0, ulysses, ring)
    save(page, path)


def mesh_size(ulysses: int, ring: int) -> tuple[float, float]:
    """Inches that the picture of a mesh takes: across, down.

    Raises:
        ValueError: a degree below 1 or above 8.
    """
    check_degrees(ulysses=ulysses, ring=ring)
    return max(NARROWEST, LEFT + 0.13 + ACROSS * ulysses), 1.75 + DOWN * ring


def put_mesh(page: Any, top: float, ulysses: int, ring: int) -> None:
    """Draw a mesh on a page, so many inches below its upper edge."""
    width, height = mesh_size(ulysses, ring)
    axes = inches(page, 0, top, width, height)
    title = f"{ulysses * ring} ranks = ulysses {ulysses} x ring {ring}"
    axes.text(0.1, 0.2, title, fontsize=10.5, fontweight="bold", color=INK, va="center")
    for ulysses_rank in range(ulysses):
        _draw_ring_group(axes, ulysses_rank, ring)
    for ring_rank in range(ring):
        _draw_ulysses_group(axes, ring_rank, ulysses)
        for ulysses_rank in range(ulysses):
            _draw_rank(axes, (ulysses_rank, ring_rank), (ulysses, ring))
    _draw_mesh_legend(axes, height - 0.86, ulysses, ring)


def _draw_ring_group(axes: Any, ulysses_rank: int, ring: int) -> None:
    """A column: the ranks of one ulysses rank exchange K/V rows."""
    left = LEFT + ACROSS * ulysses_rank
    middle = LEFT - 0.1 + ACROSS * (ulysses_rank + 0.5)
    _group(axes, (left, TOP, ACROSS - 0.2, DOWN * ring - 0.04), RING_COLOR)
    look = {"fontsize": 8.5, "color": RING_COLOR, "ha": "center", "va": "center"}
    axes.text(middle, TOP - 0.14, f"ulysses rank {ulysses_rank}", **look)


def _draw_ulysses_group(axes: Any, ring_rank: int, ulysses: int) -> None:
    """A row: the ranks of one ring rank swap heads for rows."""
    top = TOP + 0.14 + DOWN * ring_rank
    middle = TOP - 0.02 + DOWN * (ring_rank + 0.5)
    _group(axes, (LEFT - 0.12, top, ACROSS * ulysses + 0.04, DOWN - 0.32), ULYSSES_COLOR)
    look = {"fontsize": 8.5, "color": ULYSSES_COLOR, "ha": "right", "va": "center"}
    axes.text(LEFT - 0.22, middle, f"ring rank {ring_rank}", **look)


def _group(axes: Any, place: tuple[float, float, float, float], color: str) -> None:
    """A process group: a rounded frame with a little colour in it."""
    from matplotlib.patches import FancyBboxPatch

    x, y, width, height = place
    look: dict[str, Any] = {
        "boxstyle": "round,pad=0,rounding_size=0.1",
        "facecolor": (*rgb(color), 0.07),
        "edgecolor": color,
        "linewidth": 1.2,
    }
    axes.add_patch(FancyBboxPatch((x, y), width, height, **look))


def _draw_rank(axes: Any, coordinates: tuple[int, int], degrees: tuple[int, int]) -> None:
    """A rank: its number, and the tensor with the part it holds, before and after the exchange of heads.

    Both arguments are (ulysses, ring).
    """
    ulysses_rank, ring_rank = coordinates
    ulysses, ring = degrees
    world = ulysses * ring
    number = ring_rank * ulysses + ulysses_rank
    x = LEFT + 0.1 + ACROSS * ulysses_rank
    y = TOP + 0.22 + DOWN * ring_rank
    look = {"fontsize": 8.5, "fontweight": "bold", "color": INK, "ha": "center", "va": "center"}
    axes.text(x + 0.61, y + 0.14, f"rank {number}", **look)
    top = y + 0.28
    before = x
    after = x + 0.72
    _draw_held(axes, before, top, (0.0, number / world, 1.0, 1 / world))
    _draw_held(axes, after, top, (ulysses_rank / ulysses, ring_rank / ring, 1 / ulysses, 1 / ring))
    middle = top + SIDE / 2
    arrow = {"arrowstyle": "->", "color": ULYSSES_COLOR, "linewidth": 1.2}
    axes.annotate("", xy=(after - 0.02, middle), xytext=(before + SIDE + 0.02, middle), arrowprops=arrow)


def _draw_held(axes: Any, left: float, top: float, part: tuple[float, float, float, float]) -> None:
    """The tensor, heads across and tokens down, and the part (x, y, width, height) of it that is held."""
    across, down, width, height = part
    tensor = (left, top, SIDE, SIDE)
    box(axes, tensor, "white")
    held = (left + SIDE * across, top + SIDE * down, SIDE * width, SIDE * height)
    box(axes, held, HELD_COLOR)
    box(axes, tensor, "none", FAINT)  # last: the held part must not cover the edge


def _draw_mesh_legend(axes: Any, y: float, ulysses: int, ring: int) -> None:
    """What rows, columns and squares mean."""
    lines = (
        (
            ULYSSES_COLOR,
            "blue row: a ulysses group."
            " One all-to-all swaps sequence shards for head shards, and one swaps back.",
        ),
        (
            RING_COLOR,
            "orange column: a ring group."
            " K/V rows travel, stage by stage, to the ranks whose queries need them.",
        ),
        (
            FAINT,
            f"squares: tokens (down) x heads (across). A rank holds {_share(ulysses * ring)} tokens"
            " with all heads, and after the",
        ),
        (FAINT, f"exchange {_share(ring)} tokens (its ring rank's) with {_share(ulysses)} heads."),
    )
    for number, (color, line) in enumerate(lines):
        axes.text(0.1, y + 0.19 * number + 0.1, line, fontsize=8, color=color, va="center")


def _share(parts: int) -> str:
    return "all" if parts == 1 else f"1/{parts} of the"
