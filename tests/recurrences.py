"""The recurrences by their definitions as kernels and oracle, and random calls of them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmesh.engine.recurrent.rules import DeltaRule, Mamba2, Rule
from seqmesh.verify import definitions


def delta_rule(*args: Tensor, output_final_state: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The definition, which gives a final state whether or not it is asked for."""
    assert output_final_state
    return definitions.delta_rule(*args, **kwargs)


def mamba2(
    *args: Tensor, chunk_size: int, return_final_states: bool = False, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The same; it has no chunks."""
    assert return_final_states
    assert chunk_size == 16
    return definitions.mamba2(*args, **kwargs)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """y_t = sum over j of w_j x_{t - j}, (b, c, n)."""
    width = weight.shape[-1]
    y = F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=x.shape[1])[..., : x.shape[-1]]
    return F.silu(y) if activation == "silu" else y


def problem(kind: str, s: int, heads: int = 6, b: int = 2, dim: int = 4) -> tuple[Rule, dict[str, Tensor]]:
    """A rule and its inputs of s tokens, fp64: "delta", "kimi", "mamba2" or "bare mamba2"."""
    made = torch.Generator().manual_seed(s)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    if kind in ("delta", "kimi"):
        own = heads if kind == "kimi" else heads // 2
        g = -0.3 * draw(b, s, heads, *([dim] if kind == "kimi" else [])).abs()
        return DeltaRule(delta_rule, normalizes=True, path="recurrences:delta_rule"), {
            "query": draw(b, s, own, dim),
            "key": draw(b, s, own, dim),
            "value": draw(b, s, heads, dim + 1),
            "g": g,
            "beta": draw(b, s, heads).sigmoid(),
        }
    tensors = {
        "hidden_states": draw(b, s, heads, dim + 1),
        "dt": draw(b, s, heads),
        "A": -draw(heads).abs(),
        "B": draw(b, s, heads // 2, dim),
        "C": draw(b, s, heads // 2, dim),
    }
    path = "recurrences:mamba2"
    if kind == "bare mamba2":
        return Mamba2(mamba2, chunk_size=16, dt_limit=(0.1, 2.0), path=path), tensors
    more: dict[str, Any] = {"D": draw(heads), "dt_bias": draw(heads)}
    return Mamba2(mamba2, chunk_size=16, dt_softplus=True, path=path), tensors | more
