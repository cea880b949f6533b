"""Recurrences on a rank's share of the heads, beside tensor parallelism.

transformers' plans leave mixers whole on every rank of tp: weights, projections, convolution. But heads of a
recurrence do not meet, so each rank runs it on its own, with its own states to keep and to pass, and the
ranks of tp put the outputs together:

    q, k, v, gates      whole on every rank  ->  own heads         backward: gathered
    outputs             own heads            ->  whole             backward: own heads

Where tp divides neither the heads nor what they share, every rank runs all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from seqmesh.integrations import mixers
from seqmesh.integrations.mixers import MixerFunction
from seqmesh.integrations.recurrent_calls import divides_heads
from seqmesh.parallel.gradients import SumOfGradients
from seqmesh.parallel.shards import gathered

_HEADS = 2
"""Dimension of heads, and of groups that share keys, in what has rows."""


@dataclass(frozen=True)
class OwnHeads:
    """The ranks of tp, each with as many heads."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @staticmethod
    def of(mesh: DeviceMesh) -> "OwnHeads":
        """This rank's on the axis of tp."""
        return OwnHeads(mesh.get_group(), mesh.get_local_rank(), mesh.size())

    def own(self, x: Tensor, dim: int = _HEADS) -> Tensor:
        """This rank's part of a dimension. The gradient is whole."""
        part: Tensor = _Own.apply(x, self, dim)
        return part

    def whole(self, x: Tensor) -> Tensor:
        """The heads of all ranks, (b, n, h / size, ...) -> (b, n, h, ...)."""
        every: Tensor = _Whole.apply(x, self)
        return every

    def of_group(self, x: Tensor) -> Tensor:
        """Of (b, n, g, ...) what this rank's heads share: its part, or the group that several ranks use."""
        groups = x.shape[_HEADS]
        if groups % self.size == 0:
            return self.own(x)
        used: Tensor = SumOfGradients.apply(x, self.group)
        return used.narrow(_HEADS, self.rank * groups // self.size, 1)

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a dimension."""
        width = x.shape[dim] // self.size
        return x.narrow(dim, self.rank * width, width)

    def joined(self, x: Tensor, dim: int) -> Tensor:
        """The parts of all ranks, one after the other."""
        return gathered(x.movedim(dim, 0), self.group).movedim(0, dim)


class _Own(torch.autograd.Function):
    """The rank's part of what is whole; gradients of parts are put together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: OwnHeads, dim: int) -> Tensor:
        ctx.share, ctx.dim = share, dim
        return share.cut(x, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.share.joined(grads[0], ctx.dim), None, None


class _Whole(torch.autograd.Function):
    """What is whole of the ranks' parts; its gradient is whole on every rank, and a rank needs its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: OwnHeads) -> Tensor:
        ctx.share = share
        return share.joined(x, _HEADS).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.share.cut(grads[0], _HEADS).contiguous(), None


def share_recurrent_heads(model: nn.Module, share: OwnHeads) -> None:
    """Let the mixers of a plugged-in model run recurrences on this rank's heads, in place."""
    functions: Mapping[str, Callable[..., Any]] = mixers.by_name(
        convolution=mixers.convolution,
        delta_rule=partial(_delta_rule, share),
        scan=partial(_scan, share),
    )
    for mixer in mixers.mixers_of(model):
        mixers.rebind(mixer, functions)


def _delta_rule(
    share: OwnHeads,
    kernel: MixerFunction,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    **options: Any,
) -> tuple[Tensor, None]:
    """`mixers.delta_rule` on the rank's heads."""
    rows = (query, key, value, g, beta)
    if not divides_heads(share.size, value.shape[_HEADS], query.shape[_HEADS]):
        return mixers.delta_rule(kernel, *rows, **options)
    own = (share.of_group(query), share.of_group(key), share.own(value), share.own(g), share.own(beta))
    return share.whole(mixers.delta_rule(kernel, *own, **options)[0]), None


def _scan(
    share: OwnHeads,
    kernel: MixerFunction,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    **options: Any,
) -> Tensor:
    """`mixers.scan` on the rank's heads."""
    if not divides_heads(share.size, dt.shape[_HEADS], B.shape[_HEADS]):
        return mixers.scan(kernel, hidden_states, dt, A, B, C, **options)
    options |= {
        name: share.own(options[name], 0) for name in ("D", "dt_bias") if options.get(name) is not None
    }
    own = (share.own(hidden_states), share.own(dt), share.own(A, 0), share.of_group(B), share.of_group(C))
    return share.whole(mixers.scan(kernel, *own, **options))
