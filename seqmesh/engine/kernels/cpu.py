"""The CPU kernel: PyTorch's flash attention for CPU.

It returns the log-sum-exp and has a block-wise backward.

It computes full blocks and square causal blocks (its `is_causal` is aligned to the top left). Other bands are
cut by tiles.py; an upper triangle is a causal one with the order of queries and keys reversed; slivers go
with a small dense mask.

Fact sheet: fp64, fp32, bf16, fp16; grouped queries natively; no softcap. An empty block would kill the
process, and a fully masked row would return lse 0: tiles have neither.
Source: aten::_scaled_dot_product_flash_attention_for_cpu and its backward, PyTorch 2.11 and later.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqmesh.engine.kernels.kernel import LogitRule, Problem
from seqmesh.engine.kernels.tiles import Tile, TileShape, cut
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

    def tiles(self, block: Band) -> Sequence[Tile]:
        """Full, square causal, reversed causal and small masked pieces."""
        return cut(block)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, rule: LogitRule) -> tuple[Tensor, Tensor]:
        """See Kernel.forward."""
        assert rule.softcap is None
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _oriented(q, tile),
            _oriented(k, tile),
            _oriented(v, tile),
            0.0,
            _is_causal(tile),
            attn_mask=_dense_mask(tile, q),
            scale=rule.scale,
        )
        if tile.shape is TileShape.REVERSED:
            return out.flip(2), lse.flip(2)
        return out, lse

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
        is_reversed = tile.shape is TileShape.REVERSED
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _oriented(grad_out, tile),
            _oriented(q, tile),
            _oriented(k, tile),
            _oriented(v, tile),
            _oriented(out, tile).to(q.dtype),
            lse.flip(2) if is_reversed else lse,
            0.0,
            _is_causal(tile),
            attn_mask=_dense_mask(tile, q),
            scale=rule.scale,
        )
        if is_reversed:
            return dq.flip(2), dk.flip(2), dv.flip(2)
        return dq, dk, dv


def _is_causal(tile: Tile) -> bool:
    return tile.shape in (TileShape.CAUSAL, TileShape.REVERSED)


def _oriented(x: Tensor, tile: Tile) -> Tensor:
    """(b, heads, rows, d) with compact heads, rows reversed if the tile asks for it.

    The kernel is slower on heads with gaps.
    """
    return x.flip(2) if tile.shape is TileShape.REVERSED else x.contiguous()


def _dense_mask(tile: Tile, q: Tensor) -> Tensor | None:
    """(nq, nk) additive mask of a MASKED tile, None for the others."""
    if tile.shape is not TileShape.MASKED:
        return None
    band = tile.band
    i = torch.arange(band.q_start, band.q_stop, device=q.device)[:, None]
    difference = i - torch.arange(band.k_start, band.k_stop, device=q.device)
    mask = torch.zeros(difference.shape, dtype=q.dtype, device=q.device)
    if band.lo is not None:
        mask = mask.masked_fill(difference < band.lo, -torch.inf)
    if band.hi is not None:
        mask = mask.masked_fill(difference > band.hi, -torch.inf)
    return mask
