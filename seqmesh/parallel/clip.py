"""The norm of all gradients of all ranks, exactly, and clipping by it.

    squares of a mesh's shards  -- sum over that mesh -->  + other meshes  -- sum over pp -->  norm ** 2

Parameters lie on different meshes: a norm's weight on fsdp, a matrix that tp shares on fsdp x tp, and those
of other layers on other pipeline ranks. A square must be added once for each shard, never for a copy: DTensor
knows which are which on one mesh, so gradients are taken mesh by mesh.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from seqmesh.parallel.dims import ParallelMesh


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
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            held = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh[held].append(parameter)
    square = torch.zeros((), device=mesh.device_type)
    # Meshes in the order of the parameters, which is the same on all ranks that share them.
    for held_here in by_mesh.values():
        norm = get_total_norm([p.grad for p in held_here if p.grad is not None])
        square = square + _whole(norm) ** 2
    pipeline = mesh.group("pp")
    if pipeline is not None:
        dist.all_reduce(square, group=pipeline)
    norm = square.sqrt()
    for held_here in by_mesh.values():
        clip_grads_with_norm_(held_here, max_norm, norm)
    return norm.item()


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
