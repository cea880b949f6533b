"""`seqmesh bench overlap`: what overlap.py measured, printed, written and drawn."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from seqmesh.bench.figures import Spread
from seqmesh.bench.overlap import OverlapSide, OverlapWork, in_words, measure_overlap
from seqmesh.bench.overlap_picture import draw_overlap
from seqmesh.bench.report import header, opened, write_json


def run_overlap(work: OverlapWork, json_path: Path | None, plot_path: Path | None) -> int:
    """Measure and print both sides, and write what was asked for: the exit code.

    Raises:
        ValueError: a file cannot be written; before anything is measured.
    """
    about = {**header(), "work": in_words(work), "times": f"median of {work.repeats} (range)"}
    console = opened(about, json_path, plot_path)
    found = measure_overlap(work)
    console.print(_table(found))
    write_json({**about, "sides": [asdict(side) for side in found]}, json_path)
    if plot_path is not None:
        draw_overlap(found, in_words(work), plot_path)
    return 0


def _table(found: Sequence[OverlapSide]) -> Table:
    made = Table(
        *("exchange of heads", "chunks", "call", "exposed", "of it waiting", "kernel"),
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for side in found:
        times = (
            _milliseconds(spread) for spread in (side.seconds, side.exposed_s, side.waited_s, side.computed_s)
        )
        made.add_row(side.name, str(side.chunks), *times)
    return made


def _milliseconds(seconds: Spread) -> str:
    in_ms = Spread.of([1000 * value for value in (seconds.least, seconds.median, seconds.most)])
    return in_ms.text(1, " ms")
