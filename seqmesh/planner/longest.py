"""The longest sequence that fits a machine: `seqmesh plan --max-seq`.

Bisection over lengths: whether a length fits is whether any legal point with these pins does, with every
memory saver that is allowed.
"""

from dataclasses import replace
from itertools import cycle
from math import lcm

from seqmesh.planner.candidates import Pins
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.documents import MOST_DOCUMENTS, fill
from seqmesh.planner.inputs.job import LARGEST, Job
from seqmesh.planner.inputs.units import format_tokens
from seqmesh.planner.search import fits_at_all

GRAIN = 256
"""One over the share of the length to which it is found."""
LARGEST_STEP = 16384
"""The largest step of lengths.

Steps are multiples of the number of GPUs too, so that tensor parallelism can divide them, if that makes them
no larger.
"""


def longest(costs: CostModel, pins: Pins) -> int:
    """Tokens of the longest sequence that fits, to 1/256 and to steps of 1024 tokens; 0 if none does.

    Documents are left out: one causal sequence needs every row that they need.
    """
    job = costs.job
    step = lcm(1024, job.cluster.gpus)
    if step > LARGEST_STEP:
        step = 1024

    def fits(steps: int) -> bool:
        return fits_at_all(CostModel(replace(job, seq_len=steps * step, documents=())), pins)

    if not fits(1):
        return 0
    low, high = 1, 2  # steps that fit, and steps that do not, or are not tried yet
    while high * step < LARGEST and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // GRAIN):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low * step


def at_length(job: Job, seq_len: int) -> Job:
    """The same job with another length.

    Packed documents keep their lengths in order and are repeated or cut to fill it.

    Raises:
        ValueError: that takes more documents than can be laid out in reasonable time.
    """
    if job.documents and len(job.documents) * seq_len > MOST_DOCUMENTS * job.global_batch * job.seq_len:
        raise ValueError(
            f"{format_tokens(seq_len)} tokens fit, but would be more than {MOST_DOCUMENTS} documents;"
            " use longer ones, or --seq-len"
        )
    documents: tuple[int, ...] = ()
    if job.documents:
        most = MOST_DOCUMENTS * job.global_batch
        documents = fill(seq_len * job.global_batch, cycle(job.documents), "--documents", most)
    return replace(job, seq_len=seq_len, documents=documents)
