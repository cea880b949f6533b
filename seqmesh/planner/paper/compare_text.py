"""Table 2 as text and as data: what `seqmesh plan --compare` prints."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from seqmesh.planner.inputs.units import format_bytes, format_tokens
from seqmesh.planner.paper.compare import Comparison, Row
from seqmesh.planner.paper.symbols import shown
from seqmesh.planner.paper.table2_numbers import BYTES

CELLS_HEAD = ["", "param op", "cost", "activation op", "cost", "split", "P/G", "OS", "A"]
BYTES_HEAD = ["", "moved: param", "activation", "kept: P+G", "OS", "A", ""]

LEGEND = {
    "/G": "G (as a divisor): query heads to a K/V head",
    "/u": "u: ulysses ranks of N = u x r",
    "/K": "K: K/V heads, fewer than the ranks",
    "Pₑ": "Pₐ, Pₑ: parameters outside and inside the experts; each token goes to k experts",
}
"""What a mark in the table stands for."""


def as_record(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON: cells as text, numbers in elements and in bf16 bytes."""
    record = asdict(comparison)
    record["block"] = float(comparison.block)
    for row in record["rows"]:
        if row["numbers"] is not None:
            row["bf16_bytes"] = {
                name.removesuffix("_elements"): BYTES * count for name, count in row["numbers"].items()
            }
    return record


def render(comparison: Comparison) -> str:
    """The comparison as plain text: the printed table, the corrected one, what differs, and bytes."""
    c = comparison
    printed = [[row.name, *asdict(row.printed).values()] for row in c.rows if row.printed]
    corrected = [[row.name, *asdict(row.corrected).values()] for row in c.rows]
    group = f", G = {c.groups}" if c.groups != 1 else ""
    parts = [
        "Table 2 as printed: a block of 12d² parameters, forward and backward;"
        " elements x nccl-tests factor, (N-1)/N counted as 1",
        table([CELLS_HEAD, *printed]),
        _grouped(c),
        f"Corrected: a layer of {c.model}, {shown(c.block)}d²{group}",
        table([CELLS_HEAD, *corrected]),
        _legend(c),
        "What differs",
        "\n".join(_differences(c)),
        f"Bytes per GPU and layer in bf16: N = {c.ranks}, b = {c.batch}, L = {format_tokens(c.seq_len)}",
        table([BYTES_HEAD, *map(_byte_row, c.rows)]),
    ]
    return "\n\n".join(parts)


def _grouped(c: Comparison) -> str:
    """What the paper's text adds for grouped K/V heads."""
    named = ("SP-Ulysses", "SP-Ring", "TP-sp")
    costs = ", ".join(f"{row.name} {row.printed_groups}" for row in c.rows if row.name in named)
    return f"  With G query heads to a K/V head the paper's text has: {costs}"


def _legend(c: Comparison) -> str:
    text = " ".join(" ".join(asdict(row.corrected).values()) for row in c.rows)
    lines = [meaning for mark, meaning in LEGEND.items() if mark in text]
    lines.append(
        "seqmesh: exactly the K/V rows that a causal zigzag needs (3/4), dK and dV in bf16;"
        " the other rings rotate"
    )
    return "\n".join(f"  {line}" for line in lines)


def _differences(c: Comparison) -> Iterator[str]:
    for d in c.differences:
        yield f"  {', '.join(d.rows)}: {d.column} {d.printed} -> {d.corrected}"
        yield f"      {d.why}"


def _byte_row(row: Row) -> list[str]:
    if row.numbers is None:
        return [row.name, "-", "-", "-", "-", "-", row.note]
    return [row.name, *(format_bytes(BYTES * count) for count in asdict(row.numbers).values()), row.note]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to their widest cell, two spaces between them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
