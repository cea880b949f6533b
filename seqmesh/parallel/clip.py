"""The norm of all gradients of all ranks, exactly, and clipping by it.

    squares of the shards that this rank counts  -- one all-reduce over all ranks -->  norm ** 2

A square counts once for each shard and never for a copy, and which is which differs: a norm's weight is
sharded over fsdp and copied over tp, a matrix is sharded over both, everything is copied over dp_replicate,
and with ZeRO-1 over all but tp and pp. So a rank counts a shard if it is the first on every axis that has
copies of it. One all-reduce gives every rank the same bits: ranks that clip by norms which differ in the last
bit would drift apart.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import get_total_norm

from seqmesh.parallel.dims import ParallelMesh
from seqmesh.parallel.shards import local_part


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, mesh: ParallelMesh) -> float:
    """Scale all gradients so that their norm over all ranks is at most `max_norm`. A collective.

    Args:
        parameters: of this rank, with gradients that are reduced already.
        max_norm: infinity to measure alone.
        mesh: of all parallelisms.

    Returns:
        The norm before clipping, the same on every rank.

    Raises:
        ValueError: max_norm that is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}: gradients would vanish or turn around; use a positive number")
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    counted = [local_part(grad) for grad in grads if _is_counted_here(grad, mesh)]
    square = get_total_norm(counted).to(device=mesh.device_type, dtype=torch.float64) ** 2
    if mesh.device_mesh is not None:
        dist.all_reduce(square)
    norm = square.sqrt()
    if grads and norm > max_norm:
        factor = float(max_norm / norm)
        torch._foreach_mul_([local_part(grad) for grad in grads], factor)
    return norm.item()


def _is_counted_here(grad: Tensor, mesh: ParallelMesh) -> bool:
    """Whether this rank is the first of those that hold the same shard of a gradient."""
    if mesh.device_mesh is None:
        return True
    sharded: set[str] = set()
    if isinstance(grad, DTensor):
        names = grad.device_mesh.mesh_dim_names
        assert names is not None
        sharded = {name for name, place in zip(names, grad.placements, strict=True) if place != Replicate()}
        if "ep" in sharded:  # the second view of the ranks of fsdp and tp, both of whose axes shard experts
            sharded |= {"fsdp", "tp"}
    return all(mesh.rank(axis) == 0 for axis in ("dp_replicate", "fsdp", "tp") if axis not in sharded)
