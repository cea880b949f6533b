"""What a rank has of a tensor that ranks share, and the whole of it."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor, which shares its memory; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks of a group, (c, ...) -> (N c, ...), one after the other. Not differentiable."""
    name = group.group_name
    started = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), group.size(), name)
    whole: Tensor = torch.ops._c10d_functional.wait_tensor(started)
    return whole
