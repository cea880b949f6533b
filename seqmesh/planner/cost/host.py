"""The optimizer's step, on the GPU or on the host, and what is copied between the two over PCIe."""

from collections.abc import Iterator

from seqmesh.planner.cost.compute import Compute
from seqmesh.planner.cost.estimate import CostTerm, compute
from seqmesh.planner.cost.network import PCIE
from seqmesh.planner.cost.parameters import fullest_parameters, mean_parameters
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point


def host_rate(job: Job) -> float:
    """Bytes/s between a GPU and its host."""
    return job.cluster.gpu.pcie_bytes_per_s * job.assumptions.host_copy


def checkpoints_to_host(job: Job, point: Point, copied: float, busy: float) -> Iterator[CostTerm]:
    """Checkpoints down and up again, which run beside the whole compute.

    Args:
        job: of the point.
        point: whether it offloads them.
        copied: bytes, both ways.
        busy: seconds of compute that there are to hide behind.
    """
    if point.offloads_activations:
        seconds = copied / host_rate(job)
        exposed = max(0.0, seconds - busy)
        yield CostTerm(name="activations to and from the host", cause=PCIE, seconds=seconds, exposed=exposed)


def optimizer_terms(job: Job, on_gpu: Compute, point: Point) -> Iterator[CostTerm]:
    """AdamW streams its state through memory: the GPU's, or the host's after gradients came down."""
    numerics = job.numerics
    weights = fullest_parameters(job, point)
    mine = weights.sharded(point) if point.zero else weights.whole
    if not point.offloads_optimizer:
        yield compute("optimizer", on_gpu.streamed(numerics.update * mine))
        return
    # gradients down, then weights up
    copied = mine * (numerics.gradient + numerics.element) / host_rate(job)
    yield CostTerm(
        name="gradients and weights to and from the host", cause=PCIE, seconds=copied, exposed=copied
    )
    yield compute("optimizer on the host", mine * numerics.update / job.assumptions.host_memory)


def bytes_to_host(job: Job, point: Point, checkpoints: float) -> Iterator[dict[str, float]]:
    """Bytes that an average rank sends to its host and gets from it: of the optimizer, and of checkpoints."""
    numerics = job.numerics
    if point.offloads_optimizer:
        mine = mean_parameters(job, point).sharded(point)
        yield {PCIE: mine * (numerics.gradient + numerics.element)}
    if point.offloads_activations:
        yield {PCIE: checkpoints}
