"""What `seqmesh verify` says: a row per mask family, dtype and kernel, one line of verdict, and the replay.

Each row shows the worst of its cases, over meshes, layouts, masks and shapes: the error of its worst tensor,
what one device gets wrong in the same tensor, and their ratio, which may be LIMIT at most (judge.py).
"""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seqmesh.provenance import commit, machine, this_command
from seqmesh.verify.judge import LIMIT, CaseOutcome

WIDTH = 130
"""Of the table where the output is not a terminal."""
MOST_FAILURES = 10
"""Failing cases that are shown one by one."""


def console() -> Console:
    """Standard output: as wide as the terminal, or WIDTH in a pipe."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=WIDTH)


def header(device: str) -> dict[str, str]:
    """Without which a verdict means nothing."""
    found = machine()
    return {
        "machine": f"{found['cores']} cores, {found['cpu']}",
        "device": device,
        "torch": f"{found['torch']}, Python {found['python']}",
        "seqmesh": f"{found['seqmesh']}, commit {commit() or 'unknown'}",
        "command": this_command(),
    }


def show(
    out: Console, about: dict[str, str], outcomes: Sequence[CaseOutcome], left_out: Sequence[str]
) -> None:
    """The table, what was left out, the failures and the verdict."""
    for name, value in about.items():
        out.print(f"{name:<8} {value}", markup=False)
    out.print(_table(outcomes))
    out.print("error: worst row of d numbers / largest row of the fp64 oracle; one device: SDPA, dense mask")
    for line in left_out:
        out.print(f"not run here: {line}", markup=False)
    show_failures(out, outcomes)
    out.print(verdict(outcomes), markup=False, soft_wrap=True)


def show_failures(out: Console, outcomes: Sequence[CaseOutcome]) -> None:
    """Each failing case with what is wrong and how to run it again, one line each."""
    failed = [outcome for outcome in outcomes if not outcome.ok]
    for outcome in failed[:MOST_FAILURES]:
        out.print(f"failed: {outcome.case}\n  {_why(outcome)}", markup=False, soft_wrap=True)
    if len(failed) > MOST_FAILURES:
        out.print(f"... and {len(failed) - MOST_FAILURES} more")


def show_one(out: Console, outcome: CaseOutcome) -> None:
    """A replayed case: every tensor."""
    out.print(str(outcome.case), markup=False, soft_wrap=True)
    table = _plain("tensor", "error", "one device", "floor", "ratio")
    for name, error in outcome.errors.items():
        table.add_row(name, *map(_number, (error.ours, error.one_device, error.floor)), f"{error.ratio:.2f}")
    out.print(table)
    if not outcome.ok:
        out.print(_why(outcome), markup=False, soft_wrap=True)
    out.print(verdict([outcome]), markup=False, soft_wrap=True)


def verdict(outcomes: Sequence[CaseOutcome]) -> str:
    """One line; with failures, the command that replays the first."""
    failed = [outcome for outcome in outcomes if not outcome.ok]
    if failed:
        return f"FAIL: {len(failed)} of {len(outcomes)} cases; replay: {replay(failed[0])}"
    worst = max(outcome.ratio for outcome in outcomes)
    ranks = outcomes[0].case.world
    return (
        f"PASS: {_count(len(outcomes), 'case')} on {_count(ranks, 'rank')}, output and all gradients;"
        f" the largest error is {worst:.2f} x that of one device (limit {LIMIT:g})"
    )


def replay(outcome: CaseOutcome) -> str:
    """The command that runs exactly this case on ranks of its own."""
    return f"seqmesh verify --case {shlex.quote(str(outcome.case))}"


def as_json(
    about: dict[str, str], outcomes: Sequence[CaseOutcome], left_out: Sequence[str]
) -> dict[str, Any]:
    """Everything, for a program."""
    return {
        **about,
        "commit": commit(),
        "hardware": machine(),
        "limit": LIMIT,
        "ok": all(outcome.ok for outcome in outcomes),
        "not_run": list(left_out),
        "cases": [_record(outcome) for outcome in outcomes],
    }


def _record(outcome: CaseOutcome) -> dict[str, Any]:
    errors = {
        name: {key: _finite(value) for key, value in {**asdict(error), "ratio": error.ratio}.items()}
        for name, error in outcome.errors.items()
    }
    return {
        "case": str(outcome.case),
        "what": outcome.case.what,
        **asdict(outcome.case),
        "ok": outcome.ok,
        "failure": outcome.failure,
        "errors": errors,
        "replay": replay(outcome),
    }


def _finite(number: float) -> float | None:
    """JSON has neither infinity nor NaN."""
    return number if isfinite(number) else None


def _table(outcomes: Sequence[CaseOutcome]) -> Table:
    table = _plain("what", "dtype", "kernel", "cases", "worst", "error", "one device", "ratio", "")
    rows: dict[tuple[str, str, str], list[CaseOutcome]] = {}
    for outcome in outcomes:
        case = outcome.case
        rows.setdefault((case.what, case.dtype, case.kernel), []).append(outcome)
    for (what, dtype, kernel), row in rows.items():
        table.add_row(escape(what), dtype, kernel, str(len(row)), *_worst_cells(row))
    return table


def _worst_cells(row: Sequence[CaseOutcome]) -> list[str]:
    """The worst case's tensor, errors and ratio, and PASS or FAIL."""
    worst = max(row, key=lambda outcome: (not outcome.ok, outcome.ratio))
    passed = "PASS" if worst.ok else "[bold]FAIL[/bold]"
    if worst.worst is None:
        return ["-", "-", "-", "-", passed]
    error = worst.errors[worst.worst]
    return [worst.worst, _number(error.ours), _number(error.one_device), f"{error.ratio:.2f}", passed]


def _why(outcome: CaseOutcome) -> str:
    if outcome.failure is not None:
        return outcome.failure
    assert outcome.worst is not None
    error = outcome.errors[outcome.worst]
    return (
        f"{outcome.worst} is off by {_number(error.ours)}, {error.ratio:.1f} x what one device"
        f" ({_number(error.one_device)}) or rounding ({_number(error.floor)}) explains; limit {LIMIT:g}"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _number(error: float) -> str:
    return f"{error:.1e}"


def _plain(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False, header_style="bold")
