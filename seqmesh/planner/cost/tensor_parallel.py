"""Collectives of (tokens, hidden) in a layer under tensor parallelism with its sequence parallelism.

Forward: an all-gather before and a reduce-scatter after attention and the MLP, 4. Backward: those four, and
of Megatron-LM two gathers of inputs again, which it did not keep: 10 in all, as USP (Fang & Zhao 2024, arXiv
2405.07719), Table 2, counts them. PyTorch's keeps what it gathered; and with products in fp8 it gathers their
inputs in fp8, after the cast (torchtitan, docs/float8.md).
"""

from typing import NamedTuple

from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point


class TensorCalls(NamedTuple):
    """Collectives of a layer in bf16; one in fp8 is half of one."""

    forward: float
    again: float
    """In what is computed again for the backward."""
    backward: float


def tensor_calls(job: Job, point: Point) -> TensorCalls:
    """The collectives of a layer and micro-batch."""
    stack = job.stack
    gathers = 1 if stack.keeps_gathered and job.numerics.fp8_products else 2
    again = 0
    if point.checkpointing == "full" or (
        point.checkpointing == "selective" and stack.selective == "products"
    ):
        again = gathers + 2
    elif point.checkpointing == "selective" and stack.selective == "half":  # keeps what was scattered
        again = gathers
    return TensorCalls(forward=gathers + 2, again=again, backward=4 if stack.keeps_gathered else 6)
