"""What a model's layers call attention with: heads, head dims, windows, chunks; known without its weights.

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    calls = calls_of(model.model, model.model.layers).attention       # one forward, without numbers

Configurations name these differently, or leave them to the code; the code is what runs. Experts are passed
over, as which of them compute depends on numbers.

Legend: b batch, n tokens, h query heads, g K/V heads, d head dim of queries and keys, e of values.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from seqmesh.integrations.adapted import innermost
from seqmesh.integrations.layers import chunk_of
from seqmesh.integrations.recurrent_calls import RecurrentCall, recorded

_NAME = "seqmesh_calls"
"""Our key in transformers' tables of attention and mask functions while a model is looked at."""
_TOKENS = 2


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """What a layer calls attention with, once in every forward."""

    layer: int
    heads: int
    kv_heads: int
    key_dim: int
    """Head dim of queries and keys."""
    value_dim: int
    window: int | None
    """Tokens that a sliding window reaches back, the token itself among them."""
    chunk: int | None
    """Tokens of the chunks within which the layer attends, counted from the start of a document."""
    dropout: float


class ModelCalls(NamedTuple):
    """What a model's layers compute along the sequence, in the order of a forward."""

    attention: tuple[LayerCall, ...]
    recurrent: tuple[RecurrentCall, ...]


def calls_of(model: PreTrainedModel, layers: Sequence[nn.Module]) -> ModelCalls:
    """Every call of attention in a forward, and of what else mixes tokens.

    Args:
        model: without its head, on the meta device, in training mode, not plugged in.
        layers: its layers.

    Raises:
        ValueError: a forward that needs the numbers that it computes with.
    """
    found: list[LayerCall] = []
    recurrent: list[RecurrentCall] = []
    attend = _recording(found, layers)
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    # With a mask of all pairs transformers makes none, which would read the positions' numbers.
    pairs = torch.zeros(1, 1, _TOKENS, _TOKENS, device="meta")
    try:
        with (
            _attending_by(model, attend),
            _experts_passed_over(model),
            recorded(recurrent, layers),
            torch.no_grad(),
        ):
            model(ids, position_ids=ids, attention_mask=pairs, use_cache=False)
    # Models fail in their own ways where a shape depends on a number.
    except Exception as error:
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{type(model).__name__} cannot be looked at without its weights ({what}); use another model"
        ) from None
    return ModelCalls(tuple(found), tuple(recurrent))


def _recording(found: list[LayerCall], layers: Sequence[nn.Module]) -> Any:
    """An attention function, as transformers calls it, that notes its calls and computes nothing."""
    layer_of = {id(part): number for number, layer in enumerate(layers) for part in layer.modules()}

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **given: Any
    ) -> tuple[Tensor, None]:
        batch, heads, tokens, key_dim = query.shape
        call = LayerCall(
            layer=layer_of[id(module)],
            heads=heads,
            kv_heads=key.shape[1],
            key_dim=key_dim,
            value_dim=value.shape[3],
            window=given.get("sliding_window"),
            chunk=chunk_of(module),
            dropout=float(given.get("dropout") or 0.0),
        )
        found.append(call)
        return query.new_empty(batch, tokens, heads, call.value_dim), None  # (b, n, h, e)

    return attend


@contextmanager
def _attending_by(model: PreTrainedModel, attend: Any) -> Iterator[None]:
    """The model calls `attend`, and is what it was afterwards."""
    before = model.config._attn_implementation
    AttentionInterface().register(_NAME, attend)
    AttentionMaskInterface().register(_NAME, _no_mask)
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        model.set_attn_implementation(before)


def _no_mask(*_: Any, **__: Any) -> None:
    """Masks are not needed where nothing is computed."""


@contextmanager
def _experts_passed_over(model: PreTrainedModel) -> Iterator[None]:
    """Modules that hold the weights of several experts, and what adapts them, give back what they get."""
    modules = [module for module in model.modules() if holds_experts(innermost(module))]
    for module in modules:
        module.forward = lambda hidden, *_, **__: hidden
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def holds_experts(module: nn.Module) -> bool:
    """Whether a module has matrices of several experts in one tensor: (experts, ., .)."""
    if isinstance(module, nn.Conv1d):  # whose weight has three dimensions too
        return False
    return any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
