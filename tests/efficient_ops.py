"""A stand-in for PyTorch's memory-efficient attention operators, in plain maths, with what they demand.

As many K/V heads as query heads, an aligned head dim, `is_causal` aligned to the top left, a log-sum-exp
whose rows are padded to a multiple of 32 with +inf, a mask whose rows begin at multiples of 8 elements.

Legend: b batch, h heads, n query rows, m key rows, d head dim.
Source: aten/src/ATen/native/transformers/cuda/attention.cu and attention_backward.cu of PyTorch 2.11 to 2.13.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqmesh.engine.kernels import Problem
from seqmesh.engine.kernels.efficient import CudaEfficient


class StandIn:
    """Both operators."""

    def _scaled_dot_product_efficient_attention(
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
        assert dropout == 0.0
        check(q, k, v, bias=bias)
        scores = logits(q, k, bias, is_causal, scale)
        lse = scores.logsumexp(-1)
        out = (scores - lse.unsqueeze(-1)).exp() @ v
        empty = torch.empty(0)
        return out, pad(lse, (0, -lse.shape[2] % 32), value=torch.inf), empty, empty

    def _scaled_dot_product_efficient_attention_backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        out: Tensor,
        lse: Tensor,
        seed: Tensor,
        offset: Tensor,
        dropout: float,
        wanted: list[bool],
        is_causal: bool,
        *,
        scale: float,
    ) -> tuple[Tensor, ...]:
        assert dropout == 0.0
        assert wanted == [True, True, True, False]
        assert seed.dtype == offset.dtype == torch.int64
        check(q, k, v, grad_out, out, bias=bias)
        rows = q.shape[2]
        assert out.transpose(1, 2).is_contiguous(), "kernel_backward.h: o_strideM() is head_dim * num_heads"
        assert lse.is_contiguous()
        assert lse.shape[2] == rows + -rows % 32
        weights = (logits(q, k, bias, is_causal, scale) - lse[:, :, :rows].unsqueeze(-1)).exp()
        delta = (grad_out * out).sum(-1, keepdim=True)
        of_scores = weights * (grad_out @ v.mT - delta) * scale
        return of_scores @ k, of_scores.mT @ q, weights.mT @ grad_out, torch.empty(0)


def check(*tensors: Tensor, bias: Tensor | None) -> None:
    """What the operators demand of their tensors."""
    q = tensors[0]
    for x in tensors:
        assert x.stride(-1) == 1
        assert x.shape[1] == q.shape[1]
        assert x.shape[3] == q.shape[3]
        assert x.shape[3] % 8 == 0
        assert x.shape[2] > 0
    if bias is not None:
        assert bias.shape == (*q.shape[:3], tensors[1].shape[2])
        assert bias.stride(-1) == 1
        assert bias.stride(2) % 8 == 0


def logits(q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """(b, h, n, m), masked."""
    scores = q @ k.mT * scale
    if bias is not None:
        scores = scores + bias
    if is_causal:
        scores = scores.masked_fill(~torch.ones(q.shape[2], k.shape[2]).tril().bool(), -torch.inf)
    return scores


class EmulatedEfficient(CudaEfficient):
    """Our kernel on the stand-in's operators."""

    name = "emulated efficient"

    def __init__(self) -> None:
        super().__init__(StandIn())

    def refusal(self, problem: Problem) -> str | None:
        """As on a GPU, but in fp64, so that errors of logic do not hide behind rounding."""
        return super().refusal(replace(problem, device_type="cuda", dtype=torch.float32))
