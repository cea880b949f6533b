"""Published runs of other programs beside what the planner predicts: what it was not built on.

    runs.toml    the runs, each with its source: seen while the planner was built; dense models; mixtures
    here         their speed and memory with default assumptions, and the errors by GPU and by length

`seqmesh plan --published` prints them after the paper's tables. Nothing is fitted, neither to a row nor to a
table; what had been seen when a constant was chosen is in docs/planner_results.md.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final, Self

from seqmesh.planner.cost.estimate import StepEstimate
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.stack import stack_named
from seqmesh.planner.inputs.tables import read_toml
from seqmesh.planner.inputs.units import format_tokens

HERE: Final = Path(__file__).parent
GIB = 2**30
MEAN_GOAL, LARGEST_GOAL, MEMORY_GOAL = 0.15, 0.35, 0.15
"""Goals: of speeds on average, of any speed, and of memory on average."""
TITLES: Final = {
    "seen": "Held out: published runs of other programs, default assumptions, nothing fitted",
    "dense": "Not seen before: NVIDIA's runs of dense models",
    "mixtures": "Not seen before: NVIDIA's runs of mixtures of experts, with even routers",
}
"""Of the tables of runs.toml."""


@dataclass(frozen=True, kw_only=True)
class HeldOutRow:
    """A published run."""

    name: str
    model: str
    gpu: str
    gpus: int
    each: int = 8
    """GPUs of a node."""
    seq_len: int
    batch: int
    """Sequences of a step."""
    point: Point
    stack: str
    precision: str | None = None
    tokens_per_s: float | None = None
    """Of one GPU."""
    step_s: float | None = None
    tflops: float | None = None
    """TFLOP/s of one GPU."""
    memory_gib: float | None = None
    """The allocator's peak."""

    @property
    def published(self) -> float:
        """Tokens/s of one GPU, whichever way the speed was published."""
        tokens = self.seq_len * self.batch / self.gpus
        if self.tokens_per_s is not None:
            return self.tokens_per_s
        if self.step_s is not None:
            return tokens / self.step_s
        assert self.tflops is not None
        return tokens * self.tflops * 1e12 * self.gpus / self.estimate.flops

    @property
    def estimate(self) -> StepEstimate:
        """What the planner says of it."""
        return _estimate(self)

    @property
    def error(self) -> float:
        """Of the predicted speed, as a share of the published one."""
        return self.estimate.tokens_per_second / self.gpus / self.published - 1

    @property
    def memory_error(self) -> float | None:
        """The same of the memory that PyTorch's allocator holds."""
        if self.memory_gib is None:
            return None
        return self.allocated_gib / self.memory_gib - 1

    @property
    def allocated_gib(self) -> float:
        """What of the predicted memory the allocator reserves."""
        memory = self.estimate.memory
        return (memory.total - memory.categories["overhead"]) / GIB

    @classmethod
    def read(cls, run: Mapping[str, Any], **alike: Any) -> Self:
        """A run of a file, with what all of it have."""
        said = {**alike, **run}
        return cls(point=Point(**said.pop("mesh")), **said)


@cache
def _estimate(row: HeldOutRow) -> StepEstimate:
    stack = stack_named(row.stack)
    job = Job(
        model=load_model(row.model),
        cluster=Cluster(gpu=load_gpu(row.gpu), nodes=row.gpus // row.each, gpus_per_node=row.each),
        seq_len=row.seq_len,
        global_batch=row.batch,
        stack=stack,
        numerics=stack.numerics(row.precision, "fp32"),
    )
    return CostModel(job).estimate(row.point)


RUNS: Final[Mapping[str, Sequence[HeldOutRow]]] = {
    name: tuple(map(HeldOutRow.read, runs)) for name, runs in read_toml(HERE / "runs.toml").items()
}
"""All of them, by table."""
ROWS: Final = RUNS["seen"]
"""Those that have goals."""


def render() -> str:
    """The rows, and their errors by GPU and by length."""
    return "\n\n".join("\n".join(_table(name)) for name in TITLES)


def _table(name: str) -> Iterator[str]:
    rows = RUNS[name]
    yield TITLES[name]
    yield f"    {'':7}{'':38}{'published':>22}{'predicted':>12}{'speed':>8}{'GiB':>16}{'memory':>9}"
    yield from map(_line, rows)
    yield from _verdicts(rows) if name == "seen" else _spread(rows)
    yield f"  speed by GPU: {_by(rows, lambda row: row.gpu)}"
    if name == "mixtures":
        yield f"  speed by model: {_by(rows, lambda row: row.model)}"
    else:
        yield f"  speed by length: {_by(rows, lambda row: format_tokens(row.seq_len))}"


def _line(row: HeldOutRow) -> str:
    setup = f"{row.model}, {format_tokens(row.seq_len)}, {row.gpus} {row.gpu}"
    predicted = row.estimate.tokens_per_second / row.gpus
    speed = f"{row.published:10,.1f} tokens/s/GPU{predicted:12,.1f}{row.error:+8.0%}"
    memory = ""
    if row.memory_gib is not None and row.memory_error is not None:
        both = f"{row.memory_gib:.1f} {row.allocated_gib:.1f}"
        memory = f"{both:>16}{row.memory_error:+9.0%}"
    failed = "" if abs(row.error) <= LARGEST_GOAL else "  FAILS"
    return f"    {row.name:7}{setup:38}{speed}{memory}{failed}"


def _verdicts(rows: Sequence[HeldOutRow]) -> Iterator[str]:
    mean = fmean(abs(row.error) for row in rows)
    worst = max(rows, key=lambda row: abs(row.error))
    yield _verdict(f"speed: mean error {mean:.1%}", mean, MEAN_GOAL)
    largest = abs(worst.error)
    yield _verdict(f"speed: largest error {largest:.0%} ({worst.name})", largest, LARGEST_GOAL)
    memory = fmean(abs(row.memory_error) for row in rows if row.memory_error is not None)
    yield _verdict(f"memory: mean error {memory:.1%}", memory, MEMORY_GOAL)


def _verdict(what: str, error: float, goal: float) -> str:
    return f"  {what}, goal {goal:.0%}: {'met' if error <= goal else 'MISSED'}"


def _spread(rows: Sequence[HeldOutRow]) -> Iterator[str]:
    errors = [abs(row.error) for row in rows]
    failed = sum(error > LARGEST_GOAL for error in errors)
    yield (
        f"  speed: mean error {fmean(errors):.1%}, median {median(errors):.1%};"
        f" {failed} of {len(errors)} rows above {LARGEST_GOAL:.0%}"
    )


def _by(rows: Sequence[HeldOutRow], key: Callable[[HeldOutRow], str]) -> str:
    """Mean error, with its sign and without, of the rows that are alike in something."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row.error)
    return ", ".join(
        f"{name} {fmean(errors):+.0%} (absolute {fmean(map(abs, errors)):.0%}, {len(errors)} rows)"
        for name, errors in groups.items()
    )
