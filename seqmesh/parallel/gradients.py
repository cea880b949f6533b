"""Gradients of weights that are whole on every rank of tp, while each computes with a part of what they meet.

A weight's gradient is then a sum over ranks. transformers sums by a hook on `.grad`, which sums what earlier
micro-batches left there once more; here the sum is a step of the backward itself. The other way round,
DTensor makes the gradient of a sharded embedding whole on every rank; here it is cut at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


class SumOfGradients(torch.autograd.Function):
    """The identity, whose gradient is summed over the ranks of a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class OwnShard(torch.autograd.Function):
    """The identity of a sharded tensor, whose gradient is sharded alike."""

    @staticmethod
    def forward(ctx: Any, x: DTensor) -> DTensor:
        ctx.placements = x.placements
        return cast(DTensor, x.view_as(x))

    @staticmethod
    def backward(ctx: Any, *grads: DTensor) -> DTensor:
        return grads[0].redistribute(placements=ctx.placements)


def shard_gradient_of(module: nn.Module) -> None:
    """Keep the shard alone of the gradient of a module's sharded weight: an embedding's is made whole."""
    computes = module.forward

    def forward(x: Tensor) -> Any:
        with replaced(module, {"weight": OwnShard.apply(module.weight)}):
            return computes(x)

    module.forward = forward


def sum_gradients_of(module: nn.Module, mesh: DeviceMesh) -> None:
    """Sum the gradients of a module's own parameters over the ranks of a mesh, in its backward."""
    group = mesh.get_group()
    computes = module.forward

    def forward(x: Tensor) -> Any:
        own = module.named_parameters(recurse=False)
        with replaced(module, {name: SumOfGradients.apply(p, group) for name, p in own}):
            return computes(x)

    module.forward = forward


@contextmanager
def replaced(module: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """A module that computes with other tensors in place of its parameters, for a while."""
    held = dict(module._parameters)
    module._parameters.update(cast(dict[str, nn.Parameter | None], weights))
    try:
        yield
    finally:
        module._parameters.update(held)
