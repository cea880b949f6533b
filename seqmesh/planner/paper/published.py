"""The paper's measured tables beside what the planner predicts for the same set-ups.

`seqmesh plan --published` prints them.

For each table: the rank correlation (Spearman) of predicted and published speeds; and the mean error of the
absolute figures after ONE constant is fitted on every other row, on those rows and on the rest. The paper's
own system is priced, not seqmesh's (`PaperStack`). Nothing is fitted for a row; what was chosen with a table
in view is named in inputs/assumptions.py.

Source: USP (Fang & Zhao 2024, arXiv 2405.07719), Tables 3, 5, 6 and the 208K row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import fmean

from seqmesh.planner.cost.estimate import StepEstimate
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.stack import PaperStack
from seqmesh.planner.one_attention import attention_model, splits

K = 1024


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """A row of Tables 5 and 6: a training step."""

    model: str
    nodes: int
    seq_len: int
    global_batch: int
    tp: int
    ulysses: int
    ring: int
    dp: int = 1
    tflops: float | None = None
    """Published TFLOP/s per GPU; None: out of memory."""
    explained: bool = True
    """False for the tp = 2 rows of Table 6, which the paper leaves unexplained."""

    def __str__(self) -> str:
        mesh = f"tp{self.tp} u{self.ulysses} r{self.ring} dp{self.dp}"
        return f"{self.seq_len // K}K batch {self.global_batch}, {mesh}"


def _five(
    seq_len: int, batch: int, tp: int, ulysses: int, ring: int, dp: int, tflops: float | None
) -> TrainingRow:
    return TrainingRow(
        model="llama2-7b",
        nodes=1,
        seq_len=seq_len,
        global_batch=batch,
        tp=tp,
        ulysses=ulysses,
        ring=ring,
        dp=dp,
        tflops=tflops,
    )


def _six(
    tp: int, ulysses: int, ring: int, tflops: float | None, *, dp: int = 1, seq_len: int = 64 * K
) -> TrainingRow:
    return TrainingRow(
        model="llama3-8b",
        nodes=2,
        seq_len=seq_len,
        global_batch=dp,
        tp=tp,
        ulysses=ulysses,
        ring=ring,
        dp=dp,
        tflops=tflops,
        explained=tp != 2,
    )


TABLE_5 = (  # tokens, batch, tp, ulysses, ring, dp, TFLOP/s
    _five(64 * K, 1, 4, 2, 1, 1, 154.49),
    _five(64 * K, 1, 4, 1, 2, 1, 151.40),
    _five(64 * K, 1, 8, 1, 1, 1, 141.85),
    _five(30 * K, 16, 1, 8, 1, 1, 163.42),
    _five(30 * K, 16, 2, 4, 1, 1, 155.98),
    _five(30 * K, 16, 4, 1, 1, 2, 150.05),
    _five(30 * K, 16, 2, 1, 4, 1, 147.77),
    _five(30 * K, 16, 1, 1, 8, 1, 142.16),
    _five(30 * K, 16, 8, 1, 1, 1, 129.12),
)
TABLE_6 = (  # tp, ulysses, ring, TFLOP/s
    _six(1, 8, 2, 136.31),
    _six(1, 4, 4, 137.48),
    _six(1, 2, 8, 129.44),
    _six(1, 1, 16, 121.83),
    _six(8, 1, 2, 129.75),
    _six(4, 2, 2, 122.45),
    _six(2, 4, 2, 87.67),
    _six(2, 2, 4, 89.35),
    _six(4, 1, 4, 122.57),
    _six(2, 1, 8, 101.35),
    _six(8, 1, 1, 141.20, dp=2),
)
HEADLINE = _six(8, 1, 2, 147.26, seq_len=208 * K)
OUT_OF_MEMORY = (
    *(_five(64 * K, 1, 1, ulysses, 8 // ulysses, 1, None) for ulysses in (8, 4, 2, 1)),
    *(_six(1, ulysses, 8 // ulysses, None, dp=2) for ulysses in (8, 4, 2, 1)),
)


@dataclass(frozen=True, kw_only=True)
class AttentionRow:
    """An entry of Table 3: iterations per second of one attention forward on 8 L20."""

    seq_len: int
    ulysses: int
    layout: str
    """contiguous is the paper's basic ring, zigzag its load-balanced one."""
    per_second: float

    def __str__(self) -> str:
        return f"{self.seq_len // K}K, u{self.ulysses} r{8 // self.ulysses}, {self.layout}"


_SPLITS = (8, 4, 2, 1)
"""Ulysses degrees of Table 3's columns."""
_BASIC = {
    8: (57.3, 153.1, 415.5, 358.6),
    32: (15.2, 28.6, 44.3, 40.5),
    128: (2.56, 3.22, 3.40, 3.13),
}
_BALANCED = {
    8: (57.1, 152.2, 454.9, 362.0),
    32: (14.3, 32.8, 62.8, 58.4),
    128: (2.59, 4.24, 5.48, 5.19),
}
"""Iterations per second by length in K tokens."""


def _table_3() -> Iterator[AttentionRow]:
    for length in _BASIC:
        for layout, measured in (("contiguous", _BASIC), ("zigzag", _BALANCED)):
            for ulysses, per_second in zip(_SPLITS, measured[length], strict=True):
                yield AttentionRow(seq_len=length * K, ulysses=ulysses, layout=layout, per_second=per_second)


TABLE_3 = tuple(_table_3())


def estimate_row(row: TrainingRow) -> StepEstimate:
    """The planner's estimate of a row, with ZeRO-1 and no recomputation, as in the paper."""
    gpu = load_gpu("a800-sxm")
    job = Job(
        model=load_model(row.model),
        cluster=Cluster(gpu=gpu, nodes=row.nodes, gpus_per_node=8),
        seq_len=row.seq_len,
        global_batch=row.global_batch,
        stack=PaperStack(),
    )
    return CostModel(job).estimate(Point(tp=row.tp, ulysses=row.ulysses, ring=row.ring, dp=row.dp, zero=1))


def predict_attention(row: AttentionRow) -> float:
    """Iterations per second of an entry of Table 3."""
    gpu = load_gpu("l20")
    job = Job(
        model=attention_model(32, 8, 128),
        cluster=Cluster(gpu=gpu, nodes=1, gpus_per_node=8),
        seq_len=row.seq_len,
        layout=row.layout,
        stack=PaperStack(),
    )
    return 1 / splits(job, {"ulysses": row.ulysses})[0].seconds


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
    found = []
    for length in _BASIC:
        for layout, ring in (("contiguous", "basic"), ("zigzag", "load-balanced")):
            rows = [row for row in TABLE_3 if row.seq_len == length * K and row.layout == layout]
            found.append(_attended(f"Table 3, {length}K, {ring} ring", rows))
    found.append(_attended("Table 3, all", TABLE_3))
    found.append(_trained("Table 5", TABLE_5))
    found.append(_trained("Table 6 without tp = 2", [row for row in TABLE_6 if row.explained]))
    found.append(_trained("Table 6, all", TABLE_6))
    return found


def _attended(name: str, rows: Sequence[AttentionRow]) -> Agreement:
    compared = [
        PublishedRow(setup=str(row), published=row.per_second, predicted=predict_attention(row))
        for row in rows
    ]
    return Agreement(name=name, unit="iterations/s", rows=tuple(compared))


def _trained(name: str, rows: Sequence[TrainingRow]) -> Agreement:
    compared = []
    for row in rows:
        if row.tflops is not None:
            predicted = estimate_row(row).tflops_per_gpu
            compared.append(PublishedRow(setup=str(row), published=row.tflops, predicted=predicted))
    return Agreement(name=name, unit="TFLOP/s per GPU", rows=tuple(compared))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""
    x, y = _ranks(a), _ranks(b)
    mean_x, mean_y = fmean(x), fmean(y)
    covariance = sum((p - mean_x) * (q - mean_y) for p, q in zip(x, y, strict=True))
    spread = sum((p - mean_x) ** 2 for p in x) * sum((q - mean_y) ** 2 for q in y)
    return covariance / spread**0.5 if spread else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A set-up that the paper reports, with what the planner says of its memory."""

    setup: str
    fitted: bool
    """Whether it fitted, in the paper."""
    estimate: StepEstimate


def memory_outcomes() -> list[Outcome]:
    """Everything that the paper reports."""
    rows = (*TABLE_5, *TABLE_6, HEADLINE, *OUT_OF_MEMORY)
    return [
        Outcome(setup=str(row), fitted=row.tflops is not None, estimate=estimate_row(row)) for row in rows
    ]


def render() -> str:
    """Everything, as text."""
    lines: list[str] = []
    for table in agreements():
        lines += _agreement_lines(table)
    headline = estimate_row(HEADLINE)
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


def _outcome_line(outcome: Outcome) -> str:
    verdict = "agrees" if outcome.estimate.fits == outcome.fitted else "DISAGREES"
    reported = "fitted" if outcome.fitted else "out of memory"
    size = outcome.estimate.memory.total / 1e9
    return f"    {outcome.setup:40} {reported:14} predicted {size:6.1f} GB: {verdict}"
