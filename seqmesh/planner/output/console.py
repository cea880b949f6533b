"""Where text goes, and the few forms that every report uses."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from seqmesh.planner.inputs.units import format_bytes

WIDTH = 150
"""Columns where the output is not a terminal."""


def console() -> Console:
    """Standard output: as wide as the terminal, or WIDTH in a pipe."""
    plain = Console(highlight=False, soft_wrap=False)
    return plain if plain.is_terminal else Console(highlight=False, width=WIDTH)


def plain_table(*, header: bool = True) -> Table:
    """A table without lines."""
    return Table(box=None, pad_edge=False, show_header=header, header_style="bold")


def link_name(link: str) -> str:
    """A link class, or another cause, as it is printed: scale-up of scale_up."""
    return link.replace("_", "-")


def link_bytes(sent: Mapping[str, int]) -> list[str]:
    """Each link class with its bytes."""
    return [f"{link_name(link)} {format_bytes(size)}" for link, size in sent.items()]


def named_bytes(sizes: Mapping[str, int]) -> str:
    """Each name with its bytes, in a line; nothing of what is 0."""
    return ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in sizes.items() if size)


def print_list(out: Console, title: str, lines: Sequence[str]) -> None:
    """A heading and a line for each item; nothing if there are none."""
    if lines:
        out.print(f"\n[bold]{title}[/]")
        for line in lines:
            out.print(f"  - {line}", markup=False)
