"""What does not fit, by how much, and the cheapest thing that would make it fit."""

from seqmesh.planner.candidates import Pins
from seqmesh.planner.cost.estimate import StepEstimate
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.point import as_pin
from seqmesh.planner.inputs.units import format_bytes, format_seconds, format_tokens
from seqmesh.planner.longest import longest
from seqmesh.planner.search import fits_at_all, search

MOST_GPUS = 16384
"""Machines beyond which none is suggested."""
NODES_TRIED = (2, 4, 8, 16, 32, 64)
"""Multiples of the machine that `remedy` tries."""


def shortfall(costs: CostModel, estimate: StepEstimate, pins: Pins) -> str:
    """By how much a point does not fit, and the cheapest thing that would make it fit."""
    return f"{overflow(costs, estimate)}; {remedy(costs, pins)}"


def overflow(costs: CostModel, estimate: StepEstimate) -> str:
    """By how much a point does not fit: on the GPU, or on the host where it is only that."""
    memory = estimate.memory
    if memory.total > costs.job.capacity:
        taken = memory.total
        capacity = costs.job.capacity
        where = "a GPU"
    else:
        taken = memory.host
        capacity = round(costs.job.assumptions.host_bytes)
        where = "the host for each GPU"
    return (
        f"{estimate.point} takes {format_bytes(taken)} of the {format_bytes(capacity)} of {where},"
        f" {format_bytes(memory.over(costs.job))} too much"
    )


def remedy(costs: CostModel, pins: Pins) -> str:
    """What would make a job fit that does not.

    One pin to release, all of them, more nodes, or a shorter sequence.
    """
    if (freed := _one_pin(costs, pins)) is not None:
        return freed
    if pins and (free := best_with(costs, {})):
        return f"{free.point} would fit ({format_seconds(free.seconds)} a step)"
    cluster = costs.job.cluster
    for times in NODES_TRIED:
        if times * cluster.gpus <= MOST_GPUS and fits_at_all(costs.with_nodes(cluster.nodes * times), {}):
            return f"--nodes {cluster.nodes * times} would make it fit"
    length = longest(costs, {})
    if length:
        return f"the longest sequence that fits is {format_tokens(length)}"
    return "the weights alone do not fit; use a smaller model"


def _one_pin(costs: CostModel, pins: Pins) -> str | None:
    """The one pin whose release makes it fit, or None; of several the one that gives the fastest step."""
    freed = {key: best_with(costs, {other: pins[other] for other in pins if other != key}) for key in pins}
    found = {key: best for key, best in freed.items() if best is not None}
    if not found:
        return None
    pin, best = min(found.items(), key=lambda item: item[1].seconds)
    return (
        f"{as_pin(pin, getattr(best.point, pin))} would make it fit ({format_seconds(best.seconds)} a step)"
    )


def best_with(costs: CostModel, pins: Pins) -> StepEstimate | None:
    """The best point with these pins; None if none fits or none is legal."""
    try:
        best = search(costs, pins, top=1).best
    except ValueError:
        return None
    return best[0] if best else None
