"""Candidates as data: the JSON of `seqmesh plan --json`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from seqmesh.planner.cost.estimate import StepEstimate


def record(estimate: StepEstimate, capacity: int, reasons: Sequence[str] = ()) -> dict[str, Any]:
    """One candidate.

    Seconds, bytes, tokens/s and TFLOP/s of model FLOPs; `mfu_causal` counts the mask's exact pairs.

    Args:
        estimate: of the candidate.
        capacity: bytes that a GPU may use.
        reasons: why it is as it is, or is not the best.
    """
    return {
        **asdict(estimate.point),
        "fits": estimate.fits,
        "step_seconds": estimate.seconds,
        "step_seconds_lower": estimate.lower,
        "step_seconds_upper": estimate.upper,
        "tokens_per_second": estimate.tokens_per_second,
        "tflops_per_gpu": estimate.tflops_per_gpu,
        "mfu_causal": estimate.mfu_causal,
        "mfu_noncausal": estimate.mfu_noncausal,
        "memory_bytes": {**estimate.memory.categories, "total": estimate.memory.total},
        "memory_moments_bytes": estimate.memory.moments,
        "host_bytes": estimate.memory.host,
        "capacity_bytes": capacity,
        "bytes_per_step": estimate.bytes_per_step,
        "seconds_by_piece": {term.name: term.exposed for term in estimate.terms},
        "layout": estimate.layout,
        "ring_stages": estimate.stages,
        "ring_exchanges": estimate.exchanges,
        "imbalance": estimate.imbalance,
        "bound_by": estimate.bound_by,
        "reasons": list(reasons),
    }
