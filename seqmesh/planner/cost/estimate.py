"""Time of a step: every piece of work with its cause, how long it takes, and how much of that nothing hides.

    upper bound   = all terms, one after the other              no overlap
    estimate      = compute + what overlap leaves exposed       rules: heads, ring stages, ZeRO prefetch
    lower bound   = the busiest cause alone                     full overlap: T = max(T_math, T_comms)

Model FLOPs count what the model needs (forward + 2x backward); hardware does more: flash attention's backward
is 2.5x, and checkpointing repeats the forward. MFU is reported twice: `mfu_causal` counts the mask's exact
pairs (for a causal mask 6 L h s per token), `mfu_noncausal` all pairs of each document (PaLM: 12 L h s).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from seqmesh.planner.cost.memory import StepMemory
from seqmesh.planner.inputs.point import Point
from seqmesh.schedule.hops import Stages

COMPUTE = "compute"
PIPELINE = "pipeline"


@dataclass(frozen=True, kw_only=True)
class CostTerm:
    """A part of the step on the busiest rank."""

    name: str
    cause: str
    """compute, pipeline (the bubble), or a link class."""
    seconds: float
    """Alone."""
    exposed: float
    """What it adds to the estimate."""


def compute(name: str, seconds: float) -> CostTerm:
    """Work of the GPU's own units: nothing hides it."""
    return CostTerm(name=name, cause=COMPUTE, seconds=seconds, exposed=seconds)


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """A point with its memory, time and bytes."""

    point: Point
    memory: StepMemory
    fits: bool
    terms: tuple[CostTerm, ...]
    bytes_per_step: dict[str, int]
    """Bytes that one GPU sends per link class, on average over the ranks."""
    tokens: int
    """Tokens of a step."""
    gpus: int
    layout: str
    """Of the ring."""
    stages: Stages
    """`stages` to give to Schedule.build."""
    exchanges: int
    """Exchanges of the ring that come of it."""
    imbalance: float
    """Pairs of the busiest ring rank over the mean."""
    flops: float
    """Model FLOPs of a step, of the mask's exact pairs."""
    flops_noncausal: float
    """Model FLOPs with all pairs of a sequence, or of each packed document."""
    peak: float
    """FLOP/s of one GPU by the data sheet."""

    @cached_property
    def seconds(self) -> float:
        """The estimate."""
        return sum(term.exposed for term in self.terms)

    @property
    def upper(self) -> float:
        """Seconds if nothing overlaps."""
        return sum(term.seconds for term in self.terms)

    @property
    def lower(self) -> float:
        """Seconds if everything overlaps that is not the same resource.

        The bubble is idle compute: it stays.
        """
        causes = self.by_cause(lambda term: term.seconds)
        busy = causes.pop(COMPUTE, 0.0) + causes.pop(PIPELINE, 0.0)
        return max(busy, *causes.values()) if causes else busy

    def by_cause(self, of: Callable[[CostTerm], float]) -> dict[str, float]:
        """Sums over the terms by cause."""
        sums: dict[str, float] = {}
        for term in self.terms:
            sums[term.cause] = sums.get(term.cause, 0.0) + of(term)
        return sums

    @property
    def bound_by(self) -> str:
        """What limits it: memory if it does not fit, else the cause with most of the estimate."""
        if not self.fits:
            return "memory"
        causes = self.by_cause(lambda term: term.exposed)
        return max(causes, key=lambda cause: causes[cause])

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.tokens / self.seconds

    @property
    def tflops_per_gpu(self) -> float:
        """Model FLOPs per second and GPU, in units of 10^12, causal count."""
        return self.flops / self.seconds / self.gpus / 1e12

    @property
    def mfu_causal(self) -> float:
        """Model FLOPs utilisation, of the mask's exact pairs."""
        return self.flops / self.seconds / self.gpus / self.peak

    @property
    def mfu_noncausal(self) -> float:
        """The same with all pairs of a sequence, or of each packed document (PaLM's convention)."""
        return self.flops_noncausal / self.seconds / self.gpus / self.peak
