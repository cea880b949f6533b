"""Memory of `seqmesh train`'s step, in the categories of the planner. trainer/memory.py has the formula."""

from seqmesh.planner.cost.attention import Loads
from seqmesh.planner.cost.memory import StepMemory, overhead
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.trainer.memory import trainer_moments


class TrainerMemory:
    """The `MemoryModel` of `TrainerStack`."""

    def __init__(self, job: Job, loads: Loads) -> None:  # noqa: ARG002
        """Made from what every memory model is made from; the formula needs no ring loads."""
        self._job = job

    def of(self, point: Point) -> StepMemory:
        """The memory of a point, of which only ulysses and ring count.

        Raises:
            ValueError: a model that the trainer cannot train.
        """
        job = self._job
        moments = trainer_moments(job.model, seq_len=job.seq_len, ulysses=point.ulysses, ring=point.ring)
        peak = max(moments, key=lambda moment: moment.total)
        present = {name: size for name, size in peak.categories.items() if size}
        return StepMemory(
            categories={**present, "overhead": overhead(job)},
            moments={moment.name: moment.total for moment in moments},
            host=0,
        )

    def floor(self, point: Point) -> int:  # noqa: ARG002
        """0: the memory itself is cheap to compute."""
        return 0
