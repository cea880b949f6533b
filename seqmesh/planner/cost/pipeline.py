"""Pipelines: how long ranks idle, what crosses the boundaries, and how many micro-batches a rank keeps.

    1f1b           the first micro-batch passes pp - 1 stages, its gradients come back: pp - 1 passes idle
    interleaved    each rank has `virtual` short stages: the ramps are as much shorter; a boundary for each
    zero-bubble    gradients of weights wait for the ramps: of a pass only F + B - W is idle (ZB-H1), where
                   there are micro-batches enough to wait

Sources: Narayanan et al. 2021 (arXiv 2104.04473); Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.3;
Qi et al. 2023 (arXiv 2401.10241), ZB-H1, which keeps what 1f1b keeps.
"""

from seqmesh.planner.inputs.point import Point


def idle_seconds(point: Point, micro_batches: int, a_pass: float, weights: float) -> float:
    """Seconds that a rank idles while the pipeline fills and drains.

    Args:
        point: its pipeline.
        micro_batches: of a step.
        a_pass: seconds of a micro-batch's forward and backward on a rank.
        weights: of them, those of the gradients of weights, W.
    """
    if point.pipeline == "zero-bubble":
        # The last micro-batch's own come after all else; each before it fills one gap, of pp - 1.
        filled = min(micro_batches - 1, point.pp - 1) * weights
        return max(0.0, (point.pp - 1) * (a_pass - weights) - filled)
    return (point.pp - 1) * a_pass / point.virtual


def crossings(point: Point, micro_batches: int) -> int:
    """Times that a rank sends activations or their gradients on, and waits for them in the ramps."""
    return 2 * (micro_batches * point.virtual + point.pp - 1)


def exposed_crossings(point: Point, micro_batches: int) -> int:
    """Those that no compute hides: all, or where a rank has other stages to compute, those of the ramps."""
    return crossings(point, 0 if point.virtual > 1 else micro_batches)


def boundary_bytes(point: Point, micro_batches: int, activation: float, nodes: int) -> tuple[float, float]:
    """Of the bytes that an average rank sends to other stages, the share that leaves a node; and the bytes.

    Args:
        point: its pipeline.
        micro_batches: of a step.
        activation: bytes of one that crosses, and of its gradient.
        nodes: of the pipeline's ranks.
    """
    if point.pp == 1:
        return 0.0, 0.0
    # All ranks together: a boundary between any two stages that follow one another, of which the last rank's
    # next stage is the first rank's.
    boundaries = point.virtual * point.pp - 1
    between_nodes = point.virtual * (nodes - 1) + (point.virtual - 1) * (nodes > 1)
    return between_nodes / boundaries, 2 * micro_batches * boundaries / point.pp * activation


def in_flight(point: Point, stage: int, micro_batches: int) -> float:
    """Micro-batches of whose activations a rank keeps all of its layers', at most."""
    if point.virtual == 1:
        return min(point.pp - stage, micro_batches)
    # Forwards of single stages before the first backward, and the one beside it.
    warm_up = 2 * (point.pp - stage - 1) + (point.virtual - 1) * point.pp + 1
    return min(warm_up / point.virtual, micro_batches)
