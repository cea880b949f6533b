"""What is to be planned: a model on a cluster, a sequence and its mask, a batch; and one way to do it, a
`Point`.

    ranks = pp x dp x ring x ulysses x tp        from the slowest links to the fastest (best practice 7)

`violations` holds the rules that make a point legal. The search leaves illegal points out; for pins they
become the error.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

from seqmesh import layouts, masks
from seqmesh.masks import Mask
from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.hardware import Cluster
from seqmesh.planner.inputs.models import ModelShape
from seqmesh.planner.inputs.tables import unknown

AXES = ("tp", "ulysses", "ring", "dp", "pp")
"""From the fastest links to the slowest: best practice 7."""
CHECKPOINTING = ("none", "full")
OFFLOAD = ("none", "activations", "optimizer", "both")
TILING = ("none", "loss", "mlp")
CHOICES: dict[str, tuple[str, ...]] = {"checkpointing": CHECKPOINTING, "offload": OFFLOAD, "tiling": TILING}
"""Values of the knobs of a `Point` that are words."""
LARGEST = 1 << 40
"""Tokens, or sequences, beyond which nobody plans."""
STACKS = ("fused", "trainer")
"""fused: bf16, flash attention, fused norms and activations, as Megatron-LM has. trainer: `seqmesh train` as
it stands.
"""


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Bytes of one number, by what it is."""

    element: int = 2
    """Weights, activations and what is sent: 2 for bf16, 4 for fp32."""
    gradient: int = 4
    """Gradients as they are accumulated and reduced: fp32 by default, as Megatron-LM and FSDP2's reduce_dtype
    do.
    """
    optimizer: int = 12
    """Per parameter: Adam's two moments, and an fp32 master copy unless the weights are fp32 themselves."""

    @property
    def update(self) -> int:
        """Bytes that AdamW reads and writes for a parameter: its state twice, the gradient, and the weight
        (read too if it is fp32).
        """
        return 2 * self.optimizer + self.gradient + self.element * (2 if self.element == 4 else 1)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training step to plan."""

    model: ModelShape
    cluster: Cluster
    seq_len: int
    """Tokens of one sequence."""
    global_batch: int = 1
    """Sequences of a step, over all ranks."""
    documents: tuple[int, ...] = ()
    """Lengths of the packed documents; empty: one causal sequence."""
    layout: str = "auto"
    """Layout on the ring: auto, contiguous, zigzag, striped, balanced."""
    numerics: Numerics = field(default_factory=Numerics)
    assumptions: Assumptions = field(default_factory=Assumptions)
    stack: str = "fused"
    """One of STACKS: what memory is predicted of."""
    memory_limit: int | None = None
    """Bytes per rank that may be used; default: the GPU's memory."""
    max_micro_batch: int | None = None
    """Largest micro-batch to consider."""
    axes: tuple[str, ...] = AXES
    """Mesh axes from the fastest links to the slowest."""

    def __post_init__(self) -> None:
        if max(self.seq_len, self.global_batch) > LARGEST:
            raise ValueError(
                f"seq_len={self.seq_len}, global_batch={self.global_batch}: beyond {LARGEST} is a slip; use smaller numbers"
            )
        if self.memory_limit is not None and self.memory_limit > self.cluster.gpu.memory_bytes:
            raise ValueError(
                f"a memory limit of {self.memory_limit} bytes on a GPU with {self.cluster.gpu.memory_bytes}; use less, or correct the GPU"
            )
        if self.seq_len < 1 or self.global_batch < 1:
            raise ValueError(
                f"seq_len={self.seq_len}, global_batch={self.global_batch}: both must be at least 1; use a positive length and batch"
            )
        for name, value, known in (("layout", self.layout, layouts.NAMES), ("stack", self.stack, STACKS)):
            if value not in known:
                raise unknown(name, value, known)
        _ = self.peak  # raises where the GPU has no rate for this precision
        if sorted(self.axes) != sorted(AXES):
            raise ValueError(
                f"axes {','.join(self.axes)} must name each of {','.join(AXES)} once, from the fastest links to the slowest"
            )
        if self.documents and sum(self.documents) != self.seq_len:
            raise ValueError(
                f"the documents hold {sum(self.documents)} tokens but seq_len={self.seq_len}; make them add up"
            )

    @property
    def peak(self) -> float:
        """FLOP/s of a GPU in the job's precision."""
        return self.cluster.gpu.peak_flops_per_s(self.numerics.element)

    @property
    def memory_rate(self) -> float:
        """Bytes/s through a GPU's memory that kernels reach."""
        return self.cluster.gpu.memory_bytes_per_s * self.assumptions.memory

    @cached_property
    def mask(self) -> Mask:
        """Which query meets which key in one sequence."""
        causal = masks.documents(self.documents) if self.documents else masks.causal(self.seq_len)
        window = self.model.sliding_window
        return (
            causal
            if window is None or window >= self.seq_len
            else causal & masks.sliding_window(self.seq_len, window)
        )

    @property
    def capacity(self) -> int:
        """Bytes of memory that one rank may use."""
        return self.cluster.gpu.memory_bytes if self.memory_limit is None else self.memory_limit


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to run a job: the keys of `--pin`."""

    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    dp: int = 1
    pp: int = 1
    zero: int = 1
    checkpointing: str = "none"
    offload: str = "none"
    tiling: str = "none"
    micro_batch: int = 1

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(f"value of {name}", str(getattr(self, name)), known)
        if (
            min(self.tp, self.ulysses, self.ring, self.dp, self.pp, self.micro_batch) < 1
            or not 0 <= self.zero <= 3
        ):
            raise ValueError(f"{self}: degrees are at least 1, and ZeRO has stages 0 to 3; correct them")

    @property
    def sp(self) -> int:
        """Ranks that share a sequence by its tokens."""
        return self.ulysses * self.ring

    @property
    def replicas(self) -> int:
        """Ranks with the same weights: N of the ZeRO formulas."""
        return self.dp * self.sp

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's states live on the host."""
        return self.offload in ("optimizer", "both")

    @property
    def offloads_activations(self) -> bool:
        """Whether checkpoints live on the host."""
        return self.offload in ("activations", "both")

    @property
    def gpus(self) -> int:
        """Ranks in all."""
        return self.tp * self.sp * self.dp * self.pp

    def micro_batches(self, job: Job) -> int:
        """Forward and backward passes of a step on each rank."""
        return job.global_batch // (self.dp * self.micro_batch)

    def tokens(self, job: Job) -> int:
        """Tokens of a micro-batch on the fullest rank."""
        return self.micro_batch * -(-job.seq_len // self.sp)

    def layers(self, job: Job) -> int:
        """Layers of the fullest pipeline stage."""
        return -(-job.model.layers // self.pp)

    def __str__(self) -> str:
        knobs = [f"zero {self.zero}", f"micro-batch {self.micro_batch}"]
        knobs += [
            f"{name} {value}"
            for name in ("checkpointing", "offload", "tiling")
            if (value := getattr(self, name)) != "none"
        ]
        return f"tp{self.tp} u{self.ulysses} r{self.ring} dp{self.dp} pp{self.pp}, {', '.join(knobs)}"

    def but(self, **changes: int | str) -> "Point":
        """The same with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]


KEYS = tuple(f.name for f in fields(Point))


def violations(job: Job, point: Point) -> Iterator[str]:
    """The rules that a point breaks, each with what to do."""
    m, c = job.model, job.cluster
    if point.gpus != c.gpus:
        product = (
            f"tp={point.tp} x ulysses={point.ulysses} x ring={point.ring} x dp={point.dp} x pp={point.pp}"
        )
        yield f"{product} = {point.gpus} ranks on {c.gpus} GPUs; choose degrees whose product is {c.gpus}"
    if m.heads % point.tp or (m.kv_heads % point.tp and point.tp % m.kv_heads):
        yield f"tp={point.tp} does not divide {m.heads} query heads and {m.kv_heads} K/V heads; use a common divisor"
    elif m.intermediate % point.tp or m.hidden % point.tp:
        yield f"tp={point.tp} does not divide hidden={m.hidden} and intermediate={m.intermediate}; use a common divisor"
    elif point.tp > m.kv_heads:
        yield f"tp={point.tp} with {m.kv_heads} K/V heads would hold copies of them; use tp <= {m.kv_heads}, ulysses or ring for the rest"
    elif point.ulysses > m.heads // point.tp:
        left = m.heads // point.tp
        yield (
            f"ulysses={point.ulysses} with {left} query heads on each tp={point.tp} rank leaves ranks without a head;"
            f" use ulysses <= {left} and put the rest on ring"
        )
    if point.pp > m.layers:
        yield f"pp={point.pp} with {m.layers} layers leaves stages empty; use pp <= {m.layers}"
    if point.sp > job.seq_len:
        yield f"ulysses x ring = {point.sp} ranks share {job.seq_len} tokens; use at most {job.seq_len}"
    elif job.seq_len % (point.tp * point.sp) and point.tp > 1:
        yield (
            f"tp={point.tp} with its sequence parallelism does not divide {job.seq_len} tokens over {point.sp} ranks;"
            f" use a length that is a multiple of {point.tp * point.sp}, or tp=1"
        )
    if job.global_batch % (point.dp * point.micro_batch):
        yield (
            f"dp={point.dp} x micro_batch={point.micro_batch} does not divide global_batch={job.global_batch};"
            f" use degrees whose product divides {job.global_batch}"
        )
    if job.stack == "trainer":
        yield from _not_in_the_trainer(job, point)
    if job.max_micro_batch is not None and point.micro_batch > job.max_micro_batch:
        yield f"micro_batch={point.micro_batch} is above the limit of {job.max_micro_batch}; raise --max-micro-batch, or use a smaller one"
    if point.zero > 1 and point.replicas == 1:
        yield f"zero={point.zero} with dp x ulysses x ring = 1 has nothing to shard over; use zero=0 or 1"
    if point.offloads_activations and point.checkpointing == "none":
        yield f"offload={point.offload} moves checkpoints to the host but checkpointing=none makes none; use checkpointing=full"
    if point.offloads_optimizer and point.zero == 0 and point.replicas > 1:
        yield f"offload={point.offload} with zero=0 would step the whole model on every host; use zero >= 1"


def is_legal(job: Job, point: Point) -> bool:
    """Whether a point breaks no rule."""
    return not any(violations(job, point))


def _not_in_the_trainer(job: Job, point: Point) -> Iterator[str]:
    """`seqmesh train` as it stands: weights replicated on ulysses x ring ranks, one packed sequence a step,
    nothing saved.
    """
    for key, value in {
        "tp": 1,
        "dp": 1,
        "pp": 1,
        "zero": 0,
        "checkpointing": "none",
        "offload": "none",
        "tiling": "none",
    }.items():
        if getattr(point, key) != value:
            yield f"{key}={getattr(point, key)} is not what seqmesh train runs; use {key}={value}, or --stack fused"
    if job.global_batch > 1:
        yield f"global_batch={job.global_batch}: seqmesh train packs a step into one sequence; use --global-batch 1 and --documents"
