"""Less memory for activations: layers that keep little and compute the rest again, inputs on the host, tiles.

    keeps, of a layer     none           selective                     full
    its input             x              x                             x, on the host with offload
    attention's results   x              x                             x
    a recurrence's too    x              x                             x
    matrix products       x              x                             -
    everything else       x              -                             -

Attention's results are kept in every case: it is the one part of a layer whose cost grows with the square of
the tokens, and the one that communicates. So are those of layers that carry a state, which communicate too: a
step sends the same bytes whatever is recomputed.

MLPs can be cut in tiles of tokens, each recomputed by itself: only one tile's intermediate results exist, and
"selective" keeps no matrix products of them.

Source: Korthikanti et al. 2022 (selective recomputation); PyTorch's selective activation checkpoints; ALST
(Bekman et al. 2025) for tiles and for inputs on the host.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.integrations import moe  # noqa: F401  (registers its product of experts)
from transformers.modeling_layers import GradientCheckpointingLayer

from seqmesh.parallel.part import ModelPart
from seqmesh.parallel.plan import ParallelPlan

_MLPS = ("mlp", "feed_forward")
"""What models call the part of a layer that takes every token by itself."""
_EXCHANGING = (
    torch.ops.seqmesh.attention.default,
    torch.ops.seqmesh.recurrence.default,
    torch.ops.seqmesh.halo.default,
)
"""What mixes tokens of several ranks."""
_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.transformers.grouped_mm_fallback.default,  # where PyTorch's is not, as on fake tensors in fp32
)


def recompute(part: ModelPart, plan: ParallelPlan) -> None:
    """Have the layers of a part recompute what the plan says, in place. Before FSDP is applied.

    Raises:
        ValueError: layers that cannot be checkpointed, or have no MLP of a known name.
    """
    layers = part.anatomy.own_layers
    tiles = _Tiles()
    if plan.mlp_rows is not None:
        for layer in layers:
            _tile(_mlp_of(layer), plan.mlp_rows, tiles)
    if plan.recompute == "none":
        return
    kept = (*_EXCHANGING, *(_PRODUCTS if plan.recompute == "selective" else ()))
    for layer in layers:
        if not isinstance(layer, GradientCheckpointingLayer):
            raise ValueError(
                f"{type(layer).__name__} is no GradientCheckpointingLayer of transformers, so it cannot"
                ' recompute; use recompute="none"'
            )
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(_run, frozenset(kept), tiles, plan.offload)


class _Tiles:
    """Whether a tile of an MLP is being computed: the layer around it keeps nothing of that."""

    def __init__(self) -> None:
        self.in_one = False


def _run(
    kept: frozenset[Any], tiles: _Tiles, offload: bool, layer: Callable[..., Any], *inputs: Tensor
) -> Any:
    """A layer that keeps the results of some operators, and its inputs."""
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, kept, tiles))
    on_cuda = inputs[0].device.type == "cuda"
    with save_on_cpu(pin_memory=on_cuda) if offload else nullcontext():
        return checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)


def _policy(kept: frozenset[Any], tiles: _Tiles, _: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    is_kept = op in kept and not tiles.in_one
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _mlp_of(layer: nn.Module) -> nn.Module:
    for name in _MLPS:
        found = getattr(layer, name, None)
        if isinstance(found, nn.Module):
            return found
    raise ValueError(f"{type(layer).__name__} has no {' or '.join(_MLPS)} to cut in tiles; use mlp_rows=None")


def _tile(mlp: nn.Module, rows: int, tiles: _Tiles) -> None:
    """Let an MLP take `rows` tokens at a time, (b, n, H) -> (b, n, H)."""
    whole = cast(Callable[[Tensor], Tensor], mlp.forward)

    def tiled(hidden: Tensor) -> Tensor:
        tiles.in_one = True
        try:
            parts = [checkpoint(whole, tile, use_reentrant=False) for tile in hidden.split(rows, 1)]
        finally:
            tiles.in_one = False
        return torch.cat(cast(list[Tensor], parts), 1)

    mlp.forward = tiled
