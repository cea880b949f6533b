"""`seqmesh plan`: its options, and what each of them does.

Exit codes: 0 an answer; 2 wrong input, or nothing fits: one line with the remedy (cli.py prints it).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from seqmesh.planner.cost.estimate import Price
from seqmesh.planner.cost.step import Pricer
from seqmesh.planner.inputs.hardware import known_gpus
from seqmesh.planner.inputs.job import AXES, KEYS, Job
from seqmesh.planner.inputs.models import ModelShape, known_models, load_model
from seqmesh.planner.inputs.options import check_options
from seqmesh.planner.inputs.request import Machine, Request, build_job, numerics_for, parse_pins
from seqmesh.planner.inputs.units import format_tokens
from seqmesh.planner.longest import at_length, longest
from seqmesh.planner.one_attention import attention_model, split_record, splits
from seqmesh.planner.output.records import record
from seqmesh.planner.output.report import console, show_found, show_one, show_splits, show_traced
from seqmesh.planner.reasons import overflow, reasons, remedy, shortfall, why_not
from seqmesh.planner.search import Found, Pins, any_legal, explain_pins, search
from seqmesh.planner.trainer.memory import trainer_memory

Files = list[Path] | None
Texts = list[str] | None

UNLIMITED = 1 << 60
"""Bytes: a trace needs no memory, so whatever is traced fits."""
POOL = 12
"""Meshes that compete when an assumption moves, at least."""
SAMPLE = "1M"
"""Tokens of documents that --max-seq draws."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What to make of the answer."""

    as_json: bool
    explain: bool
    emit: Path | None
    trace: Path | None
    plot: Path | None
    top: int


def add_to(app: typer.Typer) -> None:
    """Add the command `plan`."""
    about = f"Models: {', '.join(known_models())}. GPUs: {', '.join(known_gpus())}. Pins: {', '.join(KEYS)}."
    app.command("plan", epilog=about)(_plan)


def _option(*names: str, text: str) -> Any:
    return typer.Option(*names, help=text)


def _plan(  # one parameter an option: that is typer's form
    context: typer.Context,
    model: Annotated[
        str | None, _option("--model", text="A known model, a Hugging Face config.json or its folder.")
    ] = None,
    gpu: Annotated[str | None, _option("--gpu", text="A known GPU, or one of --hardware.")] = None,
    cluster: Annotated[str | None, _option("--cluster", text="A [cluster.NAME] of --hardware.")] = None,
    nodes: Annotated[int | None, _option("--nodes", text="Nodes (default 1).")] = None,
    gpus_per_node: Annotated[
        int | None, _option("--gpus-per-node", text="GPUs of a node (default 8).")
    ] = None,
    seq_len: Annotated[
        str, _option("--seq-len", text="Tokens of a sequence: 65536, 208K, 1M (K = 1024).")
    ] = "8K",
    global_batch: Annotated[int, _option("--global-batch", text="Sequences of a step over all GPUs.")] = 1,
    documents: Annotated[
        str | None,
        _option(
            "--documents",
            text="Packed documents: lognormal:MU,SIGMA, fixed:LENGTH, lengths, or a file of lengths.",
        ),
    ] = None,
    layout: Annotated[
        str, _option("--layout", text="auto, contiguous, zigzag, striped or balanced.")
    ] = "auto",
    pin: Annotated[
        Texts, _option("--pin", text="Fix degrees and knobs: tp=8,ulysses=1,zero=1,... Can be repeated.")
    ] = None,
    stack: Annotated[
        str, _option("--stack", text="fused (bf16, as Megatron-LM) or trainer (seqmesh train as it stands).")
    ] = "fused",
    precision: Annotated[
        str, _option("--precision", text="bf16 (with fp32 master weights) or fp32.")
    ] = "bf16",
    gradients: Annotated[
        str, _option("--gradients", text="How bf16 training accumulates and reduces gradients: fp32 or bf16.")
    ] = "fp32",
    memory_limit: Annotated[
        str | None, _option("--memory-limit", text="Memory of a GPU to use, such as 70GiB.")
    ] = None,
    max_micro_batch: Annotated[
        int | None, _option("--max-micro-batch", text="Largest micro-batch to consider.")
    ] = None,
    axes: Annotated[
        str, _option("--axes", text="Mesh axes from the fastest links to the slowest.")
    ] = ",".join(AXES),
    hardware: Annotated[
        Files,
        _option("--hardware", text="TOML file with GPUs, clusters or models of yours. Can be repeated."),
    ] = None,
    profile: Annotated[
        Files, _option("--profile", text="Measured profile (the same form): overrides rates and assumptions.")
    ] = None,
    assume: Annotated[
        Texts, _option("--assume", text="Override assumptions: network=0.7,matmul=0.6. See --explain.")
    ] = None,
    top: Annotated[int, _option("--top", text="How many meshes to show.")] = 5,
    explain: Annotated[
        bool, _option("--explain", text="Price the best (or the pinned) point in full.")
    ] = False,
    max_seq: Annotated[
        bool, _option("--max-seq", text="Find the longest sequence that fits, then plan it.")
    ] = False,
    compare: Annotated[
        bool, _option("--compare", text="The paper's Table 2 for this model: as printed, and corrected.")
    ] = False,
    published: Annotated[
        bool, _option("--published", text="The paper's measured tables beside this planner's predictions.")
    ] = False,
    kernel: Annotated[
        bool, _option("--kernel", text="Rank the ulysses x ring splits of one attention forward instead.")
    ] = False,
    heads: Annotated[int | None, _option("--heads", text="Query heads, with --kernel.")] = None,
    kv_heads: Annotated[
        int | None, _option("--kv-heads", text="K/V heads, with --kernel (default: as --heads).")
    ] = None,
    head_dim: Annotated[
        int | None, _option("--head-dim", text="Head dim, with --kernel (default 128).")
    ] = None,
    trace_memory: Annotated[
        bool,
        _option(
            "--trace-memory",
            text="Trace the memory of `seqmesh train`'s step with fake tensors, beside the prediction.",
        ),
    ] = False,
    as_json: Annotated[bool, _option("--json", text="Print JSON.")] = False,
    emit: Annotated[
        Path | None, _option("--emit", text="Write the best point as a recipe for seqmesh train.")
    ] = None,
    trace: Annotated[
        Path | None, _option("--trace", text="Write a step's predicted timeline in the Chrome trace format.")
    ] = None,
    plot: Annotated[
        Path | None, _option("--plot", text="Draw memory and time of the candidates (default plan.png).")
    ] = None,
) -> int:
    """Choose a mesh: dp, tp, ulysses, ring, pp, ZeRO stage and memory savers, with memory, time and the
    reasons. No GPU is needed.
    """
    check_options(context)
    if published:
        from seqmesh.planner.paper.published import render

        print(render())
        return 0
    machine = Machine(
        gpu=gpu,
        cluster=cluster,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        hardware=tuple(hardware or ()),
        profiles=tuple(profile or ()),
    )
    request = Request(
        machine=machine,
        seq_len=seq_len,
        global_batch=global_batch,
        documents=documents,
        layout=layout,
        stack=stack,
        precision=precision,
        gradients=gradients,
        memory_limit=memory_limit,
        axes=axes,
        assume=tuple(assume or ()),
    )
    pins, outputs = (
        parse_pins(pin or []),
        Outputs(as_json=as_json, explain=explain, emit=emit, trace=trace, plot=plot, top=top),
    )
    if kernel:
        assert heads is not None
        shape = attention_model(
            heads, heads if kv_heads is None else kv_heads, 128 if head_dim is None else head_dim
        )
        return _kernel(build_job(request, shape), pins, outputs)
    if (
        max_seq and documents is not None
    ):  # a sample long enough to be the distribution; it is repeated or cut
        request = replace(request, seq_len=SAMPLE)
    job = build_job(request, _model(model, machine))
    if compare:
        return _compare(job, outputs)
    if trace_memory:
        return _trace_memory(job, pins, as_json)
    if max_seq:
        job = at_length(job, _longest(job, pins))
    return _answer(replace(job, max_micro_batch=max_micro_batch), pins, outputs)


def _model(given: str | None, machine: Machine) -> ModelShape:
    if given is None:
        raise ValueError(
            f"no model given; add --model NAME or --model config.json; known: {', '.join(known_models(machine.files))}"
        )
    return load_model(given, machine.files)


def _kernel(job: Job, pins: Pins, outputs: Outputs) -> int:
    ranked = splits(job, pins)[: outputs.top]
    if outputs.as_json:
        print(json.dumps({"candidates": [split_record(split) for split in ranked]}, indent=2))
    else:
        show_splits(console(), job, ranked)
    return 0


def _compare(job: Job, outputs: Outputs) -> int:
    from seqmesh.planner.paper.compare import as_record, compare, render

    table = compare(job.model, ranks=job.cluster.gpus, batch=job.global_batch, seq_len=job.seq_len)
    print(json.dumps(as_record(table), indent=2) if outputs.as_json else render(table))
    return 0


def _longest(job: Job, pins: Pins) -> int:
    pricer = Pricer(job)
    if not any_legal(pricer, pins):
        raise ValueError(explain_pins(job, pins))
    length = longest(pricer, pins)
    if not length:
        raise ValueError(f"not even 1K tokens fit: {remedy(Pricer(at_length(job, 1024)), pins)}")
    return length


def _answer(job: Job, pins: Pins, outputs: Outputs) -> int:
    pricer = Pricer(job)
    found = search(pricer, pins, max(outputs.top, POOL))
    if not found.best and not (_is_point(pins) or (pins and outputs.as_json)):
        raise ValueError(f"nothing fits: {shortfall(pricer, found.misfits[0], pins)}")
    shown = (*found.best[: outputs.top], *found.misfits[: outputs.top])
    _write(pricer, shown, outputs)
    if outputs.as_json:
        records = [record(price, job.capacity, _why(pricer, found, price, pins)) for price in shown]
        print(json.dumps({"seq_len": job.seq_len, "candidates": records}, indent=2))
    elif outputs.explain or _is_point(pins):
        show_one(console(), pricer, shown[0], pins)
    else:
        show_found(console(), pricer, found, pins, outputs.top)
    return 0


def _is_point(pins: Pins) -> bool:
    """Whether the pins leave nothing to choose."""
    return set(pins) == set(KEYS)


def _why(pricer: Pricer, found: Found, price: Price, pins: Pins) -> list[str]:
    first = (found.best or found.misfits)[0]
    if price is first:
        return reasons(pricer, price, pins)
    if not price.fits:
        return [overflow(pricer, price)]
    return [why_not(found.best[0], price)]


def _write(pricer: Pricer, shown: Sequence[Price], outputs: Outputs) -> None:
    """The files that were asked for; what is said about them goes to stderr, so that JSON stays JSON."""
    point = shown[0].point
    if outputs.plot is not None:
        from seqmesh.planner.output.plot import plot

        try:
            plot(shown, pricer.job.capacity, outputs.plot, _title(pricer.job))
        except OSError as error:
            raise ValueError(
                f"cannot write {str(outputs.plot)!r}: {error.strerror}; choose another place"
            ) from None
    if outputs.emit is not None:
        from seqmesh.planner.output.emit import emit

        text, missing = emit(pricer.job, point)
        _save(outputs.emit, text)
        for line in missing:
            print(f"seqmesh: {outputs.emit}: {line}", file=sys.stderr)
    if outputs.trace is not None:
        from seqmesh.planner.output.timeline import timeline

        _save(outputs.trace, json.dumps(timeline(pricer, point)))


def _title(job: Job) -> str:
    c, length = job.cluster, format_tokens(job.seq_len)
    return f"{job.model.name}, {length} tokens, global batch {job.global_batch}, {c.nodes} x {c.gpus_per_node} {c.gpu.name}"


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror}; choose another place") from None


def _trace_memory(job: Job, pins: Pins, as_json: bool) -> int:
    """The trainer's step, traced and predicted. The mesh is the pinned one, else the best of the trainer's."""
    roomy = replace(job.cluster, gpu=replace(job.cluster.gpu, memory_bytes=UNLIMITED))
    job = replace(job, stack="trainer", numerics=numerics_for("fp32", "fp32"), cluster=roomy)
    point = search(Pricer(job), pins, top=1).best[0].point
    predicted = trainer_memory(job.model, seq_len=job.seq_len, ulysses=point.ulysses, ring=point.ring)

    from seqmesh.planner.trainer.tracing import trace_training_step  # loads torch and transformers

    traced = trace_training_step(
        job.model,
        seq_len=job.seq_len,
        ulysses=point.ulysses,
        ring=point.ring,
        documents=job.documents or None,
    )
    result = {
        "ulysses": point.ulysses,
        "ring": point.ring,
        "seq_len": job.seq_len,
        "traced_bytes": asdict(traced),
        "predicted_bytes": predicted,
        "predicted_over_traced": predicted["total"] / traced.peak_bytes,
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show_traced(console(), job, result)
    return 0
