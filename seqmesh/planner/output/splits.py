"""What `seqmesh plan --kernel` prints: a line for each split of one attention."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape

from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.units import format_seconds, format_tokens
from seqmesh.planner.one_attention import Split
from seqmesh.planner.output.console import link_bytes, link_name, plain_table

COLUMNS: Sequence[tuple[str, Callable[[Split], str]]] = (
    ("uly", lambda one: str(one.ulysses)),
    ("ring", lambda one: str(one.ring)),
    ("layout", lambda one: one.layout),
    ("iterations/s", lambda one: f"{1 / one.seconds:.2f}"),
    ("time", lambda one: format_seconds(one.seconds)),
    ("kernel", lambda one: format_seconds(one.parts.kernel_s)),
    ("merge", lambda one: format_seconds(one.parts.merge_s)),
    ("heads exchange", lambda one: format_seconds(one.parts.heads_s)),
    ("of it exposed", lambda one: format_seconds(one.parts.heads_exposed_s)),
    ("rows exchange", lambda one: format_seconds(one.parts.rows_s)),
    ("of it exposed", lambda one: format_seconds(one.parts.rows_exposed_s)),
    ("sent per GPU", lambda one: ", ".join(link_bytes(one.bytes_sent)) or "-"),
    ("limited by", lambda one: link_name(one.bound_by)),
)
"""Titles, and what stands below them."""


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
    for title, _ in COLUMNS:
        table.add_column(title, justify="right")
    for split in splits:
        table.add_row(*(cell(split) for _, cell in COLUMNS))
    out.print(table)
