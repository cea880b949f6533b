"""What `seqmesh plan --kernel` prints: a line for each split of one attention."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.units import format_seconds, format_tokens
from seqmesh.planner.one_attention import Split
from seqmesh.planner.output.console import link_bytes, link_name, plain_table

COLUMNS = (
    "uly",
    "ring",
    "layout",
    "iterations/s",
    "time",
    "kernel",
    "merge",
    "heads exchange",
    "of it exposed",
    "rows exchange",
    "of it exposed",
    "sent per GPU",
    "limited by",
)


def show_splits(out: Console, job: Job, splits: Sequence[Split]) -> None:
    """The table of splits, in the order given."""
    c = job.cluster
    m = job.model
    out.print(
        f"one attention forward: {m.heads} query heads, {m.kv_heads} K/V heads, head dim {m.head_dim},"
        f" {format_tokens(job.seq_len)} tokens, batch {job.global_batch},"
        f" on {c.nodes} x {c.gpus_per_node} {escape(c.gpu.name)}; predicted, not measured\n"
    )
    table = plain_table()
    for title in COLUMNS:
        table.add_column(title, justify="right")
    for split in splits:
        table.add_row(*_cells(split))
    out.print(table)


def _cells(split: Split) -> list[str]:
    parts = split.parts
    times = (
        split.seconds,
        parts.kernel_s,
        parts.merge_s,
        parts.heads_s,
        parts.heads_exposed_s,
        parts.rows_s,
        parts.rows_exposed_s,
    )
    return [
        str(split.ulysses),
        str(split.ring),
        split.layout,
        f"{1 / split.seconds:.2f}",
        *map(format_seconds, times),
        ", ".join(link_bytes(split.bytes_sent)) or "-",
        link_name(split.bound_by),
    ]
