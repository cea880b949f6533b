"""What the pictures share: colours, a page measured in inches, boxes, and files that come out the same."""

from pathlib import Path
from typing import Any

MOST_DEGREE = 8
"""Ring or ulysses ranks that a picture can hold."""
COLORS = ("#2b6cb0", "#dd6b20", "#2f855a", "#b83280", "#6b46c1", "#b7791f", "#0987a0", "#c53030")
"""One per ring rank, dark enough for white paper; later stages are lighter."""
INK = "#1a202c"
FAINT = "#718096"
EMPTY = "#f1f4f8"
DPI = 200

Color = tuple[float, float, float] | str


def check_degrees(**degrees: int) -> None:
    """Refuse what does not fit.

    Raises:
        ValueError: a degree below 1 or above 8.
    """
    for name, degree in degrees.items():
        if not 1 <= degree <= MOST_DEGREE:
            raise ValueError(
                f"{name}={degree} does not fit in a picture;"
                f" draw 1 to {MOST_DEGREE}, or use seqmesh.picture.describe"
            )


def figure(width: float, height: float) -> Any:
    """An empty white figure of these inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "pictures need matplotlib, which is not installed; pip install 'seqmesh[train]'"
        ) from None
    made = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(made)  # not pyplot, which looks for a screen and keeps every figure
    return made


def inches(page: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes without lines at this place of a figure, whose units are inches, downwards."""
    across, down = page.get_size_inches()
    axes = page.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return axes


def save(page: Any, path: Path) -> None:
    """Write a figure. No version, no date and no random names in it: equal pictures are equal files."""
    from matplotlib import rc_context

    metadata = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
    with rc_context({"svg.hashsalt": "seqmesh"}):
        page.savefig(path, metadata=metadata.get(path.suffix))


def rgb(color: str) -> tuple[float, float, float]:
    """`#rrggbb` as three numbers from 0 to 1."""
    red, green, blue = (int(color[n : n + 2], 16) / 255 for n in (1, 3, 5))
    return red, green, blue


def shade(color: str, stage: int, stages: int) -> tuple[float, float, float]:
    """The colour, mixed with up to 65 % of white for the last stage."""
    white = 0.65 * stage / max(1, stages - 1)
    red, green, blue = (white + (1 - white) * part for part in rgb(color))
    return red, green, blue


def box(axes: Any, place: tuple[float, float, float, float], fill: Color, edge: str | None = None) -> None:
    """A rectangle (x, y, width, height), with a thin edge if it has a colour."""
    from matplotlib.patches import Rectangle

    x, y, width, height = place
    line = 0.6 if edge else 0
    axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge, linewidth=line))
