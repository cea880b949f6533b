"""The paper's measured tables beside what the planner predicts for the same set-ups.

`seqmesh plan --published` prints them.

For each table: the rank correlation (Spearman) of predicted and published speeds; and the mean error of the
absolute figures after ONE constant is fitted on every other row, on those rows and on the rest. The paper's
own system is priced, not seqmesh's (`PaperStack`). Nothing is fitted for a row; what was chosen with a table
in view is named in inputs/assumptions.py.

Source: USP (Fang & Zhao 2024, arXiv 2405.07719), Tables 3, 5, 6 and the 208K row: usp.toml.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import correlation, fmean
from typing import Final

from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.stack import PaperStack
from seqmesh.planner.inputs.tables import read_toml
from seqmesh.planner.inputs.units import format_tokens
from seqmesh.planner.one_attention import attention_model, splits
from seqmesh.planner.paper.held_out import HERE, HeldOutRow


class TrainingRow(HeldOutRow):
    """A training step that the paper reports: its speed, or that it ran out of memory."""

    @property
    def setup(self) -> str:
        """Tokens, sequences and mesh."""
        p = self.point
        mesh = f"tp{p.tp} u{p.ulysses} r{p.ring} dp{p.dp}"
        return f"{format_tokens(self.seq_len)} batch {self.batch}, {mesh}"

    @property
    def fitted(self) -> bool:
        """Whether it fitted, in the paper."""
        return self.tflops is not None


_TABLES: Final = read_toml(HERE / "usp.toml")
TRAINING: Final = {
    name: tuple(TrainingRow.read(run, name="", gpu="a800-sxm", stack="paper") for run in runs)
    for name, runs in _TABLES["training"].items()
}
"""Training steps by table: "table_5", "table_6", "headline", "out_of_memory"."""
HEADLINE: Final = TRAINING["headline"][0]


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A row of a table against the planner."""

    setup: str
    published: float
    predicted: float
    """Without any fitted constant."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A table against the planner."""

    name: str
    unit: str
    rows: tuple[PublishedRow, ...]

    @property
    def spearman(self) -> float:
        """Rank correlation of published and predicted."""
        return spearman([row.published for row in self.rows], [row.predicted for row in self.rows])

    @property
    def constant(self) -> float:
        """Published over predicted, the geometric mean over every other row."""
        return exp(fmean(log(row.published / row.predicted) for row in self.rows[::2]))

    def errors(self) -> tuple[float, float]:
        """Mean error after the constant: of the rows that it was fitted on, and of the others."""
        errors = [abs(self.constant * row.predicted / row.published - 1) for row in self.rows]
        return fmean(errors[::2]), fmean(errors[1::2])


def agreements() -> list[Agreement]:
    """Every table, Table 3 by length and ring, and Table 6 with and without its unexplained rows."""
    rings = [_attended(**ring) for ring in _TABLES["table_3"]]
    entries = tuple(entry for ring in rings for entry in ring.rows)
    explained = [row for row in TRAINING["table_6"] if row.point.tp != 2]
    return [
        *rings,
        Agreement(name="Table 3, all", unit=rings[0].unit, rows=entries),
        _trained("Table 5", TRAINING["table_5"]),
        _trained("Table 6 without tp = 2", explained),
        _trained("Table 6, all", TRAINING["table_6"]),
    ]


def _attended(name: str, seq_len: int, layout: str, per_second: dict[str, float]) -> Agreement:
    """Entries of Table 3 for one length and ring: iterations per second by the degree of ulysses."""
    job = Job(
        model=attention_model(32, 8, 128),
        cluster=Cluster(gpu=load_gpu("l20"), nodes=1, gpus_per_node=8),
        seq_len=seq_len,
        layout=layout,
        stack=PaperStack(),
    )
    compared = []
    for ulysses, published in per_second.items():
        (split,) = splits(job, {"ulysses": int(ulysses)})
        setup = f"{format_tokens(seq_len)}, u{split.ulysses} r{split.ring}, {layout}"
        compared.append(PublishedRow(setup=setup, published=published, predicted=1 / split.seconds))
    return Agreement(name=name, unit="iterations/s", rows=tuple(compared))


def _trained(name: str, rows: Sequence[TrainingRow]) -> Agreement:
    compared = [
        PublishedRow(setup=row.setup, published=row.tflops, predicted=row.estimate.tflops_per_gpu)
        for row in rows
        if row.tflops is not None
    ]
    return Agreement(name=name, unit="TFLOP/s per GPU", rows=tuple(compared))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""
    return correlation(_ranks(a), _ranks(b))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def memory_outcomes() -> list[TrainingRow]:
    """Everything that the paper reports of a training step: it fitted, or it did not."""
    return [row for rows in TRAINING.values() for row in rows]


def render() -> str:
    """Everything, as text."""
    lines: list[str] = []
    for table in agreements():
        lines += _agreement_lines(table)
    headline = HEADLINE.estimate
    predicted = f"predicted {headline.tflops_per_gpu:.2f} ({headline.mfu_causal:.3f})"
    lines.append(f"208K headline, tp8 r2: published {HEADLINE.tflops} TFLOP/s (MFU 0.47), {predicted}")
    capacity = load_gpu("a800-sxm").memory_bytes / 1e9
    lines.append(f"fit or out of memory, of {capacity:.1f} GB:")
    lines += [_outcome_line(outcome) for outcome in memory_outcomes()]
    return "\n".join(lines)


def _agreement_lines(table: Agreement) -> Iterator[str]:
    fitted, checked = table.errors()
    yield (
        f"{table.name}: Spearman {table.spearman:.2f};"
        f" one constant {table.constant:.3f} fitted on every other row,"
    )
    yield f"  mean error {fitted:.1%} on those, {checked:.1%} on the others ({table.unit})"
    # Table 3 by length and ring has the same rows as the whole of it.
    if table.name.startswith("Table 3, ") and not table.name.endswith("all"):
        return
    for row in table.rows:
        off = table.constant * row.predicted / row.published - 1
        yield (
            f"    {row.setup:40} published {row.published:7.2f}   predicted {row.predicted:7.2f}"
            f"   with the constant {off:+.1%}"
        )


def _outcome_line(outcome: TrainingRow) -> str:
    verdict = "agrees" if outcome.estimate.fits == outcome.fitted else "DISAGREES"
    reported = "fitted" if outcome.fitted else "out of memory"
    size = outcome.estimate.memory.total / 1e9
    return f"    {outcome.setup:40} {reported:14} predicted {size:6.1f} GB: {verdict}"
