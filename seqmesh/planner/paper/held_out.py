"""Published runs of other programs beside what the planner predicts: what it was not built on.

`seqmesh plan --published` prints them after the paper's tables: speed and memory with default assumptions,
and the errors by GPU and by length. Nothing is fitted, neither to a row nor to the table; which rows had been
seen when a constant was chosen is in docs/planner_results.md.

Sources: torchtitan, benchmarks/llama3_h100_202412_torchtitan.md and docs/performance.md; Korthikanti et al.
2022 (arXiv 2205.05198), Table 5; "The Llama 3 herd of models" (arXiv 2407.21783), Table 4. What these leave
open is stated at the row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean
from typing import Any

from seqmesh.planner.cost.estimate import StepEstimate
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.stack import stack_named
from seqmesh.planner.inputs.units import format_tokens

K = 1024
GIB = 2**30
MEAN_GOAL, LARGEST_GOAL, MEMORY_GOAL = 0.15, 0.35, 0.15
"""Goals: of speeds on average, of any speed, and of memory on average."""


@dataclass(frozen=True, kw_only=True)
class HeldOutRow:
    """A published run."""

    name: str
    model: str
    gpu: str
    gpus: int
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


@cache
def _estimate(row: HeldOutRow) -> StepEstimate:
    gpu = load_gpu(row.gpu)
    stack = stack_named(row.stack)
    job = Job(
        model=load_model(row.model),
        cluster=Cluster(gpu=gpu, nodes=row.gpus // 8, gpus_per_node=8),
        seq_len=row.seq_len,
        global_batch=row.batch,
        stack=stack,
        numerics=stack.numerics(row.precision, "fp32"),
    )
    return CostModel(job).estimate(row.point)


def _titan(
    name: str,
    model: str,
    gpus: int,
    batch: int,
    point: Point,
    tokens_per_s: float,
    memory_gib: float | None = None,
    *,
    stack: str = "fsdp2",
    precision: str | None = "fp8-linear",
    seq_len: int = 8 * K,
) -> HeldOutRow:
    """A run of torchtitan."""
    return HeldOutRow(
        name=name,
        model=model,
        gpu="h100-96gb-500w",
        gpus=gpus,
        seq_len=seq_len,
        batch=batch,
        point=point,
        stack=stack,
        precision=precision,
        tokens_per_s=tokens_per_s,
        memory_gib=memory_gib,
    )


def _megatron(
    name: str,
    model: str,
    gpu: str,
    gpus: int,
    seq_len: int,
    batch: int,
    point: Point,
    *,
    step_s: float | None = None,
    tflops: float | None = None,
) -> HeldOutRow:
    """A run of Megatron-LM, or alike."""
    return HeldOutRow(
        name=name,
        model=model,
        gpu=gpu,
        gpus=gpus,
        seq_len=seq_len,
        batch=batch,
        point=point,
        stack="megatron",
        step_s=step_s,
        tflops=tflops,
    )


_OF_8 = Point(dp=8, micro_batch=2, zero=3, checkpointing="selective")
_FULL = Point(zero=3, checkpointing="full")
_70B = _FULL.but(dp=32, tp=8, micro_batch=16)
# torchtitan cuts a batch in as many micro-batches as there are stages unless it is told to do else, and keeps
# weights whole under a pipeline: ZeRO-2.
_405B = _FULL.but(dp=8, tp=8, pp=8, micro_batch=4, zero=2)
_22B = Point(tp=8, zero=0, micro_batch=4, checkpointing="full")
_1T = Point(tp=8, pp=64, zero=0, checkpointing="full")

# Interleaved; in how many stages is not said: one layer each.
_LLAMA_3 = Point(tp=8, pp=16, zero=1, pipeline="interleaved", virtual=8)
_A100: dict[str, Any] = {"gpu": "a100-sxm", "stack": "fsdp2-eager", "precision": None}

ROWS = (  # name, model, GPUs, sequences of a step, point, tokens/s of a GPU, GiB
    _titan("T1", "llama3-8b", 8, 16, _OF_8, 5762, 82.4, stack="fsdp2-eager", precision=None),
    _titan("T1c", "llama3-8b", 8, 16, _OF_8, 6667, 77.0, precision=None),
    _titan("T3c", "llama3-8b", 128, 256, _OF_8.but(dp=128), 6514, 62.0, precision=None),
    _titan("T2a", "llama3-8b", 8, 8, _FULL.but(dp=8), 3890, 83.9, seq_len=32 * K),
    _titan("T2b", "llama3-8b", 8, 4, _FULL.but(dp=4, ring=2), 2540, 84.2, seq_len=64 * K),
    _titan("T4", "llama3-70b", 256, 512, _70B, 829, 71.9),
    _titan("T4a", "llama3-70b", 256, 512, _70B, 876, 67.6, stack="fsdp2-async-tp"),
    _titan("T5a", "llama3-405b", 512, 256, _405B, 100, 82.5, stack="fsdp2-async-tp"),
    # Whether these two were compiled is not said; torchtitan's default then was not to.
    replace(_titan("A1", "llama3-8b", 64, 64, _OF_8.but(dp=64, micro_batch=1), 2973), **_A100),
    replace(
        _titan("A3", "llama2-13b", 64, 128, _OF_8.but(dp=64, checkpointing="none"), 2162, seq_len=4 * K),
        **_A100,
    ),
    _megatron("M22f", "gpt-22b", "a100-sxm", 8, 2 * K, 4, _22B, step_s=1.42),
    _megatron("M22s", "gpt-22b", "a100-sxm", 8, 2 * K, 4, _22B.but(checkpointing="selective"), step_s=1.10),
    _megatron("M1Tf", "gpt-1t", "a100-sxm", 512, 2 * K, 512, _1T, step_s=94.42),
    _megatron(
        "M1Ts", "gpt-1t", "a100-sxm", 512, 2 * K, 512, _1T.but(checkpointing="selective"), step_s=71.49
    ),
    _megatron("L8K", "llama3-405b", "h100-sxm", 8192, 8 * K, 2048, _LLAMA_3.but(dp=64), tflops=430),
    _megatron("L8Kx2", "llama3-405b", "h100-sxm", 16384, 8 * K, 2048, _LLAMA_3.but(dp=128), tflops=400),
    _megatron(
        "L128K", "llama3-405b", "h100-sxm", 16384, 128 * K, 128, _LLAMA_3.but(dp=8, ring=16), tflops=380
    ),
)


def render() -> str:
    """The rows, and their errors by GPU and by length."""
    lines = ["Held out: published runs of other programs, default assumptions, nothing fitted"]
    lines.append(f"    {'':7}{'':34}{'published':>22}{'predicted':>12}{'speed':>8}{'GiB':>16}{'memory':>9}")
    lines += [_line(row) for row in ROWS]
    lines += _summary()
    return "\n".join(lines)


def _line(row: HeldOutRow) -> str:
    setup = f"{row.model}, {format_tokens(row.seq_len)}, {row.gpus} {row.gpu}"
    predicted = row.estimate.tokens_per_second / row.gpus
    speed = f"{row.published:10,.1f} tokens/s/GPU{predicted:12,.1f}{row.error:+8.0%}"
    memory = ""
    if row.memory_gib is not None and row.memory_error is not None:
        both = f"{row.memory_gib:.1f} {row.allocated_gib:.1f}"
        memory = f"{both:>16}{row.memory_error:+9.0%}"
    failed = "" if abs(row.error) <= LARGEST_GOAL else "  FAILS"
    return f"    {row.name:7}{setup:34}{speed}{memory}{failed}"


def _summary() -> Iterator[str]:
    mean = fmean(abs(row.error) for row in ROWS)
    worst = max(ROWS, key=lambda row: abs(row.error))
    yield _verdict(f"speed: mean error {mean:.1%}", mean, MEAN_GOAL)
    largest = abs(worst.error)
    yield _verdict(f"speed: largest error {largest:.0%} ({worst.name})", largest, LARGEST_GOAL)
    memory = fmean(abs(row.memory_error) for row in ROWS if row.memory_error is not None)
    yield _verdict(f"memory: mean error {memory:.1%}", memory, MEMORY_GOAL)
    yield f"  speed by GPU: {_by(lambda row: row.gpu)}"
    yield f"  speed by length: {_by(lambda row: format_tokens(row.seq_len))}"


def _verdict(what: str, error: float, goal: float) -> str:
    return f"  {what}, goal {goal:.0%}: {'met' if error <= goal else 'MISSED'}"


def _by(key: Callable[[HeldOutRow], str]) -> str:
    """Mean error, with its sign and without, of the rows that are alike in something."""
    groups: dict[str, list[float]] = {}
    for row in ROWS:
        groups.setdefault(key(row), []).append(row.error)
    return ", ".join(
        f"{name} {fmean(errors):+.0%} (absolute {fmean(map(abs, errors)):.0%}, {len(errors)} rows)"
        for name, errors in groups.items()
    )
