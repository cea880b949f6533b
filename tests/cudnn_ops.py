"""A stand-in for PyTorch's cuDNN attention operators, in plain maths, with what they demand.

Head dims that are multiples of 8, grouped heads, `is_causal` for as many rows as columns (no other use of it
is known to be right), no bias, a log-sum-exp of (b, h, n, 1), no dropout. It counts its calls.

Legend: b batch, h query heads, g K/V heads, n query rows, m key rows, d head dim.
Source: aten/src/ATen/native/cudnn/MHA.cpp and transformers/cuda/attention.cu of PyTorch 2.11 to 2.13.
"""

from dataclasses import replace

import torch
from flash_ops import EmulatedFlash
from torch import Tensor

from seqmesh.engine.kernels import Problem
from seqmesh.engine.kernels.cudnn import CudaCudnn


class StandIn:
    """Both operators."""

    def __init__(self) -> None:
        self.calls = 0

    def _scaled_dot_product_cudnn_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        with_lse: bool,
        dropout: float,
        is_causal: bool,
        *,
        scale: float,
    ) -> tuple[Tensor, ...]:
        assert with_lse
        assert bias is None
        assert dropout == 0.0
        self.calls += 1
        check(q, k, v)
        scores = logits(q, k, is_causal, scale)
        lse = scores.logsumexp(-1, keepdim=True)
        out = (scores - lse).exp() @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        empty = torch.empty(0)
        return out, lse, empty, empty, q.shape[2], k.shape[2], empty, empty, empty

    def _scaled_dot_product_cudnn_attention_backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        seed: Tensor,
        offset: Tensor,
        bias: Tensor | None,
        q_offsets: Tensor | None,
        k_offsets: Tensor | None,
        most_queries: int,
        most_keys: int,
        dropout: float,
        is_causal: bool,
        *,
        scale: float,
    ) -> tuple[Tensor, ...]:
        assert bias is q_offsets is k_offsets is None
        assert dropout == 0.0
        assert seed.dtype == offset.dtype == torch.int64
        assert (most_queries, most_keys) == (q.shape[2], k.shape[2])
        assert lse.shape == (*q.shape[:3], 1)
        assert lse.is_contiguous()
        self.calls += 1
        check(q, k, v)
        check(grad_out, v, out)
        every_k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        every_v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        weights = (logits(q, k, is_causal, scale) - lse).exp()
        delta = (grad_out * out).sum(-1, keepdim=True)
        of_scores = weights * (grad_out @ every_v.mT - delta) * scale

        def of_groups(x: Tensor) -> Tensor:
            return x.unflatten(1, (k.shape[1], -1)).sum(2)

        return of_scores @ every_k, of_groups(of_scores.mT @ q), of_groups(weights.mT @ grad_out)


def check(*tensors: Tensor) -> None:
    """What the operators demand of their tensors."""
    for x in tensors:
        assert x.stride(-1) == 1
        assert x.shape[2] > 0
        assert x.shape[3] % 8 == 0
        assert tensors[0].shape[1] % x.shape[1] == 0


def logits(q: Tensor, k: Tensor, is_causal: bool, scale: float) -> Tensor:
    """(b, h, n, m), masked."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if is_causal:
        assert q.shape[2] == k.shape[2]
        scores = scores.masked_fill(~torch.ones(q.shape[2], k.shape[2]).tril().bool(), -torch.inf)
    return scores


class EmulatedCudnn(CudaCudnn):
    """Our kernel on both stand-ins, for blocks from a few rows on."""

    name = "emulated cudnn"

    def __init__(self, least_rows: int = 8) -> None:
        self.standin = StandIn()
        self.flash = EmulatedFlash()
        super().__init__(self.standin, self.flash, least_rows)

    def refusal(self, problem: Problem) -> str | None:
        """As on a GPU, but in every dtype, so that errors of logic do not hide behind rounding."""
        return super().refusal(replace(problem, device_type="cuda", gpu="sm90", dtype=torch.bfloat16))
