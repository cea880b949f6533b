"""The training stacks that can be planned for, behind one interface.

    fused       bf16, flash attention, fused norms and activations, every parallelism: as Megatron-LM has
    trainer     `seqmesh train` on ulysses x ring alone: fp32, weights whole on every rank, nothing recomputed
    paper       what the USP paper measured: fused, with an attention that hides no exchange of heads

A `Job` holds one of them. What the planner does differently for them it asks the stack, by the questions
of `Stack`. Only their memory models are in cost/, which this folder may not import: MEMORY_MODELS of
cost/step.py says whose is which.

`seqmesh train` runs every parallelism and saver, but the formula of its own memory (trainer/memory.py) covers
the plain mesh only: other mixes are priced as the fused stack.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from seqmesh.planner.inputs.numerics import FP32, Numerics, numerics_for
from seqmesh.planner.inputs.point import CHECKPOINTING, OFFLOAD, TILING, Point
from seqmesh.planner.inputs.tables import unknown


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
    def remedy(self) -> str | None:
        """What to do when nothing fits, where a larger machine or a shorter sequence is not the answer."""

    def numerics(self, precision: str, gradients: str) -> Numerics:
        """Bytes of numbers for `--precision` and `--gradients`.

        Raises:
            ValueError: the stack does not compute in them.
        """

    def violations(self, point: Point, global_batch: int) -> Iterator[str]:
        """What it does not run of a point, each with what to do."""


@dataclass(frozen=True)
class FusedStack:
    """bf16 training with every parallelism and memory saver, as Megatron-LM has it, and seqmesh.attention."""

    zero_stages: ClassVar[tuple[int, ...]] = (1, 2, 3)
    """No 0: where there are replicas, ZeRO-1 sends no more and takes less memory."""
    savers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tiling": TILING,
        "checkpointing": CHECKPOINTING,
        "offload": OFFLOAD,
    }
    overlaps_heads: ClassVar[bool] = True
    chooses_stages: ClassVar[bool] = True
    remedy: ClassVar[str | None] = None

    def numerics(self, precision: str, gradients: str) -> Numerics:
        """Any precision that can be asked for."""
        return numerics_for(precision, gradients)

    def violations(self, point: Point, global_batch: int) -> Iterator[str]:  # noqa: ARG002
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
    """`seqmesh train` where a formula knows its memory.

    Weights replicated on ulysses x ring ranks, one packed sequence a step, nothing saved.
    """

    zero_stages: ClassVar[tuple[int, ...]] = (0,)
    savers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tiling": ("none",),
        "checkpointing": ("none",),
        "offload": ("none",),
    }
    overlaps_heads: ClassVar[bool] = True
    chooses_stages: ClassVar[bool] = False
    """It builds its schedules with the default of `Schedule.build`."""
    remedy: ClassVar[str | None] = (
        "--stack fused prices what shards weights or recomputes, which seqmesh train runs, too"
    )
    only: ClassVar[Mapping[str, int | str]] = {
        "tp": 1,
        "dp": 1,
        "pp": 1,
        "zero": 0,
        "checkpointing": "none",
        "offload": "none",
        "tiling": "none",
    }
    """The one value of each knob that the formula covers."""

    def numerics(self, precision: str, gradients: str) -> Numerics:
        """fp32; the options must be at their defaults, since anything else would be ignored."""
        for name, value, default in (("precision", precision, "bf16"), ("gradients", gradients, "fp32")):
            if value != default:
                raise ValueError(
                    f"--{name} with --stack trainer: the formula of its memory is of fp32; remove --{name},"
                    " or use --stack fused"
                )
        return FP32

    def violations(self, point: Point, global_batch: int) -> Iterator[str]:
        """Every knob away from the value that the formula covers, and more than one sequence a step."""
        for key, value in self.only.items():
            given = getattr(point, key)
            if given != value:
                yield (
                    f"{key}={given} is beyond the formula of seqmesh train's memory;"
                    f" use {key}={value}, or --stack fused"
                )
        if global_batch > 1:
            yield (
                f"global_batch={global_batch} is beyond the formula of seqmesh train's memory;"
                " use --global-batch 1 and --documents, or --stack fused"
            )


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
