"""Short causal convolutions over a sharded sequence."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqmesh.engine.recurrent.halo import Halo
from seqmesh.engine.recurrent.halo_operators import compiled_convolution, fetch_visibly
from seqmesh.engine.recurrent.rank_pieces import RankPieces
from seqmesh.engine.sharding import Schedule
from seqmesh.engine.watching import is_selectively_checkpointed

Convolution = Callable[..., Tensor]
"""(x (b, c, n), weight (c, width + 1), bias (c,) or None, activation=) -> (b, c, n), causal from zeros."""


def convolve(
    kernel: Convolution,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    schedule: Schedule,
    path: str = "",
) -> Tensor:
    """A depthwise causal convolution within each document of a schedule. A collective over its mesh.

    Args:
        kernel: what computes it on one rank.
        x: (b, c, n) of this rank's tokens.
        weight: (c, width + 1) of the `width` tokens before, and the token itself.
        bias: (c,), if any.
        activation: handed to the kernel.
        schedule: of whole causal documents.
        path: by which an operator finds the kernel, "module:name"; torch.compile needs it.

    Returns:
        (b, c, n). Differentiable once, as if the losses of all ranks were summed; the gradients of weight and
        bias are this rank's part.

    Raises:
        ValueError: a mask or a layout that a convolution cannot follow, or rows that the schedule has not.
    """
    if torch.compiler.is_compiling() or x.is_meta:
        return compiled_convolution(path, x, weight, bias, activation, schedule)
    here = RankPieces.of(schedule)
    if x.shape[2] != here.rows:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but this rank holds {here.rows} tokens of the schedule;"
            " pass (b, c, n) of the tokens that schedule.shard gives"
        )
    halo = Halo.of(here, weight.shape[-1] - 1)
    extended: Tensor = _Extend.apply(x, halo, schedule)
    return halo.own(kernel(extended, weight, bias, activation=activation))


class _Extend(torch.autograd.Function):
    """Rows with the halos of their pieces, (b, c, n) -> (b, c, m); and the transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, halo: Halo, schedule: Schedule) -> Tensor:
        ctx.halo = halo
        is_kept = is_selectively_checkpointed()
        halos = fetch_visibly(x, halo.width, schedule) if is_kept else halo.fetch(x)
        return halo.extended(x, halos)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, halos = ctx.halo.split(grad)
        ctx.halo.give_back(halos, rows)
        return rows, None, None
