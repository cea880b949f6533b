"""A picture of candidates: memory by category against what the GPU has, and the step's time by term.

`seqmesh plan --plot`.

    memory of a GPU                     a step
    |#### states |## activations | :    |#### compute |## exchanges |  o-----o

    `:` is the capacity, `o` the lower and the upper bound.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqmesh.planner.cost.estimate import COMPUTE, PIPELINE, StepEstimate
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.words import mesh_words

MOST_BARS = 16
SMALL = 0.01
"""A part that is less than this of the longest bar everywhere is drawn under "other"."""
OTHER = "other"
GREY = "#bbbbbb"
COOL = ("#33668f", "#66a3cc", "#a9d0e8", "#2e8b74", "#7cc4a8", "#c3e3d0")
"""States, and work of the GPU."""
WARM = ("#c8553d", "#f0a35e", "#f6d186", "#9c3848", "#e58f9c", "#d9a679", "#7a4b2a")
"""Activations, and exchanges."""
VIOLET = ("#6a4c93", "#9d86be", "#cdbfe0", "#4a3060")
"""Buffers of the moment of the peak, and the pipeline's idle time."""
GB = 1e9
"""As text has it."""
KEPT = ("parameters", "gradients", "optimizer", "zero_buffers", "overhead")

Bars = Sequence[Mapping[str, float]]


def plot(estimates: Sequence[StepEstimate], capacity: int, path: Path, title: str) -> None:
    """Draw the candidates, one bar each, the first on top.

    Args:
        estimates: at least one and at most 16.
        capacity: bytes that a GPU may use.
        path: of the picture; its suffix says the format (png, pdf, svg).
        title: above both panels.

    Raises:
        ValueError: no candidates, too many, or a suffix that matplotlib does not write.
    """
    if not 1 <= len(estimates) <= MOST_BARS:
        raise ValueError(
            f"{len(estimates)} candidates to draw: a picture takes 1 to {MOST_BARS};"
            f" use --top {MOST_BARS} or less"
        )
    figure = _figure(len(estimates), path)
    figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)
    memory, time = figure.subplots(1, 2, sharey=True)
    _memory(memory, estimates, capacity)
    _time(time, estimates)
    names = [label(estimate.point) + ("" if estimate.fits else "\ndoes not fit") for estimate in estimates]
    memory.set_yticks(range(len(estimates)), names, fontsize=9)
    spare = max(0, 2 - len(estimates)) / 2  # room, for a single bar would fill the panel
    memory.set_ylim(len(estimates) - 0.4 + spare, -0.6 - spare)
    _legend(figure, memory, "left")
    _legend(figure, time, "right")
    figure.savefig(path)


def _figure(bars: int, path: Path) -> Any:
    """A figure for so many bars that can be saved under this suffix.

    Raises:
        ValueError: matplotlib does not write such files.
    """
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(13.5, 2.7 + 0.46 * max(2, bars)), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    if path.suffix.lstrip(".").lower() not in figure.canvas.get_supported_filetypes():
        raise ValueError(
            f"{str(path)!r}: no picture format has the suffix {path.suffix!r}; use .png, .pdf or .svg"
        )
    return figure


def _legend(figure: Any, axes: Any, side: str) -> None:
    """The legend of one panel, below it."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc=f"outside lower {side}", ncols=3, fontsize=8.5, frameon=False)


def label(point: Point) -> str:
    """What sets a point apart: its degrees above 1, ZeRO stage, and memory savers."""
    words = mesh_words(point).split()
    words += [f"zero{point.zero}"] if point.zero else []
    words += [f"mb{point.micro_batch}"] if point.micro_batch > 1 else []
    words += ["ckpt"] if point.checkpointing != "none" else []
    words += [f"tile-{point.tiling}"] if point.tiling != "none" else []
    words += [f"offload-{point.offload}"] if point.offload != "none" else []
    return " ".join(words)


def parts(bars: Bars) -> dict[str, list[float]]:
    """The parts of all bars by name, those that are small everywhere as "other", which comes last."""
    longest = max(sum(bar.values()) for bar in bars)
    names: dict[str, None] = {}  # in the order in which they first come
    for bar in bars:
        names.update(dict.fromkeys(bar))
    series = {}
    for name in names:
        sizes = [bar.get(name, 0.0) for bar in bars]
        if max(sizes) >= SMALL * longest:
            series[name] = sizes
    rest = [sum(size for name, size in bar.items() if name not in series) for bar in bars]
    return {**series, OTHER: rest} if any(rest) else series


def _memory(axes: Any, estimates: Sequence[StepEstimate], capacity: int) -> None:
    def family(name: str) -> tuple[str, ...]:
        if name in KEPT:
            return COOL
        return WARM if name.startswith(("activations", "checkpoints")) else VIOLET

    categories = [estimate.memory.categories for estimate in estimates]
    bars = [{name: size / GB for name, size in sizes.items()} for sizes in categories]
    _bars(axes, bars, estimates, family)
    axes.axvline(
        capacity / GB,
        color="black",
        linestyle="--",
        linewidth=1.4,
        label=f"capacity: {capacity / GB:.3g} GB",
    )
    axes.set_xlim(right=1.04 * max(capacity, *(estimate.memory.total for estimate in estimates)) / GB)
    totals = [estimate.memory.total / GB for estimate in estimates]
    _finish(axes, "Memory of a GPU at its peak", "GB", totals)


def _time(axes: Any, estimates: Sequence[StepEstimate]) -> None:
    longest = max(estimate.seconds for estimate in estimates)
    unit, scale = ("s", 1.0) if longest >= 1 else ("ms", 1e3)
    causes: dict[str, str] = {}
    for estimate in estimates:
        causes.update({term.name: term.cause for term in estimate.terms})

    def family(name: str) -> tuple[str, ...]:
        return {COMPUTE: COOL, PIPELINE: VIOLET}.get(causes[name], WARM)

    bars = [
        {term.name: term.exposed * scale for term in estimate.terms if term.exposed} for estimate in estimates
    ]
    _bars(axes, bars, estimates, family)
    _bounds(axes, estimates, scale)
    totals = [estimate.seconds * scale for estimate in estimates]
    _finish(axes, "Time of a step: what each piece adds to the estimate", unit, totals)


def _bounds(axes: Any, estimates: Sequence[StepEstimate], scale: float) -> None:
    """A line below each bar from its lower to its upper bound."""
    lower = [estimate.lower * scale for estimate in estimates]
    upper = [estimate.upper * scale for estimate in estimates]
    below = [row + 0.4 for row in range(len(estimates))]
    axes.hlines(below, lower, upper, color="black", linewidth=1)
    axes.scatter(lower, below, marker="<", s=20, color="black", label="lower bound: everything overlaps")
    axes.scatter(upper, below, marker=">", s=20, color="black", label="upper bound: nothing overlaps")
    axes.set_xlim(right=1.04 * max(upper))


def _bars(
    axes: Any, bars: Bars, estimates: Sequence[StepEstimate], family: Callable[[str], tuple[str, ...]]
) -> None:
    """Stacked bars, each part in the next colour of its family.

    Those of points that do not fit are hatched.
    """
    lefts = [0.0] * len(bars)
    used = Counter[tuple[str, ...]]()
    for name, sizes in parts(bars).items():
        colours = (GREY,) if name == OTHER else family(name)
        colour = colours[used[colours] % len(colours)]
        used[colours] += 1
        drawn = axes.barh(
            range(len(bars)),
            sizes,
            left=lefts,
            height=0.6,
            color=colour,
            edgecolor="white",
            linewidth=0.6,
            label=name.replace("_", " "),
        )
        for bar, estimate in zip(drawn, estimates, strict=True):
            bar.set_hatch(None if estimate.fits else "////")
        lefts = [left + size for left, size in zip(lefts, sizes, strict=True)]


def _finish(axes: Any, title: str, unit: str, totals: Sequence[float]) -> None:
    """Title, unit, grid, and each bar's total in a column at the right, where no line crosses it."""
    for row, total in enumerate(totals):
        axes.annotate(
            f"{total:#.3g}".rstrip(".") + f" {unit}",
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
        )
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(unit)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
