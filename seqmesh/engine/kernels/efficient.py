"""The CUDA kernel for fp32, which flash attention leaves out: PyTorch's memory-efficient attention.

It computes full blocks and square causal blocks, whose `is_causal` is aligned to the top left, as on CPU;
other bands are cut by tiles.py in the same way. Its backward takes a log-sum-exp that is given: with the
global one, blocks add up.

Fact sheet: fp32, fp16 and bf16 on any NVIDIA GPU that PyTorch supports; no softcap; one head dim, a multiple
of 8 (padded with zeros, which change nothing); as many K/V heads as query heads (repeated, and their
gradients summed: that costs memory); the log-sum-exp has its rows padded to a multiple of 32, and so has a
dense mask its keys to a multiple of 8.
Status: proved on an H200 (docs/gpu.md). On CPU every mask and layout runs through this file with a stand-in
for the ops (tests/efficient_ops.py).
Source: aten::_scaled_dot_product_efficient_attention and its backward, PyTorch 2.11 and later.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqmesh.engine.kernels.kernel import LogitRule, Problem
from seqmesh.engine.kernels.prepare import dense_mask, is_causal, of_one_head_dim, oriented, unpadded
from seqmesh.engine.kernels.tiles import Tile, cut
from seqmesh.masks import Band

LSE_ROWS = 32
"""The operators hold the log-sum-exp of a multiple of so many rows."""
ALIGNED = 8
"""Elements to which head dims and a mask's keys are padded."""


class CudaEfficient:
    """Memory-efficient attention on CUDA devices."""

    name = "efficient"

    def __init__(self, ops: Any = None) -> None:
        """`ops` has the two operators; default: PyTorch's."""
        self._ops = torch.ops.aten if ops is None else ops

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot compute a problem, or None."""
        if problem.device_type != "cuda":
            return f"it runs on cuda, not on {problem.device_type}"
        if problem.gpu == "rocm":
            return "it is written for NVIDIA GPUs, not for ROCm"
        if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"dtype {problem.dtype} is not float32, float16 or bfloat16"
        if problem.softcap is not None:
            return "it has no softcap"
        return None

    def tiles(self, block: Band) -> Sequence[Tile]:
        """Full, square causal, reversed causal and small masked pieces."""
        return cut(block)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, rule: LogitRule) -> tuple[Tensor, Tensor]:
        """See Kernel.forward."""
        assert rule.softcap is None
        rows, value_head_dim = q.shape[2], v.shape[3]
        q, k, v = _prepared([q, k, v], q.shape[1], tile)
        out, lse, *_ = self._ops._scaled_dot_product_efficient_attention(
            q, k, v, _bias(tile, q), True, 0.0, is_causal(tile), scale=rule.scale
        )
        return oriented(unpadded(out, value_head_dim), tile), oriented(lse[:, :, :rows], tile)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: Tile,
        rule: LogitRule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel.backward."""
        assert rule.softcap is None
        head_dim, value_head_dim, kv_heads = q.shape[3], v.shape[3], k.shape[1]
        lse = oriented(lse, tile)
        # Rows that are not there weigh nothing, as the forward has it.
        padded_lse = pad(lse, (0, -lse.shape[2] % LSE_ROWS), value=torch.inf).contiguous()
        tensors = _prepared([grad_out, q, k, v, out.to(q.dtype)], q.shape[1], tile)
        no_state = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, of which there is none
        dq, dk, dv, _ = self._ops._scaled_dot_product_efficient_attention_backward(
            *tensors[:4],
            _bias(tile, q),
            _rows_first(tensors[4]),
            padded_lse,
            no_state,
            no_state,
            0.0,
            [True, True, True, False],
            is_causal(tile),
            scale=rule.scale,
        )
        dq, dk, dv = oriented(dq, tile), oriented(dk, tile), oriented(dv, tile)
        return unpadded(dq, head_dim), _summed(dk, kv_heads, head_dim), _summed(dv, kv_heads, value_head_dim)


def _prepared(tensors: list[Tensor], heads: int, tile: Tile) -> list[Tensor]:
    """(b, heads, rows, dim) with all heads, an aligned head dim, and rows in the tile's order."""
    found = []
    for x in of_one_head_dim(tensors, ALIGNED):
        every = x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
        found.append(oriented(every, tile))
    return found


def _rows_first(out: Tensor) -> Tensor:
    """(b, h, n, e) as the forward made it, (b, n, h, e) in memory.

    In half precision the backward reads it with that stride whatever it has, and is wrong without a word.
    """
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _summed(x: Tensor, kv_heads: int, dim: int) -> Tensor:
    """Gradients (b, h, n, ...) of repeated heads, summed to (b, g, n, dim) in fp32."""
    x = unpadded(x, dim)
    if x.shape[1] == kv_heads:
        return x
    parts: Tensor = x.unflatten(1, (kv_heads, -1))
    return parts.sum(2)


def _bias(tile: Tile, q: Tensor) -> Tensor | None:
    """(b, h, nq, nk) additive mask of a MASKED tile, a view of one (nq, nk); None for the others."""
    mask = dense_mask(tile, q, ALIGNED)
    return None if mask is None else mask.expand(q.shape[0], q.shape[1], *mask.shape)
