"""Unified sequence-parallel attention: exchange heads, run the schedule, exchange back. Start reading here.

    q (b, n, h, d), k, v (b, n, g, d)           local rows, all heads
      -> scatter_heads over ulysses             the ring rank's N rows, this rank's heads       one collective
      -> stage 0: attention to own K/V          while the rows of stage 1 travel
      -> stage 1, 2, ...: to received K/V       while the rows of the next stage travel         one collective a stage
      -> merged (out, lse), sinks once
      -> gather_heads over ulysses              local rows, all heads                           one collective
    out (b, n, h, d)

The backward walks the same stages, fetches K/V again, computes each block's gradients with the *global* out
and lse, and sends partial dK/dV straight to the rows' owners, who add them up in fp32. Saved for it: q, k, v,
out and lse of this rank's rows and heads, nothing that grows with R or U, and nothing exchanged twice; at U =
1 they are the inputs and the output themselves.

Legend: b batch, n local rows, N rows of the ring rank, h query heads, g K/V heads, d head dim, U ulysses, R
ring degree. Inside, tensors are rows-first, (N, b, heads, d), so that rows are slices; kernels see (b, heads,
rows, d) views.

Source: USP (Fang & Zhao 2024), algorithm 1; DeepSpeed-Ulysses; Ring-Attention.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqmesh.engine.call import Plan, make_plan
from seqmesh.engine.compiled import compiled_attention
from seqmesh.engine.kernels import Kernel
from seqmesh.engine.sharding import Schedule
from seqmesh.engine.ulysses import attend, attend_backward, unit_last_stride


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: Schedule,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: str | Kernel = "auto",
    *,
    head_chunks: int | None = None,
) -> Tensor:
    """Exact attention over a sequence that is spread over the schedule's mesh.

    A collective: every rank of the mesh calls it.

    Args:
        q: (b, n, h, d) this rank's queries, in the order of `schedule.shard`. fp64, fp32, bf16 or fp16; any
            strides.
        k: (b, n, g, d) this rank's keys; g divides h. In cross-attention n is the number of this rank's keys.
        v: like k.
        schedule: mask, layout and mesh.
        scale: factor of the logits; default d ** -0.5.
        softcap: c for logits c tanh(logits / c).
        sinks: (h,) one learned logit per head that joins the softmax's denominator, the same on every rank.
        kernel: "auto", the name of a kernel, or a Kernel.
        head_chunks: compute the heads in that many parts, one after the other, which divides the memory of
            buffers; default: up to 4 on a ring alone, 8 where heads are exchanged, while the parts stay
            large. Must be the same on every rank.

    Returns:
        (b, n, h, d) in q's dtype; a query that the mask allows nothing is 0.

    Gradients reach q, k, v and sinks, as if the losses of all ranks were summed. Like any replicated
    parameter's, the gradient of `sinks` is this rank's part: sum it over the mesh (data-parallel wrappers
    do). Differentiable once.

    Raises:
        ValueError: before any communication, if the inputs do not fit the schedule or each other, or no
            kernel supports them.
    """
    if torch.compiler.is_compiling():
        return compiled_attention(
            q, k, v, sinks, schedule, scale=scale, softcap=softcap, kernel=kernel, head_chunks=head_chunks
        )
    plan = make_plan(
        q, k, v, sinks, schedule, scale=scale, softcap=softcap, kernel=kernel, head_chunks=head_chunks
    )
    out: Tensor = _Attention.apply(unit_last_stride(q), unit_last_stride(k), unit_last_stride(v), sinks, plan)
    return out


class _Attention(torch.autograd.Function):
    """`attend` and `attend_backward` (ulysses.py) as one differentiable operation."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan) -> Tensor:
        out, saved = attend(q, k, v, sinks, plan)
        ctx.plan, ctx.kv_shape = plan, k.shape
        kept = (None,) * 4 if plan.schedule.mesh.ulysses_group is not None else (q, k, v, out)
        ctx.save_for_backward(*kept, sinks, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        q, k, v, out, sinks, *saved = ctx.saved_tensors
        if q is None:  # heads were exchanged: the inputs were not kept, only the shape of k is still needed
            q, k, v, out = (grad_out.new_empty(ctx.kv_shape, device="meta"),) * 4
        return *attend_backward(grad_out, q, k, v, out, sinks, saved, ctx.plan), None
