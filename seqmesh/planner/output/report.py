"""What `seqmesh plan` prints: the best few, why, why not the next, and what the answer rests on."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seqmesh.planner.candidates import Pins
from seqmesh.planner.cost.estimate import StepEstimate
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.units import about_tokens, format_bytes, format_count, format_seconds
from seqmesh.planner.output.console import link_bytes, link_name, plain_table, print_list
from seqmesh.planner.reasons import reasons, why_not
from seqmesh.planner.search import Found
from seqmesh.planner.sensitivity import Sensitivity, Trial, sensitivities

MOST_SENSITIVITIES = 5
"""Assumptions that change the time only, of which so many are named."""


def show_found(out: Console, costs: CostModel, found: Found, pins: Pins, top: int) -> None:
    """The answer to a search.

    `top` of what was found is shown; all of it competes in what would change the answer.
    """
    _heading(out, costs.job)
    out.print(
        f"{found.meshes} legal meshes compared; one line for each of the best."
        " Times are predicted, not measured.\n"
    )
    out.print(candidates_table((*found.best[:top], *found.infeasible[:top])))
    if not found.best:
        return
    best = found.best[0]
    show_memory(out, costs, best)
    why = reasons(costs, best, pins)
    print_list(out, "Why this one (the practices are listed in docs/planner.md)", why)
    print_list(out, "Why not the next", [why_not(best, other) for other in found.best[1:3]])
    print_list(out, "What would change the answer", _would_change(costs, found.best, pins))


def show_one(out: Console, costs: CostModel, estimate: StepEstimate, pins: Pins) -> None:
    """One point in full: `--explain`."""
    _heading(out, costs.job)
    out.print()
    out.print(candidates_table([estimate]))
    show_memory(out, costs, estimate)
    _show_time(out, estimate)
    sent = ", ".join(link_bytes(estimate.bytes_per_step)) or "none"
    out.print(f"\n[bold]Bytes that a GPU sends in a step, on average[/]: {sent}")
    print_list(out, "Why", reasons(costs, estimate, pins))
    print_list(out, "What it rests on", _strongest(costs, estimate))
    show_assumptions(out, costs.job)


def _heading(out: Console, job: Job) -> None:
    c = job.cluster
    m = job.model
    documents = len(job.documents)
    packed = f", {documents} packed document{'s' if documents > 1 else ''}" if documents else ""
    state = "measured profile" if c.gpu.measured else "rates by data sheet, unmeasured"
    out.print(
        f"[bold]{escape(m.name)}[/] ({format_count(m.parameters)} parameters),"
        f" {about_tokens(job.seq_len)} tokens{packed}, global batch {job.global_batch},"
        f" on {c.nodes} x {c.gpus_per_node} {escape(c.gpu.name)}"
        f" ({format_bytes(job.capacity)} each; {state}; attention by {job.attention_kernel})"
    )


LEFT_COLUMNS = ("", "tp", "uly", "ring", "dp", "pp", "zero", "savers")
RIGHT_COLUMNS = (
    "step\n(lower - upper)",
    "tokens/s",
    "TFLOP/s\nper GPU",
    "MFU\ncausal\n(non-causal)",
    "memory",
    "sent per GPU\nand step",
    "limited\nby",
)


def candidates_table(estimates: Sequence[StepEstimate]) -> Table:
    """One line a point."""
    table = plain_table()
    for title in LEFT_COLUMNS:
        table.add_column(title, no_wrap=True)
    for title in RIGHT_COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for number, estimate in enumerate(estimates, 1):
        table.add_row(str(number), *_point_cells(estimate), *_cost_cells(estimate))
    return table


def _point_cells(estimate: StepEstimate) -> list[str]:
    p = estimate.point
    savers = [f"{saver} {value}" for saver, value in p.savers.items()]
    if p.micro_batch > 1:
        savers.append(f"micro-batch {p.micro_batch}")
    return [*map(str, (p.tp, p.ulysses, p.ring, p.dp, p.pp, p.zero)), "\n".join(savers) or "-"]


def _cost_cells(estimate: StepEstimate) -> list[str]:
    bounds = f"({format_seconds(estimate.lower)} - {format_seconds(estimate.upper)})"
    tflops = estimate.tflops_per_gpu
    return [
        f"{format_seconds(estimate.seconds)}\n{bounds}",
        f"{estimate.tokens_per_second:,.0f}",
        f"{tflops:.3g}" if tflops < 10 else f"{tflops:.1f}",
        f"{estimate.mfu_causal:.1%}\n({estimate.mfu_noncausal:.1%})",
        format_bytes(estimate.memory.total) + ("" if estimate.fits else "\nDOES NOT FIT"),
        "\n".join(link_bytes(estimate.bytes_per_step)) or "-",
        link_name(estimate.bound_by),
    ]


def show_memory(out: Console, costs: CostModel, estimate: StepEstimate) -> None:
    """Memory at the peak by category."""
    memory = estimate.memory
    out.print(
        f"\n[bold]Memory of a rank at the peak[/]: {format_bytes(memory.total)}"
        f" of {format_bytes(costs.job.capacity)}"
    )
    parts = [f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in memory.categories.items()]
    out.print("  " + ", ".join(parts))
    moments = sorted(memory.moments.items(), key=lambda moment: -moment[1])
    (peak, peak_bytes), *others = moments
    lesser = ", ".join(f"{name} {format_bytes(size)}" for name, size in others if size)
    out.print(
        f"  the peak comes with {peak} ({format_bytes(peak_bytes)});"
        f" at other moments, in its place: {lesser or 'less'}"
    )
    if memory.host:
        out.print(f"  on the host: {format_bytes(memory.host)}")
    for note in costs.notes(estimate.point):
        out.print(f"  {note}")


def _show_time(out: Console, estimate: StepEstimate) -> None:
    out.print("\n[bold]Time of a step[/]")
    table = plain_table()
    for title in ("  piece", "cause"):
        table.add_column(title)
    for title in ("alone", "adds", "share"):
        table.add_column(title, justify="right")
    for term in sorted(estimate.terms, key=lambda term: -term.exposed):
        table.add_row(
            f"  {term.name}",
            link_name(term.cause),
            format_seconds(term.seconds),
            format_seconds(term.exposed),
            f"{term.exposed / estimate.seconds:.1%}",
        )
    out.print(table)


def show_assumptions(out: Console, job: Job) -> None:
    """Every constant with its source."""
    gpu = job.cluster.gpu
    out.print(
        "\n[bold]Constants[/] (override with --assume name=value, or a measured profile with --profile)"
    )
    out.print(f"  {gpu.name}: {gpu.source or 'no source given'}", markup=False)
    table = plain_table(header=False)
    for one in job.assumptions.explain():
        table.add_row(f"  {one.name}", f"{one.value:g} {one.unit}".strip(), escape(one.source))
    out.print(table)


def _strongest(costs: CostModel, estimate: StepEstimate) -> list[str]:
    """The assumptions that the time of one point rests on most; with all of it pinned nothing competes."""
    found = sensitivities(costs, [estimate], asdict(estimate.point))
    return [_moves(one) for one in found][:MOST_SENSITIVITIES]


def _would_change(costs: CostModel, best: Sequence[StepEstimate], pins: Pins) -> list[str]:
    """Assumptions that change the winner, and those that its time rests on most."""
    found = sensitivities(costs, best, pins)
    if len(best) == 1:  # no verdict: no other mesh could win in its place
        return [_moves(one) for one in found][:MOST_SENSITIVITIES]
    flips = [_moves(one) for one in found if one.flips]
    strongest = [_moves(one) for one in found if not one.flips][:MOST_SENSITIVITIES]
    if not flips:
        verdict = "no assumption that was moved changes the winner; its time rests most on:"
        return [verdict, *strongest]
    rest = ["its time rests most on:", *strongest] if strongest else []
    return ["the winner changes with:", *flips, *rest]


def _moves(one: Sensitivity) -> str:
    return f"{one.name} {'; '.join(map(_outcome, one.trials))}"


def _outcome(trial: Trial) -> str:
    wins = f", {trial.winner} wins" if trial.winner else ""
    return f"{trial.value:.3g}: step {trial.change:+.1%}{wins}"
