"""Memory of `seqmesh train`'s step, in the categories of the planner. train/memory/ has the formula."""

from functools import lru_cache

from seqmesh.planner.cost.memory import StepMemory, overhead
from seqmesh.planner.cost.step_loads import StepLoads
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point
from seqmesh.train.memory.peak import trainer_moments
from seqmesh.train.memory.rank import TrainedRank


class TrainerMemory:
    """The `MemoryModel` of `TrainerStack`."""

    def __init__(self, job: Job, loads: StepLoads) -> None:  # noqa: ARG002
        """Made from what every memory model is made from; the formula needs no ring loads."""
        self._job = job
        self._of = lru_cache(maxsize=4096)(self._fuller)

    def of(self, point: Point) -> StepMemory:
        """The memory of a point: of the fuller end stage of its pipeline.

        Raises:
            ValueError: a model that the trainer cannot train.
        """
        return self._of(point)

    def _fuller(self, point: Point) -> StepMemory:
        ends = sorted({0, point.pp - 1})
        stages = (self._stage(rank_of(self._job, point).at_stage(stage)) for stage in ends)
        return max(stages, key=lambda memory: memory.total)

    def _stage(self, rank: TrainedRank) -> StepMemory:
        moments = trainer_moments(rank)
        peak = max(moments, key=lambda moment: moment.total)
        present = {name: size for name, size in peak.categories.items() if size}
        sizes: dict[str, int] = {}
        for moment in moments:  # those of several micro-batches have the same names
            sizes[moment.name] = max(moment.total, sizes.get(moment.name, 0))
        return StepMemory(
            categories={**present, "overhead": overhead(self._job)},
            moments=sizes,
            host=max(moment.host for moment in moments),
        )

    def floor(self, point: Point) -> int:  # noqa: ARG002
        """0: the memory itself is cheap to compute."""
        return 0


def rank_of(job: Job, point: Point) -> TrainedRank:
    """The first rank of the first stage, as the recipe of a point runs it (output/emit.py)."""
    return TrainedRank(
        shape=job.model,
        point=point,
        seq_len=job.seq_len,
        micro_batches=job.micro_batches(point),
        is_half=job.numerics.element == 2,
        shard_norms=point.tp > 1,
    )
