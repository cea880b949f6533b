"""The training stacks that can be planned for, behind one interface: what is a program's, not a machine's.

    seqmesh         seqmesh.attention in a program with fused kernels, ZeRO and every saver: the default
    fsdp2           PyTorch: FSDP2, its tensor parallelism and pipelines, torch.compile, as torchtitan
    fsdp2-eager     the same without torch.compile
    fsdp2-async-tp  the same with asynchronous tensor parallelism
    megatron        Megatron-LM: distributed optimizer (ZeRO-1), exchanges beside compute
    megatron-bridge the same as NVIDIA's recipes run it: more beside compute, tokens once to each node
    trainer         `seqmesh train`: transformers' modules, fp32 or bf16, what it recomputes and shards
    paper           what the USP paper measured: an attention that hides no exchange of heads
    fused           seqmesh as it was priced before: no allowance for stragglers or fragmentation

A `Job` holds one of them. What the planner does differently for them it asks the stack, by the questions
of `Stack`; numbers that are theirs go before the defaults (`assumed`). Only their memory models are in cost/,
which this folder may not import: cost/step.py says whose is which.

The time of all follows from the same costs: `trainer` knows what `seqmesh train` refuses, what it computes
again, and what its modules keep.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from seqmesh.planner.inputs.numerics import Numerics, numerics_for
from seqmesh.planner.inputs.point import CHECKPOINTING, OFFLOAD, TILING, Point
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.inputs.tables import unknown


class PlannedJob(Protocol):
    """What a stack must know of a job."""

    @property
    def model(self) -> ModelShape:
        """What is trained."""

    @property
    def numerics(self) -> Numerics:
        """In which numbers."""

    def micro_batches(self, point: Point) -> int:
        """Forward and backward passes of a step on each rank."""


ANY_NUMBER = 1 << 30
"""Of a rank's stages: as many as it has layers."""
AS_BEFORE: Mapping[str, float] = {"fragmentation": 0.0, "straggler": 0.0, "matmul_half_outputs": 0.0}
"""The published comparisons of these stacks allow for none of these."""


@dataclass(frozen=True)
class Stack:
    """A program with fused kernels, every parallelism and memory saver, and seqmesh.attention.

    Each other stack says in what it differs.
    """

    attention: str | None = None
    """Kernel of attention; None: what the program would run on the GPU."""

    program: ClassVar[str] = "seqmesh"
    """What runs a plan: a value of `--emit-for`."""
    zero_stages: ClassVar[tuple[int, ...]] = (1, 2, 3)
    """ZeRO stages that a search tries where several ranks hold the same weights, the usual one first.

    No 0: where there are replicas, ZeRO-1 sends no more and takes less memory.
    """
    savers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tiling": TILING,
        # Selective ones where they are pinned: the published comparisons know none.
        "checkpointing": ("none", "full"),
        "offload": OFFLOAD,
    }
    """Values of each memory saver that a search tries, each one at least as slow as those before it."""
    overlaps_heads: ClassVar[bool] = True
    """Whether heads travel while others are computed, wherever seqmesh's engine does that."""
    chooses_stages: ClassVar[bool] = True
    """Whether the ring's exchanges may be merged, where that takes less time; else none are."""
    keeps_attention: ClassVar[bool] = False
    """Whether full checkpoints keep attention's results, so that it is never computed again."""
    selective: ClassVar[str] = "products"
    """What selective checkpoints keep beside attention: `products`, every second one (`half`), or `all`."""
    shards_masters: ClassVar[bool] = False
    """Whether weights are fp32 and sharded, and bf16 ones are made when they are gathered: FSDP2."""
    keeps_gathered: ClassVar[bool] = False
    """Whether tensor parallelism keeps the inputs that it gathered, and does not gather them again."""
    gathers_ahead: ClassVar[bool] = False
    """Whether what is exchanged once a step goes layer by layer, beside the last and the next pass."""
    weights_cast_once: ClassVar[bool] = False
    """Whether weights are cast to fp8 once a step, and not for each micro-batch."""
    rows_once_a_node: ClassVar[bool] = False
    """Whether a token goes to another node once, whatever number of its experts are there: DeepEP."""
    most_virtual: ClassVar[int] = 1
    """Most stages of a pipeline rank that a search tries; 1: it interleaves none."""
    counts_ends: ClassVar[bool] = False
    """Whether embedding and head can each take a layer's place in a pipeline's stages."""
    leaves_headroom: ClassVar[bool] = False
    """Whether plans fill what a card reports as its memory, and not all that it is sold with."""
    experts_from_zero: ClassVar[int] = 2
    """ZeRO stage from which on experts can be spread: of `seqmesh train`, where weights are sharded."""
    assumed: ClassVar[Mapping[str, float]] = AS_BEFORE
    """Assumptions that are the program's."""
    kernels: ClassVar[Mapping[str, str]] = {}
    """Kernel of attention by generation of the GPU, where it is not aten's FlashAttention-2."""

    def attention_kernel(self, generation: str) -> str:
        """The kernel of attention on GPUs of a generation, if none is asked for."""
        return self.attention or self.kernels.get(generation, "fa2")

    def numerics(self, precision: str | None, gradients: str) -> Numerics:
        """Bytes of numbers for `--precision` (None: the stack's own, bf16) and `--gradients`.

        Raises:
            ValueError: the stack does not compute in them.
        """
        return numerics_for(precision or "bf16", gradients)

    def violations(self, point: Point, job: PlannedJob) -> Iterator[str]:  # noqa: ARG002
        """What it does not run of a point, each with what to do."""
        return iter(())


@dataclass(frozen=True)
class FusedStack(Stack):
    """As it was priced when published rows were first compared."""


@dataclass(frozen=True)
class SeqmeshStack(Stack):
    """The same on a real machine: GPUs that differ, an allocator with gaps, memory that a card reports."""

    leaves_headroom: ClassVar[bool] = True
    most_virtual: ClassVar[int] = 2
    """What `seqmesh train` runs."""
    assumed: ClassVar[Mapping[str, float]] = {}


@dataclass(frozen=True)
class FsdpStack(SeqmeshStack):
    """PyTorch's own parallelism, as torchtitan applies it: FSDP2 over dp x sp, torch.compile by layer."""

    program: ClassVar[str] = "torchtitan"
    savers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tiling": ("none",),
        "checkpointing": CHECKPOINTING,
        "offload": ("none",),
    }
    zero_stages: ClassVar[tuple[int, ...]] = (3, 2)
    overlaps_heads: ClassVar[bool] = False
    chooses_stages: ClassVar[bool] = False
    most_virtual: ClassVar[int] = ANY_NUMBER
    counts_ends: ClassVar[bool] = True
    selective: ClassVar[str] = "half"
    shards_masters: ClassVar[bool] = True
    keeps_gathered: ClassVar[bool] = True
    gathers_ahead: ClassVar[bool] = True
    assumed: ClassVar[Mapping[str, float]] = {
        # All but the first and last layer's weights are exchanged beside compute; TP hides nothing.
        "gradient_overlap": 1.0,
        "prefetch": 1.0,
        "tp_exposed": 1.0,
        # cross_entropy of fp32 logits: log-softmax, its gradient and the loss's, 4 bytes each.
        "logit_bytes": 12.0,
        # torch/distributed/tensor/parallel/loss.py, backward: four of them at once.
        "logit_bytes_tp": 16.0,
        # Assumed: torchtitan does without expandable segments, and reports what is reserved.
        "fragmentation": 0.05,
    }
    kernels: ClassVar[Mapping[str, str]] = {"blackwell": "cudnn"}
    """Of its scaled_dot_product_attention."""

    def violations(self, point: Point, job: PlannedJob) -> Iterator[str]:  # noqa: ARG002
        """What FSDP2 and torchtitan do not have."""
        if point.zero < 2 and point.replicas > 1:
            yield f"zero={point.zero}: FSDP2 shards weights too; use zero=2 or 3, or another --stack"
        if point.tiling != "none":
            yield f"tiling={point.tiling}: --stack fsdp2 has none; use tiling=none, or --stack seqmesh"
        if point.offload != "none":
            yield f"offload={point.offload}: none is priced for --stack fsdp2; use none, or --stack seqmesh"


@dataclass(frozen=True)
class EagerFsdpStack(FsdpStack):
    """The same without torch.compile."""

    assumed: ClassVar[Mapping[str, float]] = {
        **FsdpStack.assumed,
        # Operation by operation, in bytes of a hidden number: norms in fp32 64, rotary 25, residuals 12;
        # SiLU and product apart.
        "streamed_hidden": 50.0,
        "streamed_ffn": 5.0,
    }


@dataclass(frozen=True)
class AsyncTpFsdpStack(FsdpStack):
    """The same with asynchronous tensor parallelism."""

    assumed: ClassVar[Mapping[str, float]] = {
        **FsdpStack.assumed,
        "tp_exposed": 0.4,  # assumed: one of 8 pieces, and slower products
    }


@dataclass(frozen=True)
class MegatronStack(SeqmeshStack):
    """Megatron-LM with its distributed optimizer, gradients and weights exchanged beside compute.

    Its selective checkpoints repeat attention's core, of which flash attention keeps nothing large: they are
    priced as none.
    """

    program: ClassVar[str] = "megatron"
    savers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tiling": ("none",),
        "checkpointing": CHECKPOINTING,
        "offload": ("none", "optimizer"),
    }
    overlaps_heads: ClassVar[bool] = False
    chooses_stages: ClassVar[bool] = False
    most_virtual: ClassVar[int] = ANY_NUMBER
    counts_ends: ClassVar[bool] = True
    selective: ClassVar[str] = "all"
    gathers_ahead: ClassVar[bool] = True
    experts_from_zero: ClassVar[int] = 0
    assumed: ClassVar[Mapping[str, float]] = {"gradient_overlap": 1.0, "prefetch": 1.0}
    """--overlap-grad-reduce and --overlap-param-gather."""
    kernels: ClassVar[Mapping[str, str]] = {"hopper": "cudnn", "blackwell": "cudnn"}
    """Transformer Engine's."""


@dataclass(frozen=True)
class MegatronBridgeStack(MegatronStack):
    """The same as NVIDIA's own recipes run it: --tp-comm-overlap, Transformer Engine's fp8, and DeepEP."""

    weights_cast_once: ClassVar[bool] = True
    rows_once_a_node: ClassVar[bool] = True

    assumed: ClassVar[Mapping[str, float]] = {**MegatronStack.assumed, "tp_exposed": 0.25}
    """Of a collective of tensor parallelism one of `tp` pieces is exposed: assumed, a quarter of them."""


@dataclass(frozen=True)
class PaperStack(Stack):
    """The system that the USP paper measured: all heads are exchanged at once, and ring hops one by one.

    Published figures are compared with this one (paper/published.py).
    """

    overlaps_heads: ClassVar[bool] = False
    chooses_stages: ClassVar[bool] = False


@dataclass(frozen=True)
class TrainerStack(Stack):
    """`seqmesh train`: its mixes, and its own memory (train/memory/). Ranks of tp share norms."""

    savers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tiling": ("loss", "mlp"),  # its loss always is
        "checkpointing": CHECKPOINTING,
        "offload": OFFLOAD,
    }
    chooses_stages: ClassVar[bool] = False
    """It builds its schedules with the default of `Schedule.build`."""
    keeps_attention: ClassVar[bool] = True

    def numerics(self, precision: str | None, gradients: str) -> Numerics:
        """fp32 unless bf16 is asked for, whose gradients are summed in fp32."""
        if gradients != "fp32":
            raise ValueError(
                f"--gradients {gradients} with --stack trainer, which sums gradients in fp32;"
                " remove --gradients, or use --stack fused"
            )
        return numerics_for(precision or "fp32", gradients)

    def violations(self, point: Point, job: PlannedJob) -> Iterator[str]:
        """What the trainer refuses of a recipe, or its formula does not cover."""
        if point.pipeline != "1f1b":
            yield f"pipeline={point.pipeline}: the trainer's memory is known for 1f1b; use pipeline=1f1b"
        if job.numerics.element == 2 and point.zero < 2:
            yield (
                f"bf16 with zero={point.zero}: seqmesh train makes weights in bf16 when it gathers them;"
                " use zero=2 or 3, or --precision fp32"
            )
        if point.offloads_optimizer and point.zero < 2:
            yield (
                f"offload={point.offload} with zero={point.zero}: seqmesh train keeps on the host what is"
                " sharded; use zero=2 or 3"
            )
        count = job.micro_batches(point)
        if point.pp > max(1, count):
            yield (
                f"pp={point.pp} with {count} micro-batches: seqmesh train's stages need one each;"
                " use a smaller micro_batch, or fewer stages"
            )
        if point.pp > 1 and job.model.tied_embeddings:
            yield f"pp={point.pp} with tied embeddings, which seqmesh train does not cut; use pp=1"


STACKS: Mapping[str, Stack] = {
    "seqmesh": SeqmeshStack(),
    "fsdp2": FsdpStack(),
    "fsdp2-eager": EagerFsdpStack(),
    "fsdp2-async-tp": AsyncTpFsdpStack(),
    "megatron": MegatronStack(),
    "megatron-bridge": MegatronBridgeStack(),
    "trainer": TrainerStack(),
    "paper": PaperStack(),
    "fused": FusedStack(),
}
"""Values of `--stack`."""


def stack_named(name: str, attention: str | None = None) -> Stack:
    """The stack of this name, with another kernel of attention than its own if one is named.

    Raises:
        ValueError: there is none.
    """
    if name not in STACKS:
        raise unknown("stack", name, STACKS)
    return replace(STACKS[name], attention=attention)
