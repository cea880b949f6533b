"""The paper's Table 2 for a model: as printed, corrected, and in bytes: `seqmesh plan --compare`.

    render(compare(load_model("llama3-8b"), ranks=16, batch=1, seq_len=65536))

Costs are of one block, forward and backward, in elements x nccl-tests factor, (N - 1)/N counted as 1 as in
the paper: exact bytes of a mesh are the search's business. In numbers: bf16 weights, gradients and
activations; OS = 6P is Adam's 12 bytes a parameter.

Source: PAPER.md, Table 2; docs/table2.md explains the corrections.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from seqmesh.planner.inputs.models import ModelShape
from seqmesh.planner.inputs.units import format_bytes, format_tokens
from seqmesh.planner.paper.symbols import shown, symbol, words
from seqmesh.planner.paper.table2 import HIDDEN, Method, Rules, derived, methods
from seqmesh.planner.paper.table2_numbers import BYTES, Evaluation, Numbers, corrected_rules

PRINTED = Rules(
    block=symbol("d²", 12),
    attention_block=symbol("d²", 4),
    parameter_share=Fraction(1, 2),
    q=HIDDEN,
    kv=HIDDEN,
    kv_ranks="N",
    ring_backward=2,
    bounded=True,
)
"""The paper's rules.

Its parameter column is half of what all-reduce = 2 and all-gather = 1 give, in every row.
"""
WHY_PARAMETERS = "an all-reduce counts 2, a gather or scatter 1: 24/24/36d² for 12d²; a layer of {model} has {block} parameters"
WHY_RING = "the backward moves K and V once more, and dK and dV in fp32, each twice the size"
WHY_GROUPS = "a K/V head serves G query heads"
WHY_COPIES = "ranks outnumber the K/V heads and hold copies"


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A row of the table as text."""

    parameter_op: str
    parameter_cost: str
    activation_op: str
    activation_cost: str
    split: str
    states: str
    """P/G: parameters and gradients on a rank."""
    optimizer: str
    activations: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to spread a block over N ranks."""

    name: str
    printed: Cells | None
    """None: the paper has no such row."""
    printed_groups: str
    """The printed activation cost with grouped K/V heads, as the paper's text gives it."""
    corrected: Cells
    numbers: Numbers | None
    """None: not possible with this model, batch and ranks."""
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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Table 2 for a model."""

    model: str
    ranks: int
    batch: int
    seq_len: int
    groups: int
    """G: query heads to a K/V head."""
    block: Fraction
    """Parameters of a layer over d²."""
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]


def compare(model: ModelShape, *, ranks: int, batch: int, seq_len: int, top_k: int = 2) -> Comparison:
    """Table 2 for a model.

    Args:
        model: whose layers fill the corrected table.
        ranks: N.
        batch: sequences of a step, b.
        seq_len: tokens of a sequence, L.
        top_k: experts of a token, for expert parallelism: one expert of the model's own width on every rank.

    Raises:
        ValueError: fewer than two ranks, an empty batch or sequence, or more experts for a token than there
            are ranks.
    """
    if ranks < 2:
        raise ValueError(
            f"ranks={ranks}: one rank sends nothing, so there is nothing to compare; use at least 2"
        )
    if batch < 1 or seq_len < 1:
        raise ValueError(
            f"batch={batch}, seq_len={seq_len}: both must be at least 1; use a positive batch and length"
        )
    if not 1 <= top_k <= ranks:
        raise ValueError(
            f"top_k={top_k} with one expert on each of {ranks} ranks; use a top_k from 1 to {ranks}"
        )
    rules = corrected_rules(model, ranks)
    as_printed = {method.name: method for method in methods(PRINTED)}
    in_groups = {
        method.name: str(method.activation_cost) for method in methods(replace(PRINTED, kv=HIDDEN / "G"))
    }
    numbers = Evaluation(model, rules, ranks, batch, seq_len, top_k)
    rows = []
    for method in (*methods(rules), *derived(rules)):
        old, note = as_printed.get(method.name), numbers.impossible(method.name)
        rows.append(
            Row(
                name=method.name,
                printed=_cells(old, spelled=old.spelled) if old else None,
                printed_groups=in_groups.get(method.name, ""),
                corrected=_cells(method),
                numbers=None if note else numbers.of(method),
                note=note or numbers.mesh_of(method.name),
            )
        )
    block = Fraction(model.layer_parameters, model.hidden**2)
    return Comparison(
        model=model.name,
        ranks=ranks,
        batch=batch,
        seq_len=seq_len,
        groups=model.heads // model.kv_heads,
        block=block,
        rows=tuple(rows),
        differences=tuple(
            _differences(rows, WHY_PARAMETERS.format(model=model.name, block=f"{shown(block)}d²"))
        ),
    )


def _cells(method: Method, *, spelled: bool = False) -> Cells:
    return Cells(
        parameter_op=words(method.parameter_calls, none="0", spelled=spelled),
        parameter_cost=str(method.parameter_cost),
        activation_op="same" if method.same else words(method.activation_calls, none="none"),
        activation_cost=str(method.activation_cost),
        split=method.split,
        states=str(method.states),
        optimizer=str(method.optimizer),
        activations=str(method.kept),
    )


def _differences(rows: Sequence[Row], why_parameters: str) -> Iterator[Difference]:
    """What the two tables disagree about, rows that do so alike together."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        if row.printed is None:
            continue
        old, new = row.printed, row.corrected
        if old.parameter_cost != new.parameter_cost:
            found.setdefault(
                ("parameter cost", old.parameter_cost, new.parameter_cost, why_parameters), []
            ).append(row.name)
        if old.activation_cost != new.activation_cost:
            causes = [WHY_RING] if "P2P" in new.activation_op or new.activation_op == "same" else []
            causes += [WHY_GROUPS] if "/G" in new.activation_cost else []
            causes += [WHY_COPIES] if "/K" in new.activation_cost else []
            why = "; ".join(causes) or "heads x head dim is not d"
            found.setdefault(("activation cost", old.activation_cost, new.activation_cost, why), []).append(
                row.name
            )
    for (column, printed, corrected, why), names in found.items():
        yield Difference(rows=tuple(names), column=column, printed=printed, corrected=corrected, why=why)


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
    head = ["", "param op", "cost", "activation op", "cost", "split", "P/G", "OS", "A"]
    printed = [[row.name, *asdict(row.printed).values()] for row in c.rows if row.printed]
    corrected = [[row.name, *asdict(row.corrected).values()] for row in c.rows]
    group = f", G = {c.groups}" if c.groups != 1 else ""
    parts = [
        "Table 2 as printed: a block of 12d² parameters, forward and backward; elements x nccl-tests factor, (N-1)/N counted as 1",
        table([head, *printed]),
        _grouped(c),
        f"Corrected: a layer of {c.model}, {shown(c.block)}d²{group}",
        table([head, *corrected]),
        *_legend(c),
        "What differs",
        "\n".join(
            f"  {', '.join(d.rows)}: {d.column} {d.printed} -> {d.corrected}\n      {d.why}"
            for d in c.differences
        ),
        f"Bytes per GPU and layer in bf16: N = {c.ranks}, b = {c.batch}, L = {format_tokens(c.seq_len)}",
        table(
            [
                ["", "moved: param", "activation", "kept: P+G", "OS", "A", ""],
                *(_byte_row(row) for row in c.rows),
            ]
        ),
    ]
    return "\n\n".join(parts)


def _grouped(c: Comparison) -> str:
    """What the paper's text adds for grouped K/V heads."""
    costs = ", ".join(
        f"{row.name} {row.printed_groups}" for row in c.rows if row.name in ("SP-Ulysses", "SP-Ring", "TP-sp")
    )
    return f"  With G query heads to a K/V head the paper's text has: {costs}"


def _legend(c: Comparison) -> Iterator[str]:
    symbols = {
        "/G": "G (as a divisor): query heads to a K/V head",
        "/u": "u: ulysses ranks of N = u x r",
        "/K": "K: K/V heads, fewer than the ranks",
        "Pₑ": "Pₐ, Pₑ: parameters outside and inside the experts; each token goes to k experts",
    }
    text = " ".join(" ".join(asdict(row.corrected).values()) for row in c.rows)
    lines = [
        "seqmesh: exactly the K/V rows that a causal zigzag needs (3/4), dK and dV in bf16; the other rings rotate"
    ]
    yield "\n".join(
        f"  {line}" for line in [*(line for mark, line in symbols.items() if mark in text), *lines]
    )


def _byte_row(row: Row) -> list[str]:
    if row.numbers is None:
        return [row.name, "-", "-", "-", "-", "-", row.note]
    return [row.name, *(format_bytes(BYTES * count) for count in asdict(row.numbers).values()), row.note]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to their widest cell, two spaces between them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
