"""Halos as an operator, which selective checkpoints keep, and a whole short convolution, for torch.compile.

As operators.py. What a checkpoint keeps is the halos alone, a few rows a piece: the convolution of them is
cheap to run again.

Legend: b batch, c channels, n tokens of the rank.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqmesh.engine.recurrent.halo import Halo
from seqmesh.engine.recurrent.kernels import function_at
from seqmesh.engine.recurrent.rank_pieces import RankPieces, group_name
from seqmesh.engine.sharding import Schedule
from seqmesh.engine.watching import seen_inside, watched, with_graph


class ConvolutionNames(NamedTuple):
    """Names that the operator of a convolution resolves when it runs."""

    group: str
    """Of all ranks of the sequence, "" for one."""
    path: str
    """Of the kernel."""
    activation: str
    """"" for none."""


def fetch_visibly(x: Tensor, width: int, schedule: Schedule) -> Tensor:
    """`Halo.fetch` as one operator: (b, c, n) -> (pieces, b, c, width)."""
    with seen_inside():
        found: Tensor = _halo_op(x, schedule._encoded, schedule.passed.pieces, width, group_name(schedule))
    return found


def compiled_convolution(
    path: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, schedule: Schedule
) -> Tensor:
    """A short convolution as one differentiable node of a graph, or of meta tensors: (b, c, n)."""
    names = "|".join(ConvolutionNames(group_name(schedule), path, activation or ""))
    out: Tensor = _convolution_op(x, weight, bias, schedule._encoded, schedule.passed.pieces, names)[0]
    return out


@torch.library.custom_op("seqmesh::halo", mutates_args=())
def _halo_op(x: Tensor, encoded: Tensor, pieces: int, width: int, group: str) -> Tensor:
    """The rows before each piece."""
    del pieces  # for the fake implementation
    with watched():
        return Halo.of(RankPieces.decoded(encoded, group), width).fetch(x)


@_halo_op.register_fake
def _halo_fake(x: Tensor, encoded: Tensor, pieces: int, width: int, group: str) -> Tensor:
    """The shape of what `_halo_op` returns."""
    del encoded, group
    return x.new_empty((pieces, *x.shape[:2], width))


@torch.library.custom_op("seqmesh::short_convolution", mutates_args=())
def _convolution_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, encoded: Tensor, pieces: int, names: str
) -> list[Tensor]:
    """[outputs, halos]"""
    del pieces  # for the fake implementation
    group, path, activation = ConvolutionNames(*names.split("|"))
    halo = Halo.of(RankPieces.decoded(encoded, group), weight.shape[-1] - 1)
    halos = halo.fetch(x)
    out = function_at(path)(halo.extended(x, halos), weight, bias, activation=activation or None)
    return [halo.own(out).contiguous(), halos]


@_convolution_op.register_fake
def _convolution_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, encoded: Tensor, pieces: int, names: str
) -> list[Tensor]:
    """Shapes of what `_convolution_op` returns."""
    del bias, encoded, names
    return [x.new_empty(x.shape), x.new_empty((pieces, *x.shape[:2], weight.shape[-1] - 1))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, bias, encoded, _, ctx.joined = inputs
    ctx.save_for_backward(x, weight, bias, encoded, output[1])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    x, weight, bias, encoded, halos = ctx.saved_tensors
    dx, dweight, *dbias = _convolution_backward_op(grads[0], x, weight, bias, encoded, halos, ctx.joined)
    return dx, dweight, *(dbias or (None,)), None, None, None


@torch.library.custom_op("seqmesh::short_convolution_backward", mutates_args=())
def _convolution_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, encoded: Tensor, halos: Tensor, names: str
) -> list[Tensor]:
    """Gradients of x, of the weight, of the bias if there is one."""
    group, path, activation = ConvolutionNames(*names.split("|"))
    halo = Halo.of(RankPieces.decoded(encoded, group), weight.shape[-1] - 1)
    with with_graph():
        given = [halo.extended(x, halos), weight, *(() if bias is None else (bias,))]
        leaves = [part.detach().requires_grad_() for part in given]
        out = function_at(path)(leaves[0], leaves[1], *(leaves[2:] or (None,)), activation=activation or None)
        extended, *others = torch.autograd.grad(halo.own(out), leaves, grad)
    dx, dhalos = halo.split(extended)
    halo.give_back(dhalos, dx)
    return [dx.contiguous(), *others]


@_convolution_backward_op.register_fake
def _convolution_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, encoded: Tensor, halos: Tensor, names: str
) -> list[Tensor]:
    """Shapes of what `_convolution_backward_op` returns."""
    del grad, encoded, halos, names
    return [part.new_empty(part.shape) for part in (x, weight, bias) if part is not None]


_convolution_op.register_autograd(_backward, setup_context=_save)
