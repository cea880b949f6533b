"""What `seqmesh plan` prints: the best few, why, why not the next, and what the answer rests on."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seqmesh.planner.cost.estimate import Price
from seqmesh.planner.cost.step import Pricer
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.units import (
    about_tokens,
    format_bytes,
    format_count,
    format_seconds,
    format_tokens,
)
from seqmesh.planner.one_attention import Split
from seqmesh.planner.reasons import Rests, reasons, rests_on, why_not
from seqmesh.planner.search import Found, Pins

WIDTH = 150
"""Columns where the output is not a terminal."""
MOST_RESTS = 5


def console() -> Console:
    """Standard output: as wide as the terminal, or WIDTH in a pipe."""
    plain = Console(highlight=False, soft_wrap=False)
    return plain if plain.is_terminal else Console(highlight=False, width=WIDTH)


def show_found(out: Console, pricer: Pricer, found: Found, pins: Pins, top: int) -> None:
    """The answer to a search: `top` of what was found; all of it competes in what would change the answer."""
    _heading(out, pricer.job)
    out.print(
        f"{found.meshes} legal meshes compared; one line for each of the best. Times are predicted, not measured.\n"
    )
    shown = (*found.best[:top], *found.misfits[:top])
    out.print(candidates_table(shown))
    if not found.best:
        return
    best = found.best[0]
    show_memory(out, pricer, best)
    _list(out, "Why this one (the practices are listed in docs/planner.md)", reasons(pricer, best, pins))
    _list(out, "Why not the next", [why_not(best, other) for other in found.best[1:3]])
    _list(out, "What would change the answer", would_change(pricer, found.best, pins))


def show_one(out: Console, pricer: Pricer, price: Price, pins: Pins) -> None:
    """One point in full: `--explain`."""
    _heading(out, pricer.job)
    out.print()
    out.print(candidates_table([price]))
    show_memory(out, pricer, price)
    _show_time(out, price)
    _show_bytes(out, price)
    _list(out, "Why", reasons(pricer, price, pins))
    _list(out, "What it rests on", would_change(pricer, [price], asdict(price.point)))
    show_assumptions(out, pricer.job)


def _heading(out: Console, job: Job) -> None:
    c, m = job.cluster, job.model
    batch = f"global batch {job.global_batch}"
    packed = (
        f", {len(job.documents)} packed document{'s' if len(job.documents) > 1 else ''}"
        if job.documents
        else ""
    )
    state = "measured profile" if c.gpu.measured else "rates by data sheet, unmeasured"
    out.print(
        f"[bold]{escape(m.name)}[/] ({format_count(m.parameters)} parameters), {about_tokens(job.seq_len)} tokens{packed}, {batch},"
        f" on {c.nodes} x {c.gpus_per_node} {escape(c.gpu.name)} ({format_bytes(job.capacity)} each; {state})"
    )


def candidates_table(prices: Sequence[Price]) -> Table:
    """One line a point."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "tp", "uly", "ring", "dp", "pp", "zero", "savers"):
        table.add_column(title, no_wrap=True)
    for title in (
        "step\n(lower - upper)",
        "tokens/s",
        "TFLOP/s\nper GPU",
        "MFU\ncausal\n(non-causal)",
        "memory",
        "sent per GPU\nand step",
        "limited\nby",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for number, price in enumerate(prices, 1):
        p = price.point
        savers = [
            f"{key} {value}"
            for key in ("checkpointing", "offload", "tiling")
            if (value := getattr(p, key)) != "none"
        ]
        savers += [f"micro-batch {p.micro_batch}"] if p.micro_batch > 1 else []
        sent = "\n".join(
            f"{link.replace('_', '-')} {format_bytes(size)}" for link, size in price.bytes_per_step.items()
        )
        table.add_row(
            str(number),
            *map(str, (p.tp, p.ulysses, p.ring, p.dp, p.pp, p.zero)),
            "\n".join(savers) or "-",
            f"{format_seconds(price.seconds)}\n({format_seconds(price.lower)} - {format_seconds(price.upper)})",
            f"{price.tokens_per_second:,.0f}",
            f"{price.tflops_per_gpu:.3g}" if price.tflops_per_gpu < 10 else f"{price.tflops_per_gpu:.1f}",
            f"{price.mfu_causal:.1%}\n({price.mfu_noncausal:.1%})",
            format_bytes(price.memory.total) + ("" if price.fits else "\nDOES NOT FIT"),
            sent or "-",
            price.bound_by.replace("_", "-"),
        )
    return table


def show_memory(out: Console, pricer: Pricer, price: Price) -> None:
    """Memory at the peak by category."""
    out.print(
        f"\n[bold]Memory of a rank at the peak[/]: {format_bytes(price.memory.total)} of {format_bytes(pricer.job.capacity)}"
    )
    parts = [
        f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in price.memory.categories.items()
    ]
    out.print("  " + ", ".join(parts))
    taken, *others = sorted(price.memory.moments.items(), key=lambda moment: -moment[1])
    lesser = ", ".join(f"{name} {format_bytes(size)}" for name, size in others if size)
    out.print(
        f"  the peak comes with {taken[0]} ({format_bytes(taken[1])}); at other moments, in its place: {lesser or 'less'}"
    )
    if price.memory.host:
        out.print(f"  on the host: {format_bytes(price.memory.host)}")


def _show_time(out: Console, price: Price) -> None:
    out.print("\n[bold]Time of a step[/]")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("  piece", "cause"):
        table.add_column(title)
    for title in ("alone", "adds", "share"):
        table.add_column(title, justify="right")
    for piece in sorted(price.pieces, key=lambda piece: -piece.exposed):
        row = (
            format_seconds(piece.seconds),
            format_seconds(piece.exposed),
            f"{piece.exposed / price.seconds:.1%}",
        )
        table.add_row(f"  {piece.name}", piece.cause.replace("_", "-"), *row)
    out.print(table)


def _show_bytes(out: Console, price: Price) -> None:
    parts = [f"{link.replace('_', '-')} {format_bytes(size)}" for link, size in price.bytes_per_step.items()]
    out.print(f"\n[bold]Bytes that a GPU sends in a step, on average[/]: {', '.join(parts) or 'none'}")


def show_assumptions(out: Console, job: Job) -> None:
    """Every constant with its source."""
    out.print(
        "\n[bold]Constants[/] (override with --assume name=value, or a measured profile with --profile)"
    )
    out.print(f"  {job.cluster.gpu.name}: {job.cluster.gpu.source or 'no source given'}", markup=False)
    given = job.cluster.gpu.overrides
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value, unit, source in job.assumptions.explain():
        note = escape(f"of {job.cluster.gpu.name}'s file; else {source}" if name in given else source)
        table.add_row(f"  {name}", f"{value:g} {unit}".strip(), note)
    out.print(table)


def would_change(pricer: Pricer, best: Sequence[Price], pins: Pins) -> list[str]:
    """Assumptions that change the winner, and those that its time rests on most."""
    rests = rests_on(pricer, best, pins)
    flips = [f"{_rest(one)}" for one in rests if one.flips]
    strongest = [_rest(one) for one in rests if not one.flips][:MOST_RESTS]
    if len(best) == 1:
        return [_rest(one) for one in rests][:MOST_RESTS]
    verdict = (
        "the winner changes with:"
        if flips
        else "no assumption that was moved changes the winner; its time rests most on:"
    )
    return [verdict, *flips, *(["its time rests most on:"] if flips and strongest else []), *strongest]


def _rest(one: Rests) -> str:
    cases = (
        f"{value:.3g}: step {change:+.1%}" + (f", {winner} wins" if winner else "")
        for value, change, winner in one.cases
    )
    return f"{one.name} {'; '.join(cases)}"


def _list(out: Console, title: str, lines: Sequence[str]) -> None:
    if lines:
        out.print(f"\n[bold]{title}[/]")
        for line in lines:
            out.print(f"  - {line}", markup=False)


def show_traced(out: Console, job: Job, result: Mapping[str, Any]) -> None:
    """Traced memory beside predicted: `--trace-memory`."""
    traced, predicted = dict(result["traced_bytes"]), result["predicted_bytes"]
    out.print(
        f"one rank's peak in a step of seqmesh train as it stands (fp32, weights replicated): {escape(job.model.name)},"
        f" {format_tokens(job.seq_len)} tokens, ulysses {result['ulysses']} x ring {result['ring']}\n"
    )
    peak, phase = traced.pop("peak_bytes"), traced.pop("peak_phase")
    phases = {
        name.removesuffix("_peak_bytes"): traced.pop(name)
        for name in list(traced)
        if name.endswith("_peak_bytes")
    }
    out.print(f"traced     {format_bytes(peak)} in the {phase}: {_sizes(traced)}")
    out.print(f"           peaks of the phases: {_sizes(phases)}")
    out.print(
        f"predicted  {format_bytes(predicted['total'])}: {_sizes({k: v for k, v in predicted.items() if k != 'total'})}"
    )
    out.print(f"predicted / traced  {result['predicted_over_traced']:.3f}")


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in sizes.items() if size)


def show_splits(out: Console, job: Job, splits: Sequence[Split]) -> None:
    """The table of `--kernel`."""
    c, m = job.cluster, job.model
    out.print(
        f"one attention forward: {m.heads} query heads, {m.kv_heads} K/V heads, head dim {m.head_dim}, {format_tokens(job.seq_len)} tokens,"
        f" batch {job.global_batch}, on {c.nodes} x {c.gpus_per_node} {escape(c.gpu.name)}; predicted, not measured\n"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = (
        "uly",
        "ring",
        "layout",
        "iterations/s",
        "time",
        "kernel",
        "merge",
        "heads exchange",
        "rows exchange",
        "of it exposed",
    )
    for title in (*columns, "sent per GPU", "limited by"):
        table.add_column(title, justify="right")
    for split in splits:
        times = (
            split.seconds,
            split.parts.kernel,
            split.parts.merge,
            split.parts.heads,
            split.parts.rows,
            split.parts.rows_exposed,
        )
        sent = ", ".join(
            f"{link.replace('_', '-')} {format_bytes(size)}" for link, size in split.bytes_sent.items()
        )
        table.add_row(
            *map(str, (split.ulysses, split.ring, split.layout)),
            f"{1 / split.seconds:.2f}",
            *map(format_seconds, times),
            sent or "-",
            split.bound_by.replace("_", "-"),
        )
    out.print(table)
