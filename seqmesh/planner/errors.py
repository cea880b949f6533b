"""How far the planner is from the truth, as stated constants: what is a tie, what wins, and error bars.

Source: `seqmesh plan --published` (docs/planner_results.md).
"""

from seqmesh.planner.cost.memory import StepMemory
from seqmesh.planner.inputs.job import Job

STEP_ERROR = 0.09
"""Of a dense model's step: the mean error over 34 published runs of other programs, 8.6%."""
MIXTURE_ERROR = 0.33
"""Of a mixture's: the mean over 37 published runs. Most are slower than predicted; half are within 16%."""
TIE = 0.03
"""Of two meshes of one job against each other: a row's mean error once a table has a constant of its own.

2.9% in Table 5, and in Table 6 without the rows that the paper leaves unexplained.
"""
MEMORY_ERROR = 0.06
"""Of a rank's memory: the mean error over the 8 of them that gave it. `--stack trainer` is within 2%."""
HEADROOM = 0.05
"""Of a GPU's memory, left free: what a plan should keep for what no formula sees."""


def step_error(job: Job) -> float:
    """How far a predicted step may be from a measured one, as a share."""
    return MIXTURE_ERROR if job.model.mixture is not None else STEP_ERROR


def is_roomy(job: Job, memory: StepMemory) -> bool:
    """Whether a point leaves that much."""
    return memory.total <= (1 - HEADROOM) * job.capacity
