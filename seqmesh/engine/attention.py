"""Unified sequence-parallel attention: exchange heads, run the schedule, exchange back. Start reading here.

    q (b, n, h, d), k, v (b, n, g, d)         local rows, all heads; then for each chunk of heads
      -> scatter_heads over ulysses           the ring rank's N rows, this rank's heads     one collective
      -> stage 0: attention to own K/V        while the rows of stage 1 travel
      -> stage 1, 2, ...: to received K/V     while the rows of the next stage travel       one a stage
      -> merged (out, lse), sinks once
      -> gather_heads over ulysses            local rows, all heads                         one collective
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

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqmesh.engine.call import AttentionCall, Needs, Options, checked_call
from seqmesh.engine.compiled import attend_visibly, compiled_attention, needs_backward
from seqmesh.engine.kernels import Kernel
from seqmesh.engine.sharding import Schedule
from seqmesh.engine.ulysses import Saved, attend, attend_backward, unit_last_stride
from seqmesh.engine.watching import is_selectively_checkpointed


@overload
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
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
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
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence that is spread over a mesh. A collective: every rank calls it.

    Args:
        q: (b, n, h, d) this rank's queries, in the order of `schedule.shard`; fp64, fp32, bf16 or fp16.
        k: (b, n, g, d) this rank's keys; g divides h. In cross-attention n is the number of this rank's keys.
        v: (b, n, g, e) this rank's values; e may differ from d.
        schedule: mask, layout and mesh.
        scale: factor of the logits; default d ** -0.5.
        softcap: c for logits c tanh(logits / c).
        sinks: (h,) one learned logit per head that joins the softmax's denominator, the same on every rank.
        kernel: "auto", the name of a kernel, or a Kernel.
        head_chunks: parts of the heads, computed one after the other to divide buffers. Default: by size.
        return_lse: also return the log-sum-exp of every row's logits.

    Returns:
        (b, n, h, e) in q's dtype, or autocast's; 0 for a query that is allowed nothing. Differentiable once
        in q, k, v, sinks, as if the losses of all ranks were summed; the gradient of `sinks` is this rank's
        part: sum it over the mesh, as data-parallel wrappers do. With `return_lse` also (b, h, n): natural
        log, sinks included, fp32 (fp64 for fp64), -inf where nothing is allowed, without a gradient.

    Raises:
        ValueError: before any communication: inputs that do not fit the schedule, each other or a kernel.
    """
    attend_now = compiled_attention if torch.compiler.is_compiling() or q.is_meta else _eager
    options = Options(scale, softcap, kernel, head_chunks)
    out, lse = attend_now(*autocasted(q, k, v), sinks, schedule, options, with_lse=return_lse)
    return out if lse is None else (out, lse)


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    schedule: Schedule,
    options: Options,
    *,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`attention` outside the compiler, keeping what a backward needs if there will be one."""
    call = checked_call(q, k, v, sinks, schedule, options)
    q, k, v = unit_last_stride(q), unit_last_stride(k), unit_last_stride(v)
    if not needs_backward(q, k, v, sinks):
        done = attend(q, k, v, sinks, call, keep=False, with_lse=with_lse)
        return done.out, done.lse
    found: tuple[Tensor, Tensor | None] = _Attention.apply(q, k, v, sinks, call, options, with_lse)
    return found


def autocasted(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs in autocast's dtype where it is on, as PyTorch's own attention takes them.

    Double precision is left alone, as autocast does. Rotary embeddings under autocast give fp32 q and k
    beside a half-precision v.
    """
    device = q.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    cast = [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v)]
    return cast[0], cast[1], cast[2]


class _Attention(torch.autograd.Function):
    """`attend` and `attend_backward` (ulysses.py) as one differentiable operation."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        call: AttentionCall,
        options: Options,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if is_selectively_checkpointed() and isinstance(options.kernel, str):
            done = attend_visibly(q, k, v, sinks, call, options, with_lse=with_lse)
        else:
            done = attend(q, k, v, sinks, call, keep=True, with_lse=with_lse)
        assert done.saved is not None
        ctx.call = call
        ctx.save_for_backward(sinks, *done.saved.tensors())
        if done.lse is not None:
            ctx.mark_non_differentiable(done.lse)
        return done.out, done.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        sinks, *tensors = ctx.saved_tensors
        saved = Saved.of(tensors, ctx.call)
        q, k, v, sinks_needed, *_rest = ctx.needs_input_grad
        needs = Needs(q=q, kv=k or v, sinks=sinks_needed)
        return *attend_backward(grad_out, sinks, saved, ctx.call, needs), None, None, None
