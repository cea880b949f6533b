"""The options of `seqmesh plan`, each with its help text, as one dataclass; and how typer gets to see it.

typer reads a command's options off a function's signature, which would make a function of more than thirty
parameters.
`as_command` makes that signature from the fields of `PlanOptions`, and gives the values back as one object.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from seqmesh.planner.inputs.point import AXES


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What stands on the command line, unchecked; in the order of `--help`, each with its text."""

    model: Annotated[str | None, "A known model, a Hugging Face config.json or its folder."] = None
    gpu: Annotated[str | None, "A known GPU, or one of --hardware."] = None
    cluster: Annotated[str | None, "A [cluster.NAME] of --hardware."] = None
    nodes: Annotated[int | None, "Nodes (default 1)."] = None
    gpus_per_node: Annotated[int | None, "GPUs of a node (default 8)."] = None
    seq_len: Annotated[str, "Tokens of a sequence: 65536, 208K, 1M (K = 1024)."] = "8K"
    global_batch: Annotated[int, "Sequences of a step over all GPUs."] = 1
    documents: Annotated[
        str | None, "Packed documents: lognormal:MU,SIGMA, fixed:LENGTH, lengths, or a file of lengths."
    ] = None
    dealing: Annotated[
        str, "Sequences with --documents to dp groups: evened (by area, as seqmesh train) or in-turn."
    ] = "evened"
    layout: Annotated[str, "auto, contiguous, zigzag, striped or balanced."] = "auto"
    pin: Annotated[list[str] | None, "Fix degrees and knobs: tp=8,ulysses=1,zero=1,... Can be repeated."] = (
        None
    )
    stack: Annotated[
        str,
        "The program: seqmesh, fsdp2, fsdp2-eager, fsdp2-async-tp, megatron, megatron-bridge (NVIDIA's"
        " recipes), trainer (seqmesh train),"
        " paper (of the published tables) or fused (seqmesh as priced before).",
    ] = "seqmesh"
    attention: Annotated[
        str | None, "Kernel of attention: fa2, fa3 or cudnn; default: what the stack runs."
    ] = None
    precision: Annotated[
        str | None,
        "bf16 (with fp32 master weights), fp8-linear (bf16 but for the layers' products) or fp32;"
        " default: bf16, of --stack trainer fp32.",
    ] = None
    gradients: Annotated[str, "How bf16 training accumulates and reduces gradients: fp32 or bf16."] = "fp32"
    memory_limit: Annotated[str | None, "Memory of a GPU to use, such as 70GiB."] = None
    max_micro_batch: Annotated[int | None, "Largest micro-batch to consider."] = None
    axes: Annotated[str, "Mesh axes from the fastest links to the slowest."] = ",".join(AXES)
    hardware: Annotated[
        list[Path] | None, "TOML file with GPUs, clusters or models of yours. Can be repeated."
    ] = None
    profile: Annotated[
        list[Path] | None, "Measured profile (the same form): overrides rates and assumptions."
    ] = None
    assume: Annotated[list[str] | None, "Override assumptions: network=0.7,matmul=0.6. See --explain."] = None
    top: Annotated[int, "How many meshes to show."] = 5
    explain: Annotated[bool, "Price the best (or the pinned) point in full."] = False
    max_seq: Annotated[bool, "Find the longest sequence that fits, then plan it."] = False
    compare: Annotated[bool, "The paper's Table 2 for this model: as printed, and corrected."] = False
    published: Annotated[bool, "The paper's measured tables beside this planner's predictions."] = False
    kernel: Annotated[bool, "Rank the ulysses x ring splits of one attention forward instead."] = False
    heads: Annotated[int | None, "Query heads, with --kernel."] = None
    kv_heads: Annotated[int | None, "K/V heads, with --kernel (default: as --heads)."] = None
    head_dim: Annotated[int | None, "Head dim, with --kernel (default 128)."] = None
    trace_memory: Annotated[
        bool, "Trace the memory of `seqmesh train`'s step with fake tensors, beside the prediction."
    ] = False
    as_json: Annotated[bool, "Print JSON."] = False
    emit: Annotated[Path | None, "Write the best point as a recipe for seqmesh train."] = None
    emit_for: Annotated[str, "Which program --emit writes for: seqmesh, torchtitan or megatron."] = "seqmesh"
    trace: Annotated[Path | None, "Write a step's predicted timeline in the Chrome trace format."] = None
    plot: Annotated[Path | None, "Draw memory and time of the candidates (default plan.png)."] = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All TOML files, later ones going before earlier ones: profiles before the others."""
        return (*(self.hardware or ()), *(self.profile or ()))


def as_command(run: Callable[[typer.Context, PlanOptions], int]) -> Callable[..., int]:
    """A function whose parameters are the context and every field of `PlanOptions`, for typer to read."""

    def command(context: typer.Context, **values: Any) -> int:
        return run(context, PlanOptions(**values))

    hints = get_type_hints(PlanOptions, include_extras=True)
    types = {name: _as_option(name, hint) for name, hint in hints.items()}
    by_name = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(field.name, by_name, default=field.default, annotation=types[field.name])
        for field in fields(PlanOptions)
    ]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    command.__signature__ = inspect.Signature([context, *options])  # type: ignore[attr-defined]
    command.__annotations__ = {"context": typer.Context, **types}
    return command


def _as_option(name: str, hint: Any) -> Any:
    """A field's type and text as typer wants them; with the option's name, a switch has no `--no-` form."""
    kind, text = get_args(hint)
    spelled = "--json" if name == "as_json" else f"--{name.replace('_', '-')}"
    return Annotated[kind, typer.Option(spelled, help=text)]
