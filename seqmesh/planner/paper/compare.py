"""The paper's Table 2 for a layer of a model: as printed, corrected, and in bytes: `seqmesh plan --compare`.

    render(SpreadLayer(model=load_model("llama3-8b"), ranks=16, batch=1, seq_len=65536))

Costs are of one block, forward and backward, in elements x nccl-tests factor, (N - 1)/N counted as 1 as in
the paper: exact bytes of a mesh are the search's business. In numbers: bf16 weights, gradients and
activations; OS = 6P is Adam's 12 bytes a parameter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from seqmesh.planner.inputs.units import format_bytes, format_tokens
from seqmesh.planner.paper import table2
from seqmesh.planner.paper.table2 import Cells, SpreadLayer, shown

BYTES = 2
"""Of a bf16 element."""
CELLS_HEAD = ["", "param op", "cost", "activation op", "cost", "split", "P/G", "OS", "A"]
BYTES_HEAD = ["", "moved: param", "activation", "kept: P+G", "OS", "A", ""]

LEGEND = {
    "/G": "G (as a divisor): query heads to a K/V head",
    "/u": "u: ulysses ranks of N = u x r",
    "/K": "K: K/V heads, fewer than the ranks",
    "Pₑ": "Pₐ, Pₑ: parameters outside and inside the experts; each token goes to k experts",
    "(seqmesh)": "seqmesh: exactly the K/V rows that a causal zigzag needs (3/4), dK and dV in bf16;"
    " the other rings rotate",
}
"""What a mark in the table stands for."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to spread a block over N ranks."""

    name: str
    printed: Cells | None
    """None: the paper has no such row."""
    printed_groups: str
    """The printed activation cost with grouped K/V heads, as the paper's text gives it."""
    corrected: Cells
    numbers: dict[str, int] | None
    """Elements per GPU and layer in the corrected row's columns; None: not possible with this layer."""
    note: str
    """The mesh that the numbers are of, or why there are none."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where the corrected table contradicts the printed one."""

    rows: tuple[str, ...]
    column: str
    printed: str
    corrected: str
    why: str


def rows(layer: SpreadLayer) -> list[Row]:
    """The corrected table's rows, with the printed ones of their names."""
    return [_row(name, layer) for name in table2.CORRECTED]


def _row(name: str, layer: SpreadLayer) -> Row:
    printed, named = table2.PRINTED.get(name), table2.CORRECTED[name]
    cost = printed.activation_cost if printed else ""
    texts = table2.texts(layer)
    why_not = table2.impossible(name, layer)
    return Row(
        name=name,
        printed=printed,
        printed_groups=table2.GROUPED.get(cost, cost),
        corrected=Cells(*(texts.get(cell, cell) for cell in asdict(named).values())),
        numbers=None if why_not else _numbers(named, layer),
        note=why_not or _mesh(name, layer),
    )


def _numbers(cells: Cells, layer: SpreadLayer) -> dict[str, int]:
    elements = table2.elements(layer)
    return {
        "parameter_elements": round(elements[cells.parameter_cost]),
        "activation_elements": round(elements[cells.activation_cost]),
        "states_elements": round(elements[cells.states]),
        "optimizer_elements": round(elements[cells.optimizer]),
        "kept_elements": round(elements[cells.activations]),
    }


def _mesh(name: str, layer: SpreadLayer) -> str:
    """What the numbers are of, where the row's name does not say it."""
    if name.startswith("Unified"):
        return f"u{layer.ulysses} r{layer.ranks // layer.ulysses}"
    return f"top {layer.top_k}, an expert a rank" if name == table2.EXPERTS else ""


def differences(layer: SpreadLayer) -> list[Difference]:
    """What the two tables disagree about, rows that do so alike together."""
    found: dict[Difference, list[str]] = {}
    for row in rows(layer):
        if row.printed is not None:
            for difference in _corrections(row.printed, row.corrected, layer):
                found.setdefault(difference, []).append(row.name)
    return [replace(difference, rows=tuple(names)) for difference, names in found.items()]


def _corrections(printed: Cells, corrected: Cells, layer: SpreadLayer) -> Iterator[Difference]:
    """Where one row differs."""
    why_parameters = (
        "an all-reduce counts 2, a gather or scatter 1: 24/24/36d² for 12d²;"
        f" a layer of {layer.model.name} has {shown(layer.block)}d² parameters"
    )
    for column, before, after, why in (
        ("parameter cost", printed.parameter_cost, corrected.parameter_cost, why_parameters),
        ("activation cost", printed.activation_cost, corrected.activation_cost, _why_activations(corrected)),
    ):
        if before != after:
            yield Difference(rows=(), column=column, printed=before, corrected=after, why=why)


def _why_activations(corrected: Cells) -> str:
    """The causes, read off what the corrected cells have."""
    causes = []
    if "P2P" in corrected.activation_op or corrected.activation_op == "same":
        causes.append("the backward moves K and V once more, and dK and dV in fp32, each twice the size")
    if "/G" in corrected.activation_cost:
        causes.append("a K/V head serves G query heads")
    if "/K" in corrected.activation_cost:
        causes.append("ranks outnumber the K/V heads and hold copies")
    return "; ".join(causes) or "heads x head dim is not d"


def as_record(layer: SpreadLayer) -> dict[str, Any]:
    """The comparison as JSON: cells as text, numbers in elements and in bf16 bytes."""
    records = [asdict(row) for row in rows(layer)]
    for record in records:
        if record["numbers"] is not None:
            record["bf16_bytes"] = {
                name.removesuffix("_elements"): BYTES * count for name, count in record["numbers"].items()
            }
    return {
        "model": layer.model.name,
        "ranks": layer.ranks,
        "batch": layer.batch,
        "seq_len": layer.seq_len,
        "groups": layer.groups,
        "block": float(layer.block),
        "rows": records,
        "differences": [asdict(difference) for difference in differences(layer)],
    }


def render(layer: SpreadLayer) -> str:
    """The comparison as plain text: the printed table, the corrected one, what differs, and bytes."""
    found = rows(layer)
    printed = [[row.name, *asdict(row.printed).values()] for row in found if row.printed]
    corrected = [[row.name, *asdict(row.corrected).values()] for row in found]
    group = f", G = {layer.groups}" if layer.groups != 1 else ""
    tokens = format_tokens(layer.seq_len)
    parts = [
        "Table 2 as printed: a block of 12d² parameters, forward and backward;"
        " elements x nccl-tests factor, (N-1)/N counted as 1",
        table([CELLS_HEAD, *printed]),
        _grouped(found),
        f"Corrected: a layer of {layer.model.name}, {shown(layer.block)}d²{group}",
        table([CELLS_HEAD, *corrected]),
        _legend(corrected),
        "What differs",
        "\n".join(_difference(one) for one in differences(layer)),
        f"Bytes per GPU and layer in bf16: N = {layer.ranks}, b = {layer.batch}, L = {tokens}",
        table([BYTES_HEAD, *map(_byte_row, found)]),
    ]
    return "\n\n".join(parts)


def _grouped(found: Sequence[Row]) -> str:
    """What the paper's text adds for grouped K/V heads."""
    named = ("SP-Ulysses", "SP-Ring", "TP-sp")
    costs = ", ".join(f"{row.name} {row.printed_groups}" for row in found if row.name in named)
    return f"  With G query heads to a K/V head the paper's text has: {costs}"


def _legend(corrected: Sequence[Sequence[str]]) -> str:
    text = " ".join(" ".join(row) for row in corrected)
    return "\n".join(f"  {meaning}" for mark, meaning in LEGEND.items() if mark in text)


def _difference(one: Difference) -> str:
    return f"  {', '.join(one.rows)}: {one.column} {one.printed} -> {one.corrected}\n      {one.why}"


def _byte_row(row: Row) -> list[str]:
    if row.numbers is None:
        return [row.name, "-", "-", "-", "-", "-", row.note]
    return [row.name, *(format_bytes(BYTES * count) for count in row.numbers.values()), row.note]


def table(lines: Sequence[Sequence[str]]) -> str:
    """Columns aligned to their widest cell, two spaces between them."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)
