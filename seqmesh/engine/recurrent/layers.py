"""Recurrences over a sharded sequence: what a model's mixer calls in place of its own.

The forward runs each piece once, from the state that truly enters it (recurrence.py). In the backward, one
node behind all outputs makes of their gradients those of the entering states (G), passes these along the
chains, and so gives each leaving state its gradient. Then every piece's own graph goes backward, once, on all
ranks at the same time.

Legend: b batch, n tokens of the rank, h heads; L / E leaving, entering pieces of the rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqmesh.engine.recurrent.kernels import RecurrentKernel, Tensors
from seqmesh.engine.recurrent.operators import compiled_recurrence, recur_visibly
from seqmesh.engine.recurrent.recurrence import Known, Recurrence
from seqmesh.engine.recurrent.rules import Rule
from seqmesh.engine.sharding import Schedule
from seqmesh.engine.watching import is_selectively_checkpointed


def recur(rule: Rule, tensors: Tensors, schedule: Schedule, kernel: str | RecurrentKernel = "auto") -> Tensor:
    """A recurrence over the documents of a schedule. A collective over its mesh.

    Args:
        rule: which, with the model's function.
        tensors: its inputs, (b, n, ...) of this rank's tokens, and those of the whole layer.
        schedule: of whole causal documents.
        kernel: "auto", the name of one ("fla", "mamba_ssm", "model"), or a `RecurrentKernel` of your own.

    Returns:
        (b, n, h, ...) outputs. Differentiable once in all tensors, as if the losses of all ranks were summed;
        the gradient of what is of the whole layer is this rank's part.

    Raises:
        ValueError: a mask or a layout that a recurrence cannot follow, rows that the schedule has not, a
            kernel that refuses, or one of your own where an operator needs a name (torch.compile, selective
            checkpoints).
    """
    if torch.compiler.is_compiling() or next(iter(tensors.values())).is_meta:
        return compiled_recurrence(rule, tensors, schedule, kernel)
    recurrence = Recurrence.of(rule, tensors, schedule, kernel)
    keeps = torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())
    out: Tensor
    if keeps and is_selectively_checkpointed():
        out = _Replayed.apply(recurrence, schedule, kernel, tuple(tensors), *tensors.values())
        return out
    done = recurrence.forward(tensors, keeps=keeps)
    if not keeps or not recurrence.here.is_cut:
        return done.out
    out = _Recur.apply(recurrence, tuple(tensors), done.known, done.out, done.left, *tensors.values())
    return out


class _Recur(torch.autograd.Function):
    """The outputs as they are; in the backward, gradients for the states that leave this rank's pieces."""

    @staticmethod
    def forward(
        ctx: Any,
        recurrence: Recurrence,
        names: tuple[str, ...],
        known: Known,
        out: Tensor,
        left: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        del left  # an input, so that it gets a gradient
        ctx.recurrence, ctx.inputs = recurrence, len(tensors)
        kept = {name: x for name, x in zip(names, tensors, strict=True) if name in recurrence.rule.kept}
        ctx.names = tuple(kept)
        ctx.save_for_backward(*known, *kept.values())
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        entering, transitions, reads, *kept = ctx.saved_tensors
        named = dict(zip(ctx.names, kept, strict=True))
        left = ctx.recurrence.leaving_gradients(named, grad_out, Known(entering, transitions, reads))
        # The inputs are there so that every rank comes here, also one without tokens.
        return None, None, None, grad_out, left, *[None] * ctx.inputs


class _Replayed(torch.autograd.Function):
    """A recurrence whose results a selective checkpoint keeps; the backward runs every piece again."""

    @staticmethod
    def forward(
        ctx: Any,
        recurrence: Recurrence,
        schedule: Schedule,
        kernel: str | RecurrentKernel,
        names: tuple[str, ...],
        *tensors: Tensor,
    ) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        out, known = recur_visibly(recurrence.rule, given, schedule, kernel)
        device = tensors[0].device.type
        ctx.recurrence, ctx.names = recurrence, names
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(*known, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        entering, transitions, reads, *tensors = ctx.saved_tensors
        known = Known(entering, transitions, reads)
        needed = [name for name, needs in zip(ctx.names, ctx.needs_input_grad[4:], strict=True) if needs]
        device, dtype, is_on = ctx.autocast
        named = dict(zip(ctx.names, tensors, strict=True))
        with torch.autocast(device, dtype=dtype, enabled=is_on):
            grads = dict(zip(needed, ctx.recurrence.gradients(named, needed, grad_out, known), strict=True))
        return None, None, None, None, *(grads.get(name) for name in ctx.names)
