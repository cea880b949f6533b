"""The paper's measured tables beside what the planner predicts for the same set-ups: `seqmesh plan
--published`.

For each table: the rank correlation (Spearman) of predicted and published speeds; and the mean error of the
absolute figures after ONE constant is fitted on every other row, on those rows and on the rest. Nothing is
fitted for a row; what was chosen with a table in view is named in assumptions.py.

Source: PAPER.md (USP, arXiv 2405.07719), Tables 3, 5, 6 and the 208K row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import fmean

from seqmesh.planner.cost.estimate import Price
from seqmesh.planner.cost.step import Pricer
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job, Point
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.request import assumptions_for
from seqmesh.planner.one_attention import attention_model, splits

K = 1024


@dataclass(frozen=True, kw_only=True)
class Trained:
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
        return f"{self.seq_len // K}K batch {self.global_batch}, tp{self.tp} u{self.ulysses} r{self.ring} dp{self.dp}"


def _five(
    seq_len: int, batch: int, tp: int, ulysses: int, ring: int, dp: int, tflops: float | None
) -> Trained:
    return Trained(
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
) -> Trained:
    return Trained(
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


TABLE_5 = (
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
TABLE_6 = (
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
class Attended:
    """An entry of Table 3: iterations per second of one attention forward on 8 L20."""

    seq_len: int
    ulysses: int
    layout: str
    """contiguous is the paper's basic ring, zigzag its load-balanced one."""
    per_second: float

    def __str__(self) -> str:
        return f"{self.seq_len // K}K, u{self.ulysses} r{8 // self.ulysses}, {self.layout}"


_THREE = {  # (basic, load-balanced) for u = 8, 4, 2, 1
    8: ((57.3, 57.1), (153.1, 152.2), (415.5, 454.9), (358.6, 362.0)),
    32: ((15.2, 14.3), (28.6, 32.8), (44.3, 62.8), (40.5, 58.4)),
    128: ((2.56, 2.59), (3.22, 4.24), (3.40, 5.48), (3.13, 5.19)),
}
TABLE_3 = tuple(
    Attended(seq_len=length * K, ulysses=ulysses, layout=layout, per_second=pair[column])
    for length, row in _THREE.items()
    for column, layout in enumerate(("contiguous", "zigzag"))
    for ulysses, pair in zip((8, 4, 2, 1), row, strict=True)
)


def price_row(row: Trained) -> Price:
    """The planner's price of a row, with ZeRO-1 and no recomputation, as in the paper."""
    gpu = load_gpu("a800-sxm")
    job = Job(
        model=load_model(row.model),
        cluster=Cluster(gpu=gpu, nodes=row.nodes, gpus_per_node=8),
        seq_len=row.seq_len,
        global_batch=row.global_batch,
        assumptions=assumptions_for(gpu, ()),
    )
    return Pricer(job).price(Point(tp=row.tp, ulysses=row.ulysses, ring=row.ring, dp=row.dp, zero=1))


def predict_attention(row: Attended) -> float:
    """Iterations per second of an entry of Table 3."""
    gpu = load_gpu("l20")
    job = Job(
        model=attention_model(32, 8, 128),
        cluster=Cluster(gpu=gpu, nodes=1, gpus_per_node=8),
        seq_len=row.seq_len,
        layout=row.layout,
        assumptions=assumptions_for(gpu, ()),
    )
    return 1 / splits(job, {"ulysses": row.ulysses})[0].seconds


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A table against the planner."""

    name: str
    unit: str
    rows: tuple[tuple[str, float, float], ...]
    """(set-up, published, predicted without any fitted constant)."""

    @property
    def spearman(self) -> float:
        """Rank correlation of published and predicted."""
        return spearman([row[1] for row in self.rows], [row[2] for row in self.rows])

    @property
    def constant(self) -> float:
        """Published over predicted, the geometric mean over every other row."""
        return exp(fmean(log(published / predicted) for _, published, predicted in self.rows[::2]))

    def errors(self) -> tuple[float, float]:
        """Mean error after the constant: of the rows that it was fitted on, and of the others."""
        errors = [abs(self.constant * predicted / published - 1) for _, published, predicted in self.rows]
        return fmean(errors[::2]), fmean(errors[1::2])


def agreements() -> list[Agreement]:
    """Every table, Table 3 by length and ring, and Table 6 with and without its unexplained rows."""
    found = []
    for length in _THREE:
        for layout, ring in (("contiguous", "basic"), ("zigzag", "load-balanced")):
            rows = [row for row in TABLE_3 if row.seq_len == length * K and row.layout == layout]
            found.append(_attended(f"Table 3, {length}K, {ring} ring", rows))
    found.append(_attended("Table 3, all", TABLE_3))
    found.append(_trained("Table 5", TABLE_5))
    found.append(_trained("Table 6 without tp = 2", [row for row in TABLE_6 if row.explained]))
    found.append(_trained("Table 6, all", TABLE_6))
    return found


def _attended(name: str, rows: Sequence[Attended]) -> Agreement:
    return Agreement(
        name=name,
        unit="iterations/s",
        rows=tuple((str(row), row.per_second, predict_attention(row)) for row in rows),
    )


def _trained(name: str, rows: Sequence[Trained]) -> Agreement:
    measured = [(row, row.tflops) for row in rows if row.tflops is not None]
    return Agreement(
        name=name,
        unit="TFLOP/s per GPU",
        rows=tuple((str(row), tflops, price_row(row).tflops_per_gpu) for row, tflops in measured),
    )


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


def memory_outcomes() -> list[tuple[str, bool, Price]]:
    """(set-up, whether it fitted, the planner's price) of everything that the paper reports."""
    rows = (*TABLE_5, *TABLE_6, HEADLINE, *OUT_OF_MEMORY)
    return [(str(row), row.tflops is not None, price_row(row)) for row in rows]


def render() -> str:
    """Everything, as text."""
    lines = []
    for table in agreements():
        fitted, checked = table.errors()
        lines.append(
            f"{table.name}: Spearman {table.spearman:.2f}; one constant {table.constant:.3f} fitted on every other row,"
        )
        lines.append(f"  mean error {fitted:.1%} on those, {checked:.1%} on the others ({table.unit})")
        if not table.name.startswith("Table 3, ") or table.name.endswith("all"):
            lines += [_line(table, *row) for row in table.rows]
    headline = price_row(HEADLINE)
    predicted = f"predicted {headline.tflops_per_gpu:.2f} ({headline.mfu_causal:.3f})"
    lines.append(f"208K headline, tp8 r2: published {HEADLINE.tflops} TFLOP/s (MFU 0.47), {predicted}")
    capacity = load_gpu("a800-sxm").memory_bytes / 1e9
    lines.append(f"fit or out of memory, of {capacity:.1f} GB:")
    for setup, fitted_there, price in memory_outcomes():
        verdict = "agrees" if price.fits == fitted_there else "DISAGREES"
        outcome = "fitted" if fitted_there else "out of memory"
        lines.append(f"    {setup:40} {outcome:14} predicted {price.memory.total / 1e9:6.1f} GB: {verdict}")
    return "\n".join(lines)


def _line(table: Agreement, setup: str, published: float, predicted: float) -> str:
    off = table.constant * predicted / published - 1
    return f"    {setup:40} published {published:7.2f}   predicted {predicted:7.2f}   with the constant {off:+.1%}"
