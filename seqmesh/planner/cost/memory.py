"""Memory of one rank at the peak of a step: what a memory model answers, whatever the training stack.

fused_memory.py has the model of fused stacks, trainer_memory.py that of `seqmesh train`.
"""

from dataclasses import dataclass
from typing import Protocol

from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of one rank: of the fuller end stage of the pipeline."""

    categories: dict[str, int]
    """Bytes at the peak: states, activations, the moment of the peak, overhead."""
    moments: dict[str, int]
    """Bytes of each moment that could be the peak."""
    host: int
    """Bytes offloaded to the host."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.categories.values())

    def fits(self, job: Job) -> bool:
        """Whether the GPU and its share of the host hold it."""
        return self.total <= job.room and self.host <= job.assumptions.host_bytes

    def over(self, job: Job) -> int:
        """Bytes beyond the GPU's memory or its share of the host's, whichever is more."""
        return max(self.total - job.room, self.host - round(job.assumptions.host_bytes))


class MemoryModel(Protocol):
    """Memory of the points of one job."""

    def of(self, point: Point) -> StepMemory:
        """The memory of a legal point."""

    def floor(self, point: Point) -> int:
        """A lower bound of the total, in bytes, that costs less than the total."""


def overhead(job: Job) -> int:
    """Bytes that are neither states nor activations: a stated share of the GPU's memory (assumptions.py)."""
    return round(job.assumptions.overhead * job.cluster.gpu.memory_bytes)
