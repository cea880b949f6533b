"""Llama 4's temperature: queries of layers without RoPE, scaled by their position in the sequence.

    scale(position) = 1 + attn_scale x log(1 + floor((position + 1) / floor_scale))

transformers counts the positions from 0 in what the layer gets, which is a shard here. So the scale of the
place in the shard is divided out and that of the position multiplied in, before attention: one factor for
every query, 1 for the first `floor_scale` (8,192) tokens.

Legend: b batch, h heads, n local tokens, d head dim.
"""

from typing import Any

import torch
from torch import Tensor, nn


def counts_from_zero(module: nn.Module) -> bool:
    """Whether a layer scales its queries by their place in what it gets."""
    return bool(getattr(module, "attn_temperature_tuning", False)) and not getattr(module, "use_rope", False)


def is_known(module: nn.Module) -> bool:
    """Whether the rule is the one above."""
    return hasattr(module, "floor_scale") and hasattr(module, "attn_scale")


def scaled_by_position(module: Any, query: Tensor, positions: Tensor | None, past: int = 0) -> Tensor:
    """Queries (b, h, n, d), scaled by transformers for places from `past` on, rescaled for (b, n)."""
    assert positions is not None  # check_forward adds them
    places = torch.arange(past, past + query.shape[2], device=query.device)
    factor = _scale(module, positions) / _scale(module, places)  # (b, n)
    return (query * factor[:, None, :, None]).to(query.dtype)


def _scale(module: Any, positions: Tensor) -> Tensor:
    steps = torch.floor((positions.float() + 1.0) / module.floor_scale)
    scale: Tensor = torch.log1p(steps) * module.attn_scale + 1.0
    return scale
