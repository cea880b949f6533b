"""The longest sequence that fits a machine: `seqmesh plan --max-seq`.

Bisection over lengths: whether a length fits is whether any legal point with these pins does, with every
memory saver that is allowed.
"""

from dataclasses import replace
from itertools import cycle
from math import lcm

from seqmesh.planner.cost.step import Pricer
from seqmesh.planner.inputs.job import LARGEST, Job
from seqmesh.planner.inputs.request import MOST_DOCUMENTS, fill
from seqmesh.planner.inputs.units import format_tokens
from seqmesh.planner.search import Pins, fits_at_all

GRAIN = 256
"""One over the share of the length to which it is found."""
LARGEST_STEP = 16384
"""Steps that are multiples of the number of GPUs as well, so that tensor parallelism can divide them, if they
are no larger.
"""


def longest(pricer: Pricer, pins: Pins) -> int:
    """Tokens of the longest sequence that fits, to 1/256 and to steps of 1024 tokens; 0 if none does.

    Documents are left out: one causal sequence needs every row that they need.
    """
    step = lcm(1024, pricer.job.cluster.gpus)
    step = step if step <= LARGEST_STEP else 1024
    if not _fits(pricer.job, step, pins):
        return 0
    low, high = 1, 2
    while high * step < LARGEST and _fits(pricer.job, high * step, pins):
        low, high = high, 2 * high
    while high - low > max(1, low // GRAIN):
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(pricer.job, middle * step, pins) else (low, middle)
    return low * step


def at_length(job: Job, seq_len: int) -> Job:
    """The same job with another length.

    Packed documents keep their lengths in order and are repeated or cut to fill it.

    Raises:
        ValueError: that takes more documents than can be laid out in reasonable time.
    """
    if job.documents and len(job.documents) * seq_len > MOST_DOCUMENTS * job.seq_len:
        raise ValueError(
            f"{format_tokens(seq_len)} tokens fit, but would be more than {MOST_DOCUMENTS} documents; use longer ones, or --seq-len"
        )
    documents = fill(seq_len, cycle(job.documents), "--documents") if job.documents else ()
    return replace(job, seq_len=seq_len, documents=documents)


def _fits(job: Job, seq_len: int, pins: Pins) -> bool:
    return fits_at_all(Pricer(replace(job, seq_len=seq_len, documents=())), pins)
