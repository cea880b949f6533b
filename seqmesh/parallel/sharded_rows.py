"""Tensor parallelism whose ranks share the tokens of norms and residuals too, in place of copies of them.

    between layers   (1, c, H)    a rank's rows                 embedding, norms, residuals, what layers keep
      -> gather      (1, t c, H)  all rows                      before q, k, v and gate, up
      -> products    local shards of the weights, no DTensor inside
      -> scatter     (1, c, H)    sums of a rank's rows         after o and down
    experts          (1, c, H)    a rank's rows                 their router takes no others (experts.py)

Gather and scatter are each other's backward: a layer sends what it would with all-reduces, and keeps t times
less. n rows that t does not divide are padded with zeros to t c, c = ceil(n / t): norms leave zeros alone,
and attention, which must not see them, and the loss are given the first n.

Legend: n local rows, t tp degree, c rows a tp rank has, H hidden size.
Source: Korthikanti et al. 2022, sequence parallelism (of Megatron-LM: along tp, not to confuse with ours).
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from seqmesh.integrations.calls import holds_experts
from seqmesh.parallel.adapters import Styles, linear_of
from seqmesh.parallel.anatomy import Anatomy
from seqmesh.parallel.gradients import SumOfGradients, sum_gradients_of
from seqmesh.parallel.shards import gathered, local_part

_KNOWN = frozenset({"colwise", "rowwise"})
"""Styles whose collectives are replaced here."""


def share_rows(model: PreTrainedModel, mesh: DeviceMesh, styles: Styles) -> Styles:
    """Share the rows between the layers of a model, or of a part of one; its matrices where they meet rows.

    Returns:
        The styles that are left to be applied: of the embedding and the head.

    Raises:
        ValueError: layers with a style that is not known here.
    """
    anatomy = Anatomy.of(model)
    modules = dict(model.named_modules())
    inside = {f"{name}." for name, module in modules.items() if any(module is x for x in anatomy.layers)}
    left = {name: style for name, style in styles.items() if not name.startswith(tuple(inside))}
    of_layers = {name: style for name, style in styles.items() if name not in left}
    _check_known(model, of_layers)
    gathering: set[str] = set()
    for name, style in of_layers.items():
        if name in modules:
            _multiply_locally(modules[name], mesh, is_rowwise=style == "rowwise")
            gathering |= {linear_of(name).rpartition(".")[0]} if style == "colwise" else set()
        else:
            module, _, parameter = name.rpartition(".")
            ALL_PARALLEL_STYLES[style].shard_param(modules[module], parameter, mesh)
    _connect(model, mesh, gathering)
    return left


def _check_known(model: PreTrainedModel, styles: Styles) -> None:
    for name, style in styles.items():
        if style not in _KNOWN:
            raise ValueError(
                f"{type(model).__name__} has {name!r} of style {style!r}, whose rows cannot be shared; use"
                " shard_norms=False"
            )


def _connect(model: PreTrainedModel, mesh: DeviceMesh, gathering: set[str]) -> None:
    """Let embedding, norms, attention and MLP take and give the rows of the picture above."""
    anatomy = Anatomy.of(model)
    gathered = [model.get_submodule(name) for name in sorted(gathering)]
    _check_outermost(model, gathered)
    for module in gathered:
        _gather_before(module, mesh)
    for layer in anatomy.layers:
        for child in layer.children():
            if not any(child is module for module in gathered):
                _sum_gradients_within(child, mesh)
    for name in anatomy.rest:
        last = getattr(anatomy.base, name)
        if any(True for _ in last.parameters(recurse=False)):
            sum_gradients_of(last, mesh)
            last.register_forward_hook(lambda _, __, out: _whole(out, mesh))
    if any(True for _ in anatomy.embedding.parameters()):
        anatomy.embedding.register_forward_hook(lambda _, __, out: _mine(out, mesh))


def _check_outermost(model: PreTrainedModel, gathered: Sequence[nn.Module]) -> None:
    """Refuse what would take all rows inside of a block that gets a rank's: experts beside a router."""
    children = {id(child) for layer in Anatomy.of(model).layers for child in layer.children()}
    for module in gathered:
        if id(module) not in children:
            raise ValueError(
                f"{type(model).__name__} has a {type(module).__name__} inside of another block, which takes"
                " the rows of a rank of tp alone; use shard_norms=False"
            )


def _sum_gradients_within(block: nn.Module, mesh: DeviceMesh) -> None:
    """Of a norm, or of a mixture, whose router and tokens are of a rank's rows. Experts get those of many."""
    for module in block.modules():
        if any(True for _ in module.parameters(recurse=False)) and not holds_experts(module):
            sum_gradients_of(module, mesh)


def _gather_before(module: nn.Module, mesh: DeviceMesh) -> None:
    """Let attention or an MLP take all rows; attention without the padding, as its rotary tables say."""
    computes = module.forward

    def forward(*args: Any, **given: Any) -> Any:
        rotary = given.get("position_embeddings")
        rows = None if rotary is None else rotary[0].shape[1]
        if args:
            return computes(_gathered(args[0], mesh)[:, :rows], *args[1:], **given)
        hidden = _gathered(given["hidden_states"], mesh)[:, :rows]
        return computes(**(given | {"hidden_states": hidden}))

    module.forward = forward


def _multiply_locally(module: nn.Module, mesh: DeviceMesh, *, is_rowwise: bool) -> None:
    """Let a linear layer multiply by its shard, and give sums of its own rows if its columns are shared."""

    def columns(x: Tensor) -> Tensor:
        bias = module._parameters.get("bias")
        return F.linear(
            x, local_part(cast(Tensor, module.weight)), None if bias is None else local_part(bias)
        )

    def rows(x: Tensor) -> Tensor:
        summed = _scattered(F.linear(x, local_part(cast(Tensor, module.weight))), mesh)
        bias = module._parameters.get("bias")
        if bias is None:
            return summed
        total: Tensor = summed + SumOfGradients.apply(local_part(bias), mesh.get_group())
        return total

    module.forward = rows if is_rowwise else columns


def _gather(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """(1, c, H) -> (1, t c, H)"""
    return gathered(x[0], mesh.get_group())[None]


def _scatter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """(1, n, H), a summand each -> (1, c, H) of the sum"""
    name = mesh.get_group().group_name
    padded = _padded(x, mesh)[0].contiguous()
    scattered = torch.ops._c10d_functional.reduce_scatter_tensor(padded, "sum", mesh.size(), name)
    mine: Tensor = torch.ops._c10d_functional.wait_tensor(scattered)
    return mine[None]


def _own(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """(1, n, H) -> (1, c, H)"""
    return _padded(x, mesh).chunk(mesh.size(), 1)[mesh.get_local_rank()].clone()


def _padded(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[1] % mesh.size()))


Move = Callable[[Tensor, DeviceMesh], Tensor]
"""`_gather`, `_scatter` or `_own`."""


class _Moved(torch.autograd.Function):
    """Rows moved between the ranks of tp, and their gradients moved back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Move, back: Move, mesh: DeviceMesh) -> Tensor:
        ctx.back, ctx.mesh, ctx.rows = back, mesh, x.shape[1]
        return there(x, mesh)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grads[0], ctx.mesh)[:, : ctx.rows], None, None, None


def _gathered(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """All rows of which each rank goes on with a part of the work: gradients are sums."""
    return _moved(x, _gather, _scatter, mesh)


def _scattered(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Summands of all rows -> the sum of a rank's rows."""
    return _moved(x, _scatter, _gather, mesh)


def _mine(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """A rank's rows of what all ranks have alike."""
    return _moved(x, _own, _gather, mesh)


def _whole(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """All rows, with which all ranks do the same: gradients are alike."""
    return _moved(x, _gather, _own, mesh)


def _moved(x: Tensor, there: Move, back: Move, mesh: DeviceMesh) -> Tensor:
    moved: Tensor = _Moved.apply(x, there, back, mesh)
    return moved
