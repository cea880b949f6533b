"""A recurrence as one operator: for torch.compile, and for selective checkpoints.

The compiler must not unroll the pieces of a batch, which differ from step to step. So an operator takes the
schedule as numbers (encoding.py), as attention's does, and functions by their names. Within an operator
nothing has a graph: the backward runs the kernels again, with the entering states that the forward found,
which a checkpoint that keeps the operator's outputs needs not exchange again.

Source: torch.library.custom_op, as compiled.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqmesh.engine.merge import accumulator_dtype
from seqmesh.engine.recurrent.kernels import RecurrentKernel, Tensors
from seqmesh.engine.recurrent.rank_pieces import RankPieces, group_name
from seqmesh.engine.recurrent.recurrence import Known, Recurrence
from seqmesh.engine.recurrent.rules import Rule, rule_of
from seqmesh.engine.sharding import Schedule
from seqmesh.engine.watching import seen_inside, watched
from seqmesh.layouts import split_evenly
from seqmesh.schedule.chains import PassedSizes


class RecurrenceNames(NamedTuple):
    """Names that the operator resolves when it runs."""

    group: str
    """Of all ranks of the sequence, "" for one."""
    rule: str
    path: str
    """Of the model's function."""
    kernel: str
    tensors: str
    """With commas."""


def recur_visibly(
    rule: Rule, tensors: Tensors, schedule: Schedule, kernel: str | RecurrentKernel
) -> tuple[Tensor, Known]:
    """A recurrence as one operator: outputs, and what its backward must know."""
    with seen_inside():
        out, *known = _recurrence_op(*_arguments(rule, tensors, schedule, kernel), True)
    return out, Known(*known)


def compiled_recurrence(
    rule: Rule, tensors: Tensors, schedule: Schedule, kernel: str | RecurrentKernel
) -> Tensor:
    """The same as one differentiable node of a graph, or of meta tensors: the outputs."""
    keeps = torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())
    out: Tensor = _recurrence_op(*_arguments(rule, tensors, schedule, kernel), keeps)[0]
    return out


def _arguments(
    rule: Rule, tensors: Tensors, schedule: Schedule, kernel: str | RecurrentKernel
) -> tuple[list[Tensor], Tensor, list[int], str, list[float]]:
    """What the operator takes."""
    if not isinstance(kernel, str):
        raise ValueError(
            f"kernel={kernel!r} is an object, but torch.compile and selective checkpoints keep names;"
            " pass the name of a kernel, or 'auto'"
        )
    rule_name, known = type(rule).__name__, ",".join(tensors)
    names = RecurrenceNames(group_name(schedule), rule_name, rule.path, kernel, known)
    return list(tensors.values()), schedule._encoded, list(schedule.passed), "|".join(names), rule.numbers


def _resolved(
    tensors: Sequence[Tensor], encoded: Tensor, joined: str, numbers: list[float]
) -> tuple[Recurrence, dict[str, Tensor]]:
    """What the operator was given, as the eager functions take it."""
    names = RecurrenceNames(*joined.split("|"))
    rule = rule_of(names.rule, names.path, numbers)
    named = dict(zip(names.tensors.split(","), tensors, strict=True))
    here = RankPieces.decoded(encoded, names.group)
    return Recurrence.at(here, rule, named, names.kernel), named


@torch.library.custom_op("seqmesh::recurrence", mutates_args=())
def _recurrence_op(
    tensors: list[Tensor], encoded: Tensor, sizes: list[int], names: str, numbers: list[float], keep: bool
) -> list[Tensor]:
    """[outputs], and what the backward must know, if that is to be kept."""
    del sizes  # for the fake implementation
    recurrence, named = _resolved(tensors, encoded, names, numbers)
    with watched(), torch.no_grad():
        done = recurrence.forward(named, keeps=keep)
    out = done.out.to(tensors[0].dtype)
    # An operator gives no views of what it was given, nor two of the same tensor.
    return [x.contiguous() if x.numel() else x.clone() for x in (out, *(done.known if keep else ()))]


@_recurrence_op.register_fake
def _recurrence_fake(
    tensors: list[Tensor], encoded: Tensor, sizes: list[int], names: str, numbers: list[float], keep: bool
) -> list[Tensor]:
    """Shapes of what `_recurrence_op` returns."""
    del encoded
    found = RecurrenceNames(*names.split("|"))
    rule, first, size = rule_of(found.rule, found.path, numbers), tensors[0], PassedSizes(*sizes)
    shapes = rule.shapes(dict(zip(found.tensors.split(","), tensors, strict=True)))
    (b, n), h, wide = first.shape[:2], shapes.heads, accumulator_dtype(first.dtype)
    out = first.new_empty((b, n, h, *shapes.out))
    if not keep:
        return [out]
    cut = split_evenly(int(h), int(size.ranks))
    walked = cut[int(size.rank) + 1] - cut[int(size.rank)]
    return [
        out,
        first.new_empty((size.entered, b, h, *shapes.state), dtype=wide),
        first.new_empty((size.passed, b, walked, *shapes.transition), dtype=wide),
        first.new_empty((b, size.tokens, h, *shapes.reads), dtype=shapes.reads_dtype),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, encoded, _, *ctx.options, _ = inputs
    ctx.save_for_backward(encoded, *output[1:], *tensors)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    encoded, *saved = ctx.saved_tensors
    needed = [i for i, x in enumerate(saved[3:]) if x.requires_grad]
    grads_found = _recurrence_backward_op(grads[0], saved[3:], saved[:3], encoded, needed, *ctx.options)
    found = dict(zip(needed, grads_found, strict=True))
    return [found.get(i) for i in range(len(saved) - 3)], None, None, None, None, None


@torch.library.custom_op("seqmesh::recurrence_backward", mutates_args=())
def _recurrence_backward_op(
    grad_out: Tensor,
    tensors: list[Tensor],
    known: list[Tensor],
    encoded: Tensor,
    needed: list[int],
    names: str,
    numbers: list[float],
) -> list[Tensor]:
    """Gradients of the tensors of these numbers."""
    recurrence, named = _resolved(tensors, encoded, names, numbers)
    every = list(named)
    grads = recurrence.gradients(named, [every[i] for i in needed], grad_out, Known(*known))
    return [grad.contiguous() for grad in grads]


@_recurrence_backward_op.register_fake
def _recurrence_backward_fake(
    grad_out: Tensor,
    tensors: list[Tensor],
    known: list[Tensor],
    encoded: Tensor,
    needed: list[int],
    names: str,
    numbers: list[float],
) -> list[Tensor]:
    """Shapes of what `_recurrence_backward_op` returns."""
    del grad_out, known, encoded, names, numbers
    return [tensors[i].new_empty(tensors[i].shape) for i in needed]


_recurrence_op.register_autograd(_backward, setup_context=_save)
