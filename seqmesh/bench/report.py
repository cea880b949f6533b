"""The benchmark: every figure in one run, printed as a table next to its target, and as JSON if asked.

    seqmesh bench [--quick] [--json FILE]
    seqmesh bench balance [--json FILE]      its exact part about data-parallel ranks alone

The header says hardware, versions, commit and command, without which a number means nothing. Times are ratios
of two sides that were measured in turns; bytes, memory and loads are exact. `--quick` is the same program on
small sizes: exact figures are judged, times are not.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from seqmesh.bench import costs, dealing, host, schedules, speed, trees
from seqmesh.bench.figures import Figure
from seqmesh.provenance import commit, machine, this_command

MESHES = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4))
"""(ulysses, ring) whose memory and bytes are measured."""
QUICK_MESHES = ((2, 1), (1, 2), (2, 2))
WIDTH = 140
"""Of the table where the output is not a terminal."""


def run_bench(quick: bool, json_path: Path | None) -> int:
    """Measure and print all figures. Forks processes: call it before any tensor work.

    Args:
        quick: small sizes and one repeat, half a minute; times are then shown but not judged.
        json_path: also write the figures there.

    Returns:
        0, or 1 if an exact figure (memory, bytes, load) missed its target. Times depend on what else the
        machine does: they are judged in the table only.

    Raises:
        ValueError: json_path cannot be written; before anything is measured.
    """
    return run_figures(measure(quick), quick, json_path)


def run_figures(measured: Iterable[Figure], quick: bool, json_path: Path | None) -> int:
    """Print figures as they are measured, as `run_bench` does.

    Raises:
        ValueError: json_path cannot be written; before anything is measured.
    """
    about = header()
    console = opened(about, json_path)
    figures: list[Figure] = []
    for figure in measured:
        figures.append(figure)
        console.print(
            f"measured {len(figures)}: {figure.what}",
            end="\r" if console.is_terminal else "\n",  # a terminal shows one line, which the next covers
            markup=False,
        )
    console.print(table(figures))
    write_json({**about, "quick": quick, "figures": [asdict(figure) for figure in figures]}, json_path)
    return int(any(figure.ok is False and figure.exact for figure in figures))


def opened(about: Mapping[str, str], *written: Path | None) -> Console:
    """Begin what a benchmark prints, with what its numbers mean nothing without.

    Args:
        about: `header()`, and what is measured.
        written: files that will be written; None where none was asked for.

    Raises:
        ValueError: one of them cannot be.
    """
    for path in written:
        if path is not None:
            _check_writable(path)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    for name, value in about.items():
        console.print(f"{name:<8} {value}", markup=False)
    return console


def write_json(document: Mapping[str, Any], path: Path | None) -> None:
    """What was measured, where a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measure(quick: bool) -> Iterator[Figure]:
    """All figures, one after the other."""
    if quick:
        return chain(
            speed.measure(speed.TimedAttention(tokens=512, repeats=1)),
            trees.measure(trees.TimedTree(prompt=48, completion=16, hidden=64, heads=2, repeats=1)),
            host.measure(host.rings(1 << 14), calls=3),
            costs.measure(costs.memory_cases(512, QUICK_MESHES), costs.bytes_cases(1024, QUICK_MESHES)),
            schedules.measure_times(schedules.BATCHES[:1]),
            schedules.measure_load([replace(tail, seeds=1) for tail in schedules.TAILS[:1]]),
            dealing.measure_dealing([replace(case, steps=1) for case in dealing.CASES[:2]]),
        )
    return chain(
        speed.measure(speed.TimedAttention()),
        trees.measure(trees.TimedTree()),
        host.measure(host.rings()),
        costs.measure(costs.memory_cases(512, MESHES), costs.bytes_cases(1024, MESHES)),
        schedules.measure_times(),
        schedules.measure_load(),
        measure_balance(),
    )


def measure_balance() -> Iterator[Figure]:
    """How evenly data-parallel ranks are loaded: exact, in seconds."""
    return chain(dealing.measure_dealing(), dealing.measure_pool(), dealing.measure_planned())


def header() -> dict[str, str]:
    """Hardware, versions, commit and command."""
    found = machine()
    return {
        "machine": f"{found['cores']} cores, {found['cpu']}",
        "torch": f"{found['torch']}, Python {found['python']}",
        "seqmesh": f"{found['seqmesh']}, commit {commit() or 'unknown'}",
        "command": this_command(),
    }


def table(figures: Iterable[Figure]) -> Table:
    """A row for each figure, under its section."""
    table = Table("what", "measured", "target", "", show_edge=False, pad_edge=False, header_style="")
    verdicts = {None: "", True: "ok", False: "[bold]missed[/bold]"}
    section = None
    for figure in figures:
        if figure.section != section:
            section = figure.section
            table.add_section()
            table.add_row(f"[bold]{section}[/bold]")
        table.add_row(figure.what, figure.measured, figure.target, verdicts[figure.ok])
    return table


def _check_writable(path: Path) -> None:
    """Minutes of measurements must not be lost to a mistyped folder."""
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror}; name a file in an existing folder"
        ) from None
