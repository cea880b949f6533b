"""What `seqmesh plan` prints: the answer in five lines and a table; with --explain all that is behind it."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seqmesh.planner.answer import answer
from seqmesh.planner.candidates import Pins, mesh_of
from seqmesh.planner.cost.estimate import StepEstimate
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.units import about_tokens, format_bytes, format_count, format_seconds
from seqmesh.planner.output.console import link_bytes, link_name, named_bytes, plain_table, print_list
from seqmesh.planner.reasons import reasons, why_not
from seqmesh.planner.search import Found, Search
from seqmesh.planner.sensitivity import Sensitivity, Trial, sensitivities
from seqmesh.planner.words import knob_words, mesh_words

MOST_SENSITIVITIES = 5
"""Assumptions that change the time only, of which so many are named."""


def show_found(out: Console, costs: CostModel, found: Found, top: int, written: str | None = None) -> None:
    """The answer to a search in five lines, and `top` of what was found as a table."""
    _heading(out, costs.job)
    if found.tied:
        out.print()
        for line in answer(costs, found, written):
            out.print(line, markup=False)
    out.print(
        f"\n{found.meshes} legal meshes compared; one line for each of the best. Times are predicted, not"
        " measured. Why: --explain."
    )
    out.print(candidates_table(marked(found, top), out.width))


def marked(found: Found, top: int) -> list[tuple[str, StepEstimate]]:
    """What a table shows: the answer, what ties with it, the others by time, and what does not fit."""
    tied = {mesh_of(one.point) for one in found.tied}
    fitting = [("run", one) for one in found.tied[:1]]
    fitting += [("tie", one) for one in sorted(found.tied[1:], key=lambda one: one.seconds)]
    fitting += [("", one) for one in found.best if mesh_of(one.point) not in tied]
    return [*fitting[:top], *(("", one) for one in found.infeasible[:top])]


def explain_found(out: Console, searched: Search, found: Found) -> None:
    """What stands behind the answer: memory, time, bytes, reasons, sensitivities, constants."""
    costs = searched.costs
    best = found.tied[0]
    _show_costs(out, costs, best)
    why = reasons(searched, best)
    print_list(out, "Why this one (the practices are listed in docs/planner.md)", why)
    others = [one for one in found.best if mesh_of(one.point) != mesh_of(best.point)]
    print_list(out, "Why not the next", [why_not(best, other) for other in others[:2]])
    rivals = [best, *others]
    print_list(out, "What would change the answer", _would_change(costs, rivals, searched.pins))
    show_assumptions(out, costs.job)


def show_one(out: Console, costs: CostModel, estimate: StepEstimate, pins: Pins) -> None:
    """One point in full: all of it pinned."""
    _heading(out, costs.job)
    out.print()
    out.print(candidates_table([("", estimate)], out.width))
    _show_costs(out, costs, estimate)
    print_list(out, "Why", reasons(Search(costs, pins), estimate))
    print_list(out, "What it rests on", _would_change(costs, [estimate], asdict(estimate.point)))
    show_assumptions(out, costs.job)


def _show_costs(out: Console, costs: CostModel, estimate: StepEstimate) -> None:
    show_memory(out, costs, estimate)
    _show_time(out, estimate)
    sent = ", ".join(link_bytes(estimate.bytes_per_step)) or "none"
    out.print(f"\n[bold]Bytes that a GPU sends in a step, on average[/]: {sent}")


def _heading(out: Console, job: Job) -> None:
    c = job.cluster
    m = job.model
    documents = len(job.documents)
    packed = f", {documents} packed document{'s' if documents > 1 else ''}" if documents else ""
    active = f", {format_count(m.active_parameters)} active" if m.mixture else ""
    state = "measured profile" if c.gpu.measured else "rates by data sheet, unmeasured"
    out.print(
        f"[bold]{escape(m.name)}[/] ({format_count(m.parameters)} parameters{active}),"
        f" {about_tokens(job.seq_len)} tokens{packed}, global batch {job.global_batch},"
        f" on {c.nodes} x {c.gpus_per_node} {escape(c.gpu.name)}"
        f" ({format_bytes(job.capacity)} each; {state}; attention by {job.attention_kernel})"
    )


WIDE = 120
"""Columns of a console from which on a table says more than what a choice needs."""


def candidates_table(points: Sequence[tuple[str, StepEstimate]], width: int) -> Table:
    """One line a point: the mesh, what it takes and what limits it; more where there is room.

    Args:
        points: each with a word before it.
        width: columns of the console.
    """
    table = plain_table()
    table.add_column("")
    table.add_column("mesh", min_width=10)
    titles = ["step", "MFU", "memory", "limited\nby"]
    if width >= WIDE:
        titles[1:2] = ["tokens/s", "TFLOP/s\nper GPU", "MFU\n(non-causal)"]
        titles[-1:] = ["sent per GPU\nand step", "limited\nby"]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for mark, one in points:
        mesh = f"{mesh_words(one.point)}\n{knob_words(one.point)}"
        cells = _wide_cells(one) if width >= WIDE else _narrow_cells(one)
        table.add_row(mark, mesh, *cells)
    return table


def _narrow_cells(one: StepEstimate) -> list[str]:
    memory = format_bytes(one.memory.total) + ("" if one.fits else "\nDOES NOT FIT")
    return [format_seconds(one.seconds), f"{one.mfu_causal:.1%}", memory, link_name(one.bound_by)]


def _wide_cells(one: StepEstimate) -> list[str]:
    step, mfu, memory, limit = _narrow_cells(one)
    tflops = one.tflops_per_gpu
    return [
        f"{step}\n({format_seconds(one.lower)} - {format_seconds(one.upper)})",
        f"{one.tokens_per_second:,.0f}",
        f"{tflops:.3g}" if tflops < 10 else f"{tflops:.1f}",
        f"{mfu}\n({one.mfu_noncausal:.1%})",
        memory,
        "\n".join(link_bytes(one.bytes_per_step)) or "-",
        limit,
    ]


def show_memory(out: Console, costs: CostModel, estimate: StepEstimate) -> None:
    """Memory at the peak by category."""
    memory = estimate.memory
    out.print(
        f"\n[bold]Memory of a rank at the peak[/]: {format_bytes(memory.total)}"
        f" of {format_bytes(costs.job.capacity)}"
    )
    out.print(f"  {named_bytes(memory.categories)}")
    moments = sorted(memory.moments.items(), key=lambda moment: -moment[1])
    (peak, peak_bytes), *others = moments
    out.print(
        f"  the peak comes with {peak} ({format_bytes(peak_bytes)});"
        f" at other moments, in its place: {named_bytes(dict(others)) or 'less'}"
    )
    if memory.host:
        out.print(f"  on the host: {format_bytes(memory.host)}")
    _show_one_nic(out, costs, estimate.point)


def _show_one_nic(out: Console, costs: CostModel, point: Point) -> None:
    """That an assumption of one cluster's moves this point's time, by more than a percent."""
    if costs.job.assumptions.one_nic_per_partial_node:
        without = costs.with_assumption("one_nic_per_partial_node", 0.0).seconds(point)
        less = 1 - without / costs.seconds(point)
        if less > 0.01:
            out.print(
                "  groups with a part of a node's GPUs are taken to have one network card"
                f" (one_nic_per_partial_node, seen on one cluster): without that, {less:.0%} less time"
            )


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


def _would_change(costs: CostModel, best: Sequence[StepEstimate], pins: Pins) -> list[str]:
    """Assumptions that change the winner, and those that its time rests on most."""
    found = sensitivities(costs, best, pins)
    if len(best) == 1:  # no verdict: no other mesh fits, or all of it is pinned
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
