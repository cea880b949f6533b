"""The CPU kernel: PyTorch's flash attention for CPU, which returns the log-sum-exp and has a block-wise
backward.

It computes full blocks and square causal blocks (its `is_causal` is aligned to the top left). Other bands are
cut by tiles.py; an upper triangle is a causal one with the order of queries and keys reversed; slivers go
with a small dense mask.

Fact sheet: fp64, fp32, bf16, fp16; grouped queries natively; no softcap, no empty block (it would kill the
process), a fully masked row would return lse 0: tiles have none.
Source: aten::_scaled_dot_product_flash_attention_for_cpu and its backward, PyTorch 2.11 and later.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqmesh.engine.kernels import Problem
from seqmesh.engine.kernels.tiles import Shape, cut
from seqmesh.masks import Band


class CpuFlash:
    """Flash attention on CPU."""

    name = "cpu"

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot compute a problem, or None."""
        if problem.device_type != "cpu":
            return f"it runs on cpu, not on {problem.device_type}"
        if problem.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"dtype {problem.dtype} is not float64, float32, bfloat16 or float16"
        if problem.softcap is not None:
            return "it has no softcap"
        return None

    def tiles(self, block: Band) -> Sequence[Band]:
        """Full, square causal, reversed causal and small masked pieces."""
        return tuple(tile.band for tile in cut(block))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """See Kernel.forward."""
        assert softcap is None
        shape, mask = _how(band, q)
        q, k, v = (_oriented(x, shape) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None and shape is not Shape.FULL, attn_mask=mask, scale=scale
        )
        return (out.flip(2), lse.flip(2)) if shape is Shape.REVERSED else (out, lse)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        band: Band,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel.backward."""
        assert softcap is None
        shape, mask = _how(band, q)
        turn = shape is Shape.REVERSED
        grad_out, q, k, v, out = (_oriented(x, shape) for x in (grad_out, q, k, v, out))
        lse = lse.flip(2) if turn else lse
        grads: tuple[Tensor, Tensor, Tensor] = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out,
                q,
                k,
                v,
                out.to(q.dtype),
                lse,
                0.0,
                mask is None and shape is not Shape.FULL,
                attn_mask=mask,
                scale=scale,
            )
        )
        dq, dk, dv = (x.flip(2) for x in grads) if turn else grads
        return dq, dk, dv


def _oriented(x: Tensor, shape: Shape) -> Tensor:
    """(b, heads, rows, d) with compact heads, rows reversed if the tile asks for it.

    The kernel is slower on heads with gaps.
    """
    return x.flip(2) if shape is Shape.REVERSED else x.contiguous()


def _how(band: Band, q: Tensor) -> tuple[Shape, Tensor | None]:
    """The shape of a tile, and its additive mask (nq, nk) if it needs one."""
    (tile,) = cut(band)
    if tile.shape is not Shape.MASKED:
        return tile.shape, None
    i = torch.arange(band.q_start, band.q_stop, device=q.device)[:, None]
    difference = i - torch.arange(band.k_start, band.k_stop, device=q.device)
    mask = torch.zeros(difference.shape, dtype=q.dtype, device=q.device)
    if band.lo is not None:
        mask = mask.masked_fill(difference < band.lo, -torch.inf)
    if band.hi is not None:
        mask = mask.masked_fill(difference > band.hi, -torch.inf)
    return tile.shape, mask
