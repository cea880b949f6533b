"""What `seqmesh verify --model` says: the worst of loss, modules and gradients, and the verdict."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from seqmesh.provenance import commit, machine
from seqmesh.verify.judge import LIMIT, TensorError
from seqmesh.verify.model import ModelOutcome


def show(out: Console, about: Mapping[str, str], outcome: ModelOutcome) -> None:
    """Text for a person."""
    case = outcome.case
    for name, value in {**about, "model": outcome.model, "mesh": _mesh(outcome)}.items():
        out.print(f"{name:<8} {value}", markup=False)
    out.print(", ".join(f"loss {who} {loss:.8g}" for who, loss in outcome.losses.items()))
    table = Table("", "compared", "worst", "error", "one device", "ratio", box=None, pad_edge=False)
    table.add_row("loss", "1", "", *_cells(outcome.loss))
    for what, errors in (("modules", outcome.modules), ("gradients", outcome.gradients)):
        worst = max(errors, key=lambda name: errors[name].ratio)
        table.add_row(what, str(len(errors)), worst, *_cells(errors[worst]))
    out.print(table)
    if outcome.left_out:
        out.print(f"{outcome.left_out} modules left out: their outputs do not run along the tokens")
    out.print(
        f"error: worst row / largest row of one device in fp64; one device: transformers' eager attention"
        f" in {case.dtype}, the noise floor"
    )
    out.print(verdict(outcome), markup=False, soft_wrap=True)


def verdict(outcome: ModelOutcome) -> str:
    """One line: what deviates first, if anything."""
    if outcome.ok:
        return (
            f"PASS: loss, {len(outcome.modules)} modules and {len(outcome.gradients)} gradients"
            f" within {LIMIT:g} x the noise of one device"
        )
    if outcome.missing:
        return f"FAIL: a gradient on one side only for {', '.join(outcome.missing)}"
    first = outcome.first_deviating
    if first is not None:
        after = "" if outcome.last_agreeing is None else f" ({outcome.last_agreeing}, before it, agrees)"
        return f"FAIL: the first module that deviates is {first}, by {_off(outcome.modules[first])}{after}"
    wrong = [name for name, error in outcome.gradients.items() if not error.ratio <= LIMIT]
    if wrong:
        count = f"{len(wrong)} of {len(outcome.gradients)} gradients deviate"
        return f"FAIL: the forward agrees, {count}, {wrong[0]} by {_off(outcome.gradients[wrong[0]])}"
    return f"FAIL: modules and gradients agree, but the loss deviates by {_off(outcome.loss)}"


def as_json(about: Mapping[str, str], outcome: ModelOutcome) -> dict[str, Any]:
    """Everything, for a program."""

    def records(errors: Mapping[str, TensorError]) -> dict[str, Any]:
        return {name: {**asdict(error), "ratio": error.ratio} for name, error in errors.items()}

    return {
        **about,
        "commit": commit(),
        "hardware": machine(),
        "limit": LIMIT,
        "ok": outcome.ok,
        "verdict": verdict(outcome),
        "case": asdict(outcome.case),
        "model": outcome.model,
        "losses": outcome.losses,
        "loss": records({"loss": outcome.loss})["loss"],
        "modules": records(outcome.modules),
        "gradients": records(outcome.gradients),
        "first_deviating": outcome.first_deviating,
    }


def _mesh(outcome: ModelOutcome) -> str:
    return f"ulysses {outcome.case.ulysses} x ring {outcome.case.ring}, {outcome.case.dtype}"


def _cells(error: TensorError) -> list[str]:
    return [f"{error.ours:.1e}", f"{error.one_device:.1e}", f"{error.ratio:.2f}"]


def _off(error: TensorError) -> str:
    return f"{error.ours:.1e}, {error.ratio:.1f} x the noise"
