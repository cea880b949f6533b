"""Which options of `seqmesh plan` go together: what a mode would ignore is refused, in one line."""

from collections.abc import Mapping
from typing import Any

import typer

MOST_SHOWN = 100
"""Candidates that can be asked for."""

MACHINE_OPTIONS = {"gpu", "cluster", "nodes", "gpus_per_node", "hardware", "profile"}
TRAINING_OPTIONS = {"model", "stack", "gradients", "memory_limit", "max_micro_batch", "dealing"}
"""Those that describe a whole training step, and mean nothing for one attention."""
ATTENTION_OPTIONS = {
    "attention",
    "seq_len",
    "global_batch",
    "documents",
    "layout",
    "precision",
    "axes",
    "assume",
}
JOB_OPTIONS = MACHINE_OPTIONS | TRAINING_OPTIONS | ATTENTION_OPTIONS
FILE_OPTIONS = {"emit", "emit_for", "trace", "plot"}

MODES: Mapping[str, set[str]] = {
    "published": set(),
    "kernel": MACHINE_OPTIONS
    | ATTENTION_OPTIONS
    | {"heads", "kv_heads", "head_dim", "pin", "top", "as_json"},
    "compare": MACHINE_OPTIONS | {"model", "seq_len", "global_batch", "as_json"},
    "trace_memory": MACHINE_OPTIONS
    | {"model", "seq_len", "global_batch", "documents", "precision", "pin", "as_json"},
    "max_seq": JOB_OPTIONS | FILE_OPTIONS | {"pin", "top", "explain", "as_json"},
}
"""Options that mean something in a mode; a search knows all but those of --kernel."""


def check_options(context: typer.Context) -> None:
    """Check options against each other and their ranges.

    Args:
        context: of the command, with the value of every option.

    Raises:
        ValueError: options that contradict each other, that a mode would ignore, or that are out of range.
    """
    options = context.params
    _check_mode(context)
    for name in ("top", "global_batch", "max_micro_batch"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} {options[name]}: use a whole number of at least 1")
    if options["top"] > MOST_SHOWN:
        raise ValueError(f"--top {options['top']}: at most {MOST_SHOWN} are shown; use less")
    program = options["emit_for"]
    if program != "seqmesh" and options["emit"] is None:
        raise ValueError(f"--emit-for {program} without --emit writes nothing; add --emit plan.sh")
    _check_kernel(options)


def _check_kernel(options: Mapping[str, Any]) -> None:
    given = [name for name in ("heads", "kv_heads", "head_dim") if options[name] is not None]
    if not options["kernel"] and given:
        raise ValueError(
            f"--{given[0].replace('_', '-')} is an option of --kernel; add --kernel,"
            " or use --model for a whole model"
        )
    if options["kernel"] and options["heads"] is None:
        raise ValueError("--kernel needs --heads (and --kv-heads, --head-dim); add --heads 32")


def _check_mode(context: typer.Context) -> None:
    """Refuse what a mode would ignore."""
    options = {option.name: option for option in context.command.params}
    given = [
        name
        for name, value in context.params.items()
        if value not in (None, (), options[name].get_default(context))
    ]
    mode = next((mode for mode in MODES if mode in given), None)
    if mode is None:
        return
    for name in given:
        if name != mode and name not in MODES[mode]:
            spelled = options[name].opts[0]
            raise ValueError(f"{spelled} has no meaning with {options[mode].opts[0]}; remove one of them")
