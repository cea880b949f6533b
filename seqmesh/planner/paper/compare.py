"""The paper's Table 2 for a model: as printed, corrected, and in bytes: `seqmesh plan --compare`.

    compare(load_model("llama3-8b"), ranks=16, batch=1, seq_len=65536)        compare_text.py prints it

Costs are of one block, forward and backward, in elements x nccl-tests factor, (N - 1)/N counted as 1 as in
the paper: exact bytes of a mesh are the search's business. In numbers: bf16 weights, gradients and
activations; OS = 6P is Adam's 12 bytes a parameter.

Source: USP (Fang & Zhao 2024, arXiv 2405.07719), Table 2; docs/table2.md explains the
corrections.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.paper.symbols import shown, symbol, words
from seqmesh.planner.paper.table2 import HIDDEN, Method, Rules, derived, methods
from seqmesh.planner.paper.table2_numbers import Evaluation, Numbers, corrected_rules

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
WHY_PARAMETERS = (
    "an all-reduce counts 2, a gather or scatter 1: 24/24/36d² for 12d²;"
    " a layer of {model} has {block} parameters"
)
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
        ValueError: other blocks than the table's, fewer than two ranks, an empty batch or sequence, or more
            experts for a token than there are ranks.
    """
    if not model.is_plain:
        raise ValueError(
            f"{model.name} has experts, latent attention or several kinds of layers, and Table 2 is of one"
            " plain block; compare a dense model"
        )
    _check(ranks, batch, seq_len, top_k)
    rules = corrected_rules(model, ranks)
    numbers = Evaluation(model, rules, ranks=ranks, batch=batch, seq_len=seq_len, top_k=top_k)
    rows = [_row(method, numbers) for method in (*methods(rules), *derived(rules))]
    block = Fraction(model.layer_parameters, model.hidden**2)
    why_parameters = WHY_PARAMETERS.format(model=model.name, block=f"{shown(block)}d²")
    return Comparison(
        model=model.name,
        ranks=ranks,
        batch=batch,
        seq_len=seq_len,
        groups=model.heads // model.kv_heads,
        block=block,
        rows=tuple(rows),
        differences=tuple(_differences(rows, why_parameters)),
    )


def _check(ranks: int, batch: int, seq_len: int, top_k: int) -> None:
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


def _row(method: Method, numbers: Evaluation) -> Row:
    """A row of the corrected table, with the printed one of its name."""
    printed = _named(methods(PRINTED), method.name)
    in_groups = _named(methods(replace(PRINTED, kv=HIDDEN / "G")), method.name)
    impossible = numbers.impossible(method.name)
    return Row(
        name=method.name,
        printed=_cells(printed, spelled=printed.spelled) if printed else None,
        printed_groups=str(in_groups.activation_cost) if in_groups else "",
        corrected=_cells(method),
        numbers=None if impossible else numbers.of(method),
        note=impossible or numbers.mesh_of(method.name),
    )


def _named(rows: Sequence[Method], name: str) -> Method | None:
    return next((method for method in rows if method.name == name), None)


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


@dataclass(frozen=True)
class _Correction:
    """A difference, whatever rows have it."""

    column: str
    printed: str
    corrected: str
    why: str


def _differences(rows: Sequence[Row], why_parameters: str) -> Iterator[Difference]:
    """What the two tables disagree about, rows that do so alike together."""
    found: dict[_Correction, list[str]] = {}
    for row in rows:
        if row.printed is not None:
            for correction in _corrections(row.printed, row.corrected, why_parameters):
                found.setdefault(correction, []).append(row.name)
    for correction, names in found.items():
        yield Difference(
            rows=tuple(names),
            column=correction.column,
            printed=correction.printed,
            corrected=correction.corrected,
            why=correction.why,
        )


def _corrections(printed: Cells, corrected: Cells, why_parameters: str) -> Iterator[_Correction]:
    """Where one row differs."""
    if printed.parameter_cost != corrected.parameter_cost:
        yield _Correction("parameter cost", printed.parameter_cost, corrected.parameter_cost, why_parameters)
    if printed.activation_cost != corrected.activation_cost:
        yield _Correction(
            "activation cost", printed.activation_cost, corrected.activation_cost, _why_activations(corrected)
        )


def _why_activations(corrected: Cells) -> str:
    """The causes, read off what the corrected cells have."""
    causes = []
    if "P2P" in corrected.activation_op or corrected.activation_op == "same":
        causes.append(WHY_RING)
    if "/G" in corrected.activation_cost:
        causes.append(WHY_GROUPS)
    if "/K" in corrected.activation_cost:
        causes.append(WHY_COPIES)
    return "; ".join(causes) or "heads x head dim is not d"
