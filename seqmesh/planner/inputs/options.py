"""Which options of `seqmesh plan` go together: what a mode would ignore is refused, in one line."""

from collections.abc import Mapping
from typing import Any

import typer

MOST_SHOWN = 100
"""Candidates that can be asked for."""

JOB_OPTIONS = {
    *(
        "model",
        "gpu",
        "cluster",
        "nodes",
        "gpus_per_node",
        "seq_len",
        "global_batch",
        "documents",
        "layout",
        "stack",
        "precision",
    ),
    *("gradients", "memory_limit", "max_micro_batch", "axes", "hardware", "profile", "assume"),
}
MACHINE_OPTIONS = {"gpu", "cluster", "nodes", "gpus_per_node", "hardware", "profile"}
FILE_OPTIONS = {"emit", "trace", "plot"}
MODES = {
    "published": set[str](),
    "kernel": {"heads", "kv_heads", "head_dim", "pin", "top", "as_json", *JOB_OPTIONS}
    - {"model", "stack", "gradients", "memory_limit", "max_micro_batch"},
    "compare": {"model", "seq_len", "global_batch", "as_json", *MACHINE_OPTIONS},
    "trace_memory": {"model", "seq_len", "documents", "pin", "as_json", *MACHINE_OPTIONS},
    "max_seq": {"pin", "top", "explain", "as_json", *JOB_OPTIONS, *FILE_OPTIONS},
}
"""Options that mean something in a mode; a search knows all but those of --kernel."""


def check_options(context: typer.Context) -> None:
    """Raise ValueError for options that contradict each other, that a mode would ignore, or that are out of
    range.

    Args:
        context: of the command, with the value of every option.
    """
    options = context.params
    _check_mode(context)
    for name in ("top", "global_batch", "max_micro_batch"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} {options[name]}: use a whole number of at least 1")
    if options["top"] > MOST_SHOWN:
        raise ValueError(f"--top {options['top']}: at most {MOST_SHOWN} are shown; use less")
    _check_kernel(options)
    for name, only in (("precision", "bf16"), ("gradients", "fp32")):
        if options["stack"] == "trainer" and options[name] != only:
            raise ValueError(
                f"--{name} with --stack trainer: seqmesh train computes in fp32; remove --{name}"
            )


def _check_kernel(options: Mapping[str, Any]) -> None:
    given = [name for name in ("heads", "kv_heads", "head_dim") if options[name] is not None]
    if not options["kernel"] and given:
        raise ValueError(
            f"--{given[0].replace('_', '-')} is an option of --kernel; add --kernel, or use --model for a whole model"
        )
    if options["kernel"] and options["heads"] is None:
        raise ValueError("--kernel needs --heads (and --kv-heads, --head-dim); add --heads 32")


def _check_mode(context: typer.Context) -> None:
    """Refuse what a mode would ignore."""
    given = [
        name for name, value in context.params.items() if value not in (None, (), _default(context, name))
    ]
    modes = [mode for mode in MODES if mode in given]
    if not modes:
        return
    mode, spelled = modes[0], {p.name: p.opts[0] for p in context.command.params}
    for name in given:
        if name != mode and name not in MODES[mode]:
            raise ValueError(f"{spelled[name]} has no meaning with {spelled[mode]}; remove one of them")


def _default(context: typer.Context, name: str) -> object:
    (parameter,) = (p for p in context.command.params if p.name == name)
    return parameter.get_default(context)
