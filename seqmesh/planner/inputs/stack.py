"""The training stacks that can be planned for, behind one interface.

    fused       bf16, flash attention, fused norms and activations, every parallelism: as Megatron-LM has
    trainer     `seqmesh train`: transformers' modules, fp32 or bf16, what it recomputes and shards
    paper       what the USP paper measured: fused, with an attention that hides no exchange of heads

A `Job` holds one of them. What the planner does differently for them it asks the stack, by the questions
of `Stack`. Only their memory models are in cost/, which this folder may not import: MEMORY_MODELS of
cost/step.py says whose is which.

The time of all follows from the same costs: `trainer` knows what `seqmesh train` refuses, what it computes
again, and what its modules keep.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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


class Stack(Protocol):
    """What the planner asks of a training stack."""

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """ZeRO stages that a search tries where several ranks hold the same weights, the usual one first."""

    @property
    def savers(self) -> Mapping[str, tuple[str, ...]]:
        """Values of each memory saver that a search tries, each one at least as slow as those before it."""

    @property
    def overlaps_heads(self) -> bool:
        """Whether heads travel while others are computed, wherever seqmesh's engine does that."""

    @property
    def chooses_stages(self) -> bool:
        """Whether the ring's exchanges may be merged, where that takes less time; else none are."""

    @property
    def keeps_attention(self) -> bool:
        """Whether full checkpoints keep attention's results, so that it is never computed again."""

    @property
    def remedy(self) -> str | None:
        """What to do when nothing fits, where a larger machine or a shorter sequence is not the answer."""

    def numerics(self, precision: str | None, gradients: str) -> Numerics:
        """Bytes of numbers for `--precision` (None: the stack's own) and `--gradients`.

        Raises:
            ValueError: the stack does not compute in them.
        """

    def violations(self, point: Point, job: PlannedJob) -> Iterator[str]:
        """What it does not run of a point, each with what to do."""


@dataclass(frozen=True)
class FusedStack:
    """bf16 training with every parallelism and memory saver, as Megatron-LM has it, and seqmesh.attention."""

    zero_stages: ClassVar[tuple[int, ...]] = (1, 2, 3)
    """No 0: where there are replicas, ZeRO-1 sends no more and takes less memory."""
    savers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tiling": TILING,
        # Selective ones where they are pinned: the published comparisons know none.
        "checkpointing": ("none", "full"),
        "offload": OFFLOAD,
    }
    overlaps_heads: ClassVar[bool] = True
    chooses_stages: ClassVar[bool] = True
    keeps_attention: ClassVar[bool] = False
    remedy: ClassVar[str | None] = None

    def numerics(self, precision: str | None, gradients: str) -> Numerics:
        """Any precision that can be asked for, bf16 by default."""
        return numerics_for(precision or "bf16", gradients)

    def violations(self, point: Point, job: PlannedJob) -> Iterator[str]:  # noqa: ARG002
        """None: it runs every point that the rules for all stacks allow."""
        return iter(())


@dataclass(frozen=True)
class PaperStack(FusedStack):
    """The system that the USP paper measured: all heads are exchanged at once, and ring hops one by one.

    Published figures are compared with this one (paper/published.py).
    """

    overlaps_heads: ClassVar[bool] = False
    chooses_stages: ClassVar[bool] = False


@dataclass(frozen=True)
class TrainerStack:
    """`seqmesh train`: its mixes, and its own memory (trainer/memory.py). Ranks of tp share norms."""

    zero_stages: ClassVar[tuple[int, ...]] = (1, 2, 3)
    savers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tiling": ("loss", "mlp"),  # its loss always is
        "checkpointing": CHECKPOINTING,
        "offload": OFFLOAD,
    }
    overlaps_heads: ClassVar[bool] = True
    chooses_stages: ClassVar[bool] = False
    """It builds its schedules with the default of `Schedule.build`."""
    keeps_attention: ClassVar[bool] = True
    remedy: ClassVar[str | None] = None

    def numerics(self, precision: str | None, gradients: str) -> Numerics:
        """fp32 unless bf16 is asked for, whose gradients are summed in fp32."""
        if gradients != "fp32":
            raise ValueError(
                f"--gradients {gradients} with --stack trainer, which sums gradients in fp32;"
                " remove --gradients, or use --stack fused"
            )
        return numerics_for(precision or "fp32", gradients)

    def violations(self, point: Point, job: PlannedJob) -> Iterator[str]:
        """What the trainer refuses of a recipe."""
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
    "fused": FusedStack(),
    "trainer": TrainerStack(),
    "paper": PaperStack(),
}
"""Values of `--stack`."""


def stack_named(name: str) -> Stack:
    """The stack of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in STACKS:
        raise unknown("stack", name, STACKS)
    return STACKS[name]
