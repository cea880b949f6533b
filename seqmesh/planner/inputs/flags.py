"""The options of `seqmesh plan`, each with its help text, as one dataclass; and how typer gets to see it.

typer reads a command's options off a function's signature, which would make a function of more than thirty
parameters.
`as_command` makes that signature from the fields of `PlanOptions`, and gives the values back as one object.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from seqmesh.planner.inputs.point import AXES


def _option(name: str, text: str) -> Any:
    return typer.Option(name, help=text)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What stands on the command line, unchecked; in the order of `--help`."""

    model: Annotated[
        str | None, _option("--model", "A known model, a Hugging Face config.json or its folder.")
    ] = None
    gpu: Annotated[str | None, _option("--gpu", "A known GPU, or one of --hardware.")] = None
    cluster: Annotated[str | None, _option("--cluster", "A [cluster.NAME] of --hardware.")] = None
    nodes: Annotated[int | None, _option("--nodes", "Nodes (default 1).")] = None
    gpus_per_node: Annotated[int | None, _option("--gpus-per-node", "GPUs of a node (default 8).")] = None
    seq_len: Annotated[str, _option("--seq-len", "Tokens of a sequence: 65536, 208K, 1M (K = 1024).")] = "8K"
    global_batch: Annotated[int, _option("--global-batch", "Sequences of a step over all GPUs.")] = 1
    documents: Annotated[
        str | None,
        _option(
            "--documents",
            "Packed documents: lognormal:MU,SIGMA, fixed:LENGTH, lengths, or a file of lengths.",
        ),
    ] = None
    dealing: Annotated[
        str,
        _option(
            "--dealing",
            "Sequences with --documents to dp groups: evened (by area, as seqmesh train) or in-turn.",
        ),
    ] = "evened"
    layout: Annotated[str, _option("--layout", "auto, contiguous, zigzag, striped or balanced.")] = "auto"
    pin: Annotated[
        list[str] | None,
        _option("--pin", "Fix degrees and knobs: tp=8,ulysses=1,zero=1,... Can be repeated."),
    ] = None
    stack: Annotated[
        str,
        _option(
            "--stack",
            "The program: seqmesh, fsdp2, fsdp2-eager, fsdp2-async-tp, megatron, trainer (seqmesh train),"
            " paper (of the published tables) or fused (seqmesh as priced before).",
        ),
    ] = "seqmesh"
    attention: Annotated[
        str | None,
        _option("--attention", "Kernel of attention: fa2, fa3 or cudnn; default: what the stack runs."),
    ] = None
    precision: Annotated[
        str | None,
        _option(
            "--precision",
            "bf16 (with fp32 master weights), fp8-linear (bf16 but for the layers' products) or fp32;"
            " default: bf16, of --stack trainer fp32.",
        ),
    ] = None
    gradients: Annotated[
        str, _option("--gradients", "How bf16 training accumulates and reduces gradients: fp32 or bf16.")
    ] = "fp32"
    memory_limit: Annotated[
        str | None, _option("--memory-limit", "Memory of a GPU to use, such as 70GiB.")
    ] = None
    max_micro_batch: Annotated[
        int | None, _option("--max-micro-batch", "Largest micro-batch to consider.")
    ] = None
    axes: Annotated[str, _option("--axes", "Mesh axes from the fastest links to the slowest.")] = ",".join(
        AXES
    )
    hardware: Annotated[
        list[Path] | None,
        _option("--hardware", "TOML file with GPUs, clusters or models of yours. Can be repeated."),
    ] = None
    profile: Annotated[
        list[Path] | None,
        _option("--profile", "Measured profile (the same form): overrides rates and assumptions."),
    ] = None
    assume: Annotated[
        list[str] | None,
        _option("--assume", "Override assumptions: network=0.7,matmul=0.6. See --explain."),
    ] = None
    top: Annotated[int, _option("--top", "How many meshes to show.")] = 5
    explain: Annotated[bool, _option("--explain", "Price the best (or the pinned) point in full.")] = False
    max_seq: Annotated[bool, _option("--max-seq", "Find the longest sequence that fits, then plan it.")] = (
        False
    )
    compare: Annotated[
        bool, _option("--compare", "The paper's Table 2 for this model: as printed, and corrected.")
    ] = False
    published: Annotated[
        bool, _option("--published", "The paper's measured tables beside this planner's predictions.")
    ] = False
    kernel: Annotated[
        bool, _option("--kernel", "Rank the ulysses x ring splits of one attention forward instead.")
    ] = False
    heads: Annotated[int | None, _option("--heads", "Query heads, with --kernel.")] = None
    kv_heads: Annotated[
        int | None, _option("--kv-heads", "K/V heads, with --kernel (default: as --heads).")
    ] = None
    head_dim: Annotated[int | None, _option("--head-dim", "Head dim, with --kernel (default 128).")] = None
    trace_memory: Annotated[
        bool,
        _option(
            "--trace-memory",
            "Trace the memory of `seqmesh train`'s step with fake tensors, beside the prediction.",
        ),
    ] = False
    as_json: Annotated[bool, _option("--json", "Print JSON.")] = False
    emit: Annotated[Path | None, _option("--emit", "Write the best point as a recipe for seqmesh train.")] = (
        None
    )
    emit_for: Annotated[
        str, _option("--emit-for", "Which program --emit writes for: seqmesh, torchtitan or megatron.")
    ] = "seqmesh"
    trace: Annotated[
        Path | None, _option("--trace", "Write a step's predicted timeline in the Chrome trace format.")
    ] = None
    plot: Annotated[
        Path | None, _option("--plot", "Draw memory and time of the candidates (default plan.png).")
    ] = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All TOML files, later ones going before earlier ones: profiles before the others."""
        return (*(self.hardware or ()), *(self.profile or ()))


def as_command(run: Callable[[typer.Context, PlanOptions], int]) -> Callable[..., int]:
    """A function whose parameters are the context and every field of `PlanOptions`, for typer to read."""

    def command(context: typer.Context, **values: Any) -> int:
        return run(context, PlanOptions(**values))

    types = get_type_hints(PlanOptions, include_extras=True)
    by_name = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(field.name, by_name, default=field.default, annotation=types[field.name])
        for field in fields(PlanOptions)
    ]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    command.__signature__ = inspect.Signature([context, *options])  # type: ignore[attr-defined]
    command.__annotations__ = {"context": typer.Context, **types}
    return command
