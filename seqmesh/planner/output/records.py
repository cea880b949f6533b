"""Candidates as data: the JSON of `seqmesh plan --json`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from seqmesh.planner.cost.estimate import Price


def record(price: Price, capacity: int, reasons: Sequence[str] = ()) -> dict[str, Any]:
    """One candidate.

    Seconds, bytes, tokens/s and TFLOP/s of model FLOPs; `mfu_causal` counts the mask's exact pairs.
    """
    return {
        **asdict(price.point),
        "fits": price.fits,
        "step_seconds": price.seconds,
        "step_seconds_lower": price.lower,
        "step_seconds_upper": price.upper,
        "tokens_per_second": price.tokens_per_second,
        "tflops_per_gpu": price.tflops_per_gpu,
        "mfu_causal": price.mfu_causal,
        "mfu_noncausal": price.mfu_noncausal,
        "memory_bytes": {**price.memory.categories, "total": price.memory.total},
        "memory_moments_bytes": price.memory.moments,
        "host_bytes": price.memory.host,
        "capacity_bytes": capacity,
        "bytes_per_step": price.bytes_per_step,
        "seconds_by_piece": {piece.name: piece.exposed for piece in price.pieces},
        "layout": price.layout,
        "ring_stages": price.exchanges,
        "imbalance": price.imbalance,
        "bound_by": price.bound_by,
        "reasons": list(reasons),
    }
