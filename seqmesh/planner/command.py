"""`seqmesh plan`: what each of its modes does.

Exit codes: 0 an answer; 2 wrong input, or nothing fits: one line with the remedy (cli.py prints it).
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import typer

from seqmesh.planner.candidates import Pins
from seqmesh.planner.cost.estimate import StepEstimate
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.cost.trainer_memory import rank_of
from seqmesh.planner.errors import HEADROOM
from seqmesh.planner.inputs.flags import PlanOptions, as_command
from seqmesh.planner.inputs.hardware import known_gpus
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import known_models, load_model
from seqmesh.planner.inputs.options import check_options
from seqmesh.planner.inputs.point import KEYS, SEARCHED
from seqmesh.planner.inputs.request import build_job, parse_pins
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.inputs.units import format_tokens
from seqmesh.planner.longest import at_length, longest
from seqmesh.planner.one_attention import attention_model, split_record, splits
from seqmesh.planner.output.console import console
from seqmesh.planner.output.records import record
from seqmesh.planner.output.report import explain_found, show_found, show_one
from seqmesh.planner.output.splits import show_splits
from seqmesh.planner.output.traced import show_traced
from seqmesh.planner.reasons import reasons, why_not
from seqmesh.planner.remedies import overflow, remedy, shortfall
from seqmesh.planner.search import Found, Search, any_legal, explain_pins, search
from seqmesh.train.memory.peak import traced_like

UNLIMITED = 1 << 60
"""Bytes: a trace needs no memory, so whatever is traced fits."""
RIVALS = 12
"""Meshes that compete when an assumption moves, at least."""
NEXT = 2
"""Meshes that an answer speaks of, at least: its own and the next."""
SAMPLE = "1M"
"""Tokens of documents that --max-seq draws: long enough to be the distribution; they are repeated or cut."""
ABOUT = (
    "Choose a mesh: dp, tp, ulysses, ring, pp, ZeRO stage and memory savers, with memory, time and the"
    " reasons. No GPU is needed."
)


def add_to(app: typer.Typer) -> None:
    """Add the command `plan`."""
    known = f"Models: {', '.join(known_models())}. GPUs: {', '.join(known_gpus())}. Pins: {', '.join(KEYS)}."
    app.command("plan", help=ABOUT, epilog=known)(as_command(_plan))


def _plan(context: typer.Context, options: PlanOptions) -> int:
    """Answer the question that the options ask."""
    check_options(context)
    if options.published:
        from seqmesh.planner.paper import held_out, published

        print(published.render())
        print(f"\n{held_out.render()}")
        return 0
    pins = parse_pins(options.pin or [])
    # Of one point nothing is searched, not the order of its pipeline either.
    if set(pins) >= set(SEARCHED) and "virtual" not in pins:
        pins = {"pipeline": "1f1b", **pins}
    if options.kernel:
        one = build_job(replace(options, global_batch=1), _one_attention(options))
        sequences = options.global_batch  # all with the documents of one
        alike = replace(one, global_batch=sequences, documents=one.documents * sequences)
        return _kernel(alike, pins, options)
    if options.max_seq and options.documents is not None:
        options = replace(options, seq_len=SAMPLE)
    if options.trace_memory:
        options = replace(options, stack="trainer")
    job = build_job(options, _model(options))
    if job.stack.leaves_headroom and options.memory_limit is None:
        job = replace(job, headroom=HEADROOM)
    if options.compare:
        return _compare(job, options)
    if options.trace_memory:
        return _trace_memory(job, pins, options.as_json)
    if options.max_seq:
        job = at_length(job, _longest(job, pins))
    return _answer(replace(job, max_micro_batch=options.max_micro_batch), pins, options)


def _model(options: PlanOptions) -> ModelShape:
    if options.model is None:
        raise ValueError(
            "no model given; add --model NAME or --model config.json;"
            f" known: {', '.join(known_models(options.files))}"
        )
    return load_model(options.model, options.files)


def _one_attention(options: PlanOptions) -> ModelShape:
    assert options.heads is not None  # check_options saw to it
    kv_heads = options.heads if options.kv_heads is None else options.kv_heads
    head_dim = 128 if options.head_dim is None else options.head_dim
    return attention_model(options.heads, kv_heads, head_dim)


def _kernel(job: Job, pins: Pins, options: PlanOptions) -> int:
    """`--kernel`: the splits of one attention."""
    ranked = splits(job, pins)[: options.top]
    if options.as_json:
        print(json.dumps({"candidates": [split_record(split) for split in ranked]}, indent=2))
    else:
        show_splits(console(), job, ranked)
    return 0


def _compare(job: Job, options: PlanOptions) -> int:
    """`--compare`: the paper's Table 2."""
    from seqmesh.planner.paper.compare import as_record, render
    from seqmesh.planner.paper.table2 import SpreadLayer

    layer = SpreadLayer(model=job.model, ranks=job.cluster.gpus, batch=job.global_batch, seq_len=job.seq_len)
    print(json.dumps(as_record(layer), indent=2) if options.as_json else render(layer))
    return 0


def _longest(job: Job, pins: Pins) -> int:
    """`--max-seq`: tokens of the longest sequence that fits."""
    costs = CostModel(job)
    if not any_legal(costs, pins):
        raise ValueError(explain_pins(job, pins))
    length = longest(costs, pins)
    if not length:
        raise ValueError(f"not even 1K tokens fit: {remedy(CostModel(at_length(job, 1024)), pins)}")
    return length


def _answer(job: Job, pins: Pins, options: PlanOptions) -> int:
    """The search, or the one point that the pins leave."""
    costs = CostModel(job)
    searched = Search(costs, pins)
    found = searched.found(max(options.top, RIVALS if options.explain else NEXT))
    if not found.best and job.headroom:  # what fits without any is better than nothing
        return _answer(replace(job, headroom=0.0), pins, options)
    # What does not fit is shown where it was asked for: as the pinned point, or to a program.
    if not found.best and not (_is_point(job, pins) or (pins and options.as_json)):
        raise ValueError(f"nothing fits: {shortfall(costs, found.infeasible[0], pins)}")
    shown = (*found.best[: options.top], *found.infeasible[: options.top])
    first = found.tied[0] if found.tied else shown[0]
    _write_files(costs, (first, *(one for one in shown if one is not first)), options)
    out = console()
    if options.as_json:
        records = [record(one, job.capacity, _why(searched, found, one)) for one in shown]
        told = {"answer": asdict(first.point), "tied": [asdict(one.point) for one in found.tied]}
        print(json.dumps({"seq_len": job.seq_len, **told, "candidates": records}, indent=2))
    elif _is_point(job, pins):
        show_one(out, costs, first, pins)
    else:
        written = str(options.emit) if options.emit and options.emit_for == job.stack.program else None
        show_found(out, costs, found, options.top, written)
        if options.explain:
            explain_found(out, searched, found)
    return 0


def _is_point(job: Job, pins: Pins) -> bool:
    """Whether the pins leave nothing to choose."""
    return set(pins) >= {*SEARCHED, *(["experts"] if job.model.mixture else [])}


def _why(searched: Search, found: Found, estimate: StepEstimate) -> list[str]:
    """In full for the first candidate, in a line for the others."""
    first = (found.best or found.infeasible)[0]
    if estimate is first:
        return reasons(searched, estimate)
    if not estimate.fits:
        return [overflow(searched.costs, estimate)]
    return [why_not(found.best[0], estimate)]


def _write_files(costs: CostModel, shown: Sequence[StepEstimate], options: PlanOptions) -> None:
    """The files that were asked for; what is said about them goes to stderr, so that JSON stays JSON."""
    job, point = costs.job, shown[0].point
    if options.plot is not None:
        from seqmesh.planner.output.plot import plot

        with _writing(options.plot):
            plot(shown, job.capacity, options.plot, _title(job))
    if options.emit is not None:
        from seqmesh.planner.output.emit_for import emit_for

        text, missing = emit_for(options.emit_for, job, point)
        with _writing(options.emit):
            options.emit.write_text(text, encoding="utf-8")
        for line in missing:
            print(f"seqmesh: {options.emit}: {line}", file=sys.stderr)
    if options.trace is not None:
        from seqmesh.planner.output.timeline import timeline

        drawn = json.dumps(timeline(costs, point))
        with _writing(options.trace):
            options.trace.write_text(drawn, encoding="utf-8")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What is raised where a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror}; choose another place") from None


def _title(job: Job) -> str:
    c = job.cluster
    return (
        f"{job.model.name}, {format_tokens(job.seq_len)} tokens, global batch {job.global_batch},"
        f" {c.nodes} x {c.gpus_per_node} {c.gpu.name}"
    )


def _trace_memory(job: Job, pins: Pins, as_json: bool) -> int:
    """`--trace-memory`: the trainer's step, traced and predicted, of the fuller end stage.

    The mix is the pinned one, else the best of the trainer's.
    """
    roomy = replace(job.cluster, gpu=replace(job.cluster.gpu, memory_bytes=UNLIMITED))
    job = replace(job, cluster=roomy)
    point = search(CostModel(job), pins, top=1).best[0].point
    ends = sorted({0, point.pp - 1})
    ranks = [rank_of(job, point).at_stage(stage) for stage in ends]
    fuller = max(ranks, key=lambda rank: traced_like(rank)["total"])
    predicted = traced_like(fuller)

    from seqmesh.trace.of_rank import trace_rank  # loads torch and transformers

    traced = trace_rank(fuller, job.sequences[0] if job.documents else None)
    result = {
        "ulysses": point.ulysses,
        "ring": point.ring,
        "point": str(point),
        "precision": "bf16" if fuller.is_half else "fp32",
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
