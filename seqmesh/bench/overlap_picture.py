"""The picture of overlap.py: what one rank computes, and which exchanges are under way beside it.

    compute      |####|####|####|####|            a call of the kernel
    to owners  |xx|----|----|----|                under way, from its issue until it is waited for
    home            |----|----|----|xx            x: nothing is computed, the rank issues it or waits for it

Needs matplotlib.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqmesh.bench.overlap import CallSpans, OverlapSide
from seqmesh.picture.canvas import COLORS, FAINT, INK, box, figure, save, shade

MILLISECONDS = 1000
LANES = ("kernel", "heads to owners", "results home")
"""From top to bottom."""
KERNEL, THERE, HOME = range(len(LANES))
BAR = 0.7
"""Of a lane's height."""
COMPUTED = COLORS[2]
UNDER_WAY = shade(COLORS[0], 9, 10)
EXPOSED = COLORS[7]
MEANINGS = {
    COMPUTED: "computed",
    UNDER_WAY: "under way beside other work",
    EXPOSED: "issued or waited for: not hidden",
}


def draw_overlap(sides: Sequence[OverlapSide], title: str, path: Path) -> None:
    """Rank 0 of each side, below one another, in one scale of time."""
    page = figure(10.5, 1.2 + 1.75 * len(sides))
    longest = max(side.shown[0].seconds for side in sides) * MILLISECONDS
    panels = page.subplots(len(sides), 1, sharex=True)
    for axes, side in zip(panels, sides, strict=True):
        _panel(axes, side)
        axes.set_xlim(0, 1.01 * longest)
    panels[-1].set_xlabel("milliseconds since the call began", fontsize=9, color=INK)
    page.suptitle(f"rank 0 of 2: {title}", fontsize=9, color=FAINT, y=0.985)
    _legend(page)
    page.subplots_adjust(left=0.115, right=0.985, top=0.86, bottom=0.17, hspace=0.42)
    save(page, path)


def _panel(axes: Any, side: OverlapSide) -> None:
    spans = side.shown[0]
    axes.set_title(
        f"{side.name}, {side.chunks} chunks of heads: {spans.exposed_s * MILLISECONDS:.0f} of"
        f" {spans.seconds * MILLISECONDS:,.0f} ms go to exchanges",
        loc="left",
        fontsize=10,
        color=INK,
    )
    axes.set_ylim(len(LANES) - 0.5, -0.95)  # room for a word on top
    axes.set_yticks(range(len(LANES)), LANES, fontsize=9)
    axes.tick_params(axis="both", length=0, labelsize=9, colors=INK)
    for edge in axes.spines.values():
        edge.set_visible(False)
    _bars(axes, spans)
    middle = spans.backward_s * MILLISECONDS
    axes.axvline(middle, color=FAINT, linewidth=0.8, linestyle=":")
    axes.text(middle, -0.5, " backward", fontsize=8, color=FAINT, va="bottom")


def _bars(axes: Any, spans: CallSpans) -> None:
    for start, stop in spans.kernels:
        _bar(axes, KERNEL, (start, stop), COMPUTED)
    for one in spans.exchanges:
        lane = HOME if one.is_home else THERE
        _bar(axes, lane, (one.issued_s, one.wait_s), UNDER_WAY)
        _bar(axes, lane, (one.issue_s, one.issued_s), EXPOSED)
        _bar(axes, lane, (one.wait_s, one.arrived_s), EXPOSED)


def _bar(axes: Any, lane: int, seconds: tuple[float, float], fill: Any) -> None:
    start, stop = (MILLISECONDS * second for second in seconds)
    box(axes, (start, lane - BAR / 2, stop - start, BAR), fill)


def _legend(page: Any) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=color, label=text) for color, text in MEANINGS.items()]
    page.legend(handles=handles, loc="lower right", ncols=len(handles), fontsize=8, frameon=False)
