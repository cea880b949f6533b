"""A stand-in for PyTorch's CUDA flash operators, in plain maths: what they promise, how they bend windows.

`StandIn` has the two operators with PyTorch's arguments, dense and packed. It rewrites windows as PyTorch's
flash_api.cpp does before the kernel sees them, aligns them to the lower right, and gives a row without keys
an output of 0 and a log-sum-exp of +inf, as the kernel does. `EmulatedFlash` is our CUDA kernel with these
operators, for tensors on the CPU.

Legend: b batch, n query rows, m key rows, h query heads, g K/V heads, d head dim, t packed rows.
Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp and mask.h of PyTorch 2.11 to 2.13.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seqmesh.engine.kernels import Problem
from seqmesh.engine.kernels.cuda import CudaFlash


def rewritten(left: int, right: int, longest_keys: int) -> tuple[int, int]:
    """The window that the kernel gets."""
    if left >= longest_keys:
        left = -1
    if right >= longest_keys:
        right = -1
    if left < 0 and right >= 0:
        left = longest_keys
    if left >= 0 and right < 0:
        right = longest_keys
    return left, right


def rewritten_by_fa3(left: int, right: int, longest_queries: int, longest_keys: int) -> tuple[int, int]:
    """The window that flash attention 3 gets, once PyTorch's registry has put it in the same place.

    Source: hopper/flash_api.cpp and mask.h of flash-attention 3.
    """
    if left >= longest_keys - 1:
        left = -1
    if right >= longest_queries - 1:
        right = -1
    if left >= 0 or right > 0:
        left = longest_keys - 1 if left < 0 else left
        right = longest_queries - 1 if right < 0 else right
    return left, right


def allowed(left: int, right: int, n: int, m: int) -> Tensor:
    """(n, m) bool: the pairs of a rewritten window."""
    row = torch.arange(n)[:, None] + m - n
    column = torch.arange(m)
    pairs = torch.ones(n, m, dtype=torch.bool)
    if left >= 0:
        pairs &= column >= row - left
    if right >= 0:
        pairs &= column <= row + right
    return pairs


class StandIn:
    """Both operators. Counts its calls, to show that many blocks are one."""

    def __init__(self) -> None:
        self.calls = 0

    def _flash_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[Tensor, ...]:
        offsets, options = arguments[:4], arguments[4:]
        assert options == (0.0, False, False)  # dropout, is_causal, return_debug_mask
        self.calls += 1
        check_inputs(q, k, v)
        out = torch.empty_like(q)
        lse = q.new_empty((q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1]))
        lse = lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        for rows, keys, lse_of in blocks(q, k, lse, offsets):
            scores, _ = logits(q[rows], k[keys], offsets[3], keywords)
            block_lse = scores.logsumexp(-1)
            weights = (scores - block_lse.unsqueeze(-1)).exp().nan_to_num(0.0)
            out[rows] = torch.einsum("hnm,mhd->nhd", weights, repeated(v[keys], q)).to(out.dtype)
            lse_of.copy_(torch.where(block_lse == -torch.inf, torch.inf, block_lse))
        empty = torch.empty(0)
        return out, lse, empty, empty, empty

    def _flash_attention_backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *arguments: Any,
        **keywords: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        offsets, options = arguments[:4], arguments[4:]
        assert options[:2] == (0.0, False)  # dropout, is_causal
        self.calls += 1
        check_inputs(grad_out, q, k, v, out)
        assert lse.is_contiguous()
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys, lse_of in blocks(q, k, lse, offsets):
            scores, wide = logits(q[rows], k[keys], offsets[3], keywords)
            weights = (scores - lse_of.unsqueeze(-1)).exp()
            gradient, output = grad_out[rows].to(wide.dtype), out[rows].to(wide.dtype)
            delta = (gradient * output).sum(-1).T.unsqueeze(-1)  # (h, n, 1)
            of_weights = torch.einsum("nhd,mhd->hnm", gradient, repeated(v[keys], q))
            of_scores = weights * (of_weights - delta) * keywords["scale"]
            dq[rows] = torch.einsum("hnm,mhd->nhd", of_scores, wide).to(dq.dtype)
            dk[keys] = reduced(torch.einsum("hnm,nhd->mhd", of_scores, q[rows].to(wide.dtype)), k)
            dv[keys] = reduced(torch.einsum("hnm,nhd->mhd", weights, gradient), v)
        return dq, dk, dv


def check_inputs(*tensors: Tensor) -> None:
    """What the operators demand of their tensors."""
    for x in tensors:
        assert x.stride(-1) == 1
        assert x.shape[-1] % 8 == 0
        assert x.shape[-1] == tensors[0].shape[-1]


def blocks(q: Tensor, k: Tensor, lse: Tensor, offsets: tuple[Any, ...]) -> Any:
    """(index of the queries, index of the keys, lse (h, n)) of every block: of a batch, or packed."""
    q_offsets, k_offsets, most_queries, most_keys = offsets
    if q_offsets is None:
        assert (most_queries, most_keys) == (q.shape[1], k.shape[1])
        for b in range(q.shape[0]):
            yield b, b, lse[b]
        return
    assert q_offsets.dtype == k_offsets.dtype == torch.int32
    assert int(q_offsets[-1]) == q.shape[0]
    assert int(k_offsets[-1]) == k.shape[0]
    assert most_queries == int(q_offsets.diff().max())
    assert most_keys == int(k_offsets.diff().max())
    for n in range(len(q_offsets) - 1):
        rows = slice(int(q_offsets[n]), int(q_offsets[n + 1]))
        yield rows, slice(int(k_offsets[n]), int(k_offsets[n + 1])), lse[:, rows]


def logits(q: Tensor, k: Tensor, longest_keys: int, keywords: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Masked logits (h, n, m) of one block, and its keys (m, h, d) with a head for every query head."""
    wide = repeated(k, q)
    scores = torch.einsum("nhd,mhd->hnm", q.to(wide.dtype), wide) * keywords["scale"]
    window = rewritten(keywords["window_size_left"], keywords["window_size_right"], longest_keys)
    return scores.masked_fill(~allowed(*window, q.shape[0], k.shape[0]), -torch.inf), wide


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """K/V heads (m, g, d) for each of the query heads, in a dtype that adds up."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(dtype).repeat_interleave(q.shape[-2] // x.shape[-2], -2)


def reduced(x: Tensor, like: Tensor) -> Tensor:
    """Gradients (m, h, d) of repeated heads, summed to (m, g, d)."""
    return x.unflatten(1, (like.shape[-2], -1)).sum(2).to(like.dtype)


class EmulatedFlash(CudaFlash):
    """Our CUDA kernel on the stand-in's operators."""

    name = "emulated flash"

    def __init__(self) -> None:
        self.standin = StandIn()
        super().__init__(self.standin)

    def refusal(self, problem: Problem) -> str | None:
        """As on a GPU of sm80, but in every dtype, so that errors of logic do not hide behind rounding."""
        return super().refusal(replace(problem, device_type="cuda", gpu="sm80", dtype=torch.bfloat16))
