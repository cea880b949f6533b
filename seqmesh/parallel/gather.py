"""Whole weights again, on rank 0's host, from whatever rank holds what.

tp, fsdp     DTensor.full_tensor(): a collective of the ranks that share it, one tensor at a time
pp           the first rank of each stage sends its tensors to rank 0
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from seqmesh.parallel.adapters import what_trains
from seqmesh.parallel.model import ParallelModel


@torch.no_grad()
def whole_weights(model: ParallelModel) -> dict[str, Tensor]:
    """Every parameter by the model's own names, whole, on the host of rank 0. A collective over all ranks.

    Of a model with adapters, theirs alone.

    Returns:
        The weights on rank 0, and on other ranks nothing. A parameter that is tied comes once.
    """
    mesh = model.mesh
    others = [axis for axis in mesh.dims.degrees if axis != "pp"]
    is_first = all(mesh.rank(axis) == 0 for axis in others)
    found: dict[str, Tensor] = {}
    for name, parameter in what_trains(dict(model.named_parameters())).items():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if is_first:
            found[name] = whole.detach().cpu()
    group = mesh.group("pp")
    if group is None or not is_first:
        return found
    stages: list[dict[str, Tensor]] | None = None
    if mesh.rank("pp") == 0:
        stages = [{} for _ in range(mesh.dims.pp)]
    dist.gather_object(found, stages, group=group, group_dst=0)
    return {name: weight for stage in stages or () for name, weight in stage.items()}
