"""Attention under torch.compile: one opaque operator, so that `fullgraph=True` works and new documents do not
recompile.

Dynamo must not look into a schedule: it would unroll every stage and compile again for every batch. The
operator takes the schedule as an int64 tensor instead (`Schedule.token`), decodes it when it runs, and caches
what it decoded by its contents. The numbers are the eager ones, since the same two functions run inside.

Source: torch.library.custom_op: opaque to the compiler, differentiable through register_autograd.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from seqmesh.engine.call import make_plan, plan_for
from seqmesh.engine.kernels import Kernel
from seqmesh.engine.merge import accumulator_dtype
from seqmesh.engine.sharding import Schedule, from_token
from seqmesh.engine.ulysses import attend, attend_backward, unit_last_stride
from seqmesh.schedule.heads import default_chunks, split_heads

# Legend: b batch, n local rows, N rows of the ring rank, h query heads, g K/V heads, d head dim.
# sizes = [ulysses, ulysses_rank, ring, k_len, rows N of the queries, rows N of the keys, do queries and keys
# have the same rows]
# names = "ulysses group|ring group|kernel", an empty name for no group


def compiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    schedule: Schedule,
    *,
    scale: float | None,
    softcap: float | None,
    kernel: str | Kernel,
    head_chunks: int | None,
) -> Tensor:
    """`seqmesh.attention` as one node of the graph.

    The checks run with the operator, before any communication.

    Raises:
        ValueError: `kernel` is an object: an operator of the graph can only name one.
    """
    if not isinstance(kernel, str):
        raise ValueError(
            f"kernel={kernel!r} under torch.compile; pass the name of a kernel, or call attention outside the compiled region"
        )
    mesh = schedule.mesh
    sizes = [
        mesh.ulysses,
        mesh.ulysses_rank,
        mesh.ring,
        schedule.mask.k_len,
        schedule.ring.q_rows,
        schedule.ring.kv_rows,
    ]
    sizes.append(int(schedule.rows == schedule.kv_rows))
    names = f"{mesh.ulysses_group or ''}|{mesh.ring_group or ''}|{kernel}"
    out: Tensor = _forward_op(q, k, v, sinks, schedule.token, sizes, names, scale, softcap, head_chunks)[0]
    return out


@lru_cache(maxsize=64)
def _decode(token: bytes, ulysses_group: str, ring_group: str) -> Schedule:
    return from_token(token, ulysses_group or None, ring_group or None)


def _schedule_and_kernel(token: Tensor, names: str) -> tuple[Schedule, str]:
    ulysses_group, ring_group, kernel = names.split("|")
    return _decode(token.numpy().tobytes(), ulysses_group, ring_group), kernel


@torch.library.custom_op("seqmesh::attention", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    token: Tensor,
    sizes: list[int],
    names: str,
    scale: float | None,
    softcap: float | None,
    head_chunks: int | None,
) -> list[Tensor]:
    """[out, what the backward needs...]"""
    del sizes  # for the fake implementation
    schedule, kernel = _schedule_and_kernel(token, names)
    plan = make_plan(
        q, k, v, sinks, schedule, scale=scale, softcap=softcap, kernel=kernel, head_chunks=head_chunks
    )
    out, saved = attend(unit_last_stride(q), unit_last_stride(k), unit_last_stride(v), sinks, plan)
    return [out, *(x.contiguous() for x in saved)]


@_forward_op.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    token: Tensor,
    sizes: list[int],
    names: str,
    scale: float | None,
    softcap: float | None,
    head_chunks: int | None,
) -> list[Tensor]:
    del v, sinks, token, names, scale, softcap
    (b, _, h, d), g = q.shape, k.shape[2]
    ulysses, me, ring = map(int, sizes[:3])  # fixed in a graph; the rest may be symbolic
    k_len, rows, kv_rows, same_rows = sizes[3:]
    outputs = [torch.empty_like(q, memory_format=torch.contiguous_format)]
    chunks = default_chunks(ulysses, ring, k_len, b * g * d) if head_chunks is None else head_chunks
    for shares in split_heads(int(h), int(g), ulysses, int(chunks)):
        mine = shares[me]
        if ulysses > 1:
            widths = [(rows, mine.q + 2 * mine.kv)] if same_rows else [(rows, mine.q), (kv_rows, 2 * mine.kv)]
            outputs += [q.new_empty((n, b, width, d)) for n, width in widths]
            outputs.append(q.new_empty((rows, b, mine.q, d)))
        outputs.append(q.new_empty((b, mine.q, rows), dtype=accumulator_dtype(q.dtype)))
    return outputs


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, sinks, token, sizes, *ctx.options = inputs
    ctx.kv_shape = k.shape
    out, *saved = output
    kept = (None,) * 4 if sizes[0] > 1 else (q, k, v, out)
    ctx.save_for_backward(*kept, sinks, token, *saved)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    q, k, v, out, sinks, token, *saved = ctx.saved_tensors
    grad_out = grads[0]
    assert grad_out is not None
    found = _backward_op(grad_out, q, k, v, out, sinks, saved, token, list(ctx.kv_shape), *ctx.options)
    return *found[:3], found[3] if sinks is not None else None, *(None,) * 6


@torch.library.custom_op("seqmesh::attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor | None,
    sinks: Tensor | None,
    saved: list[Tensor],
    token: Tensor,
    kv_shape: list[int],
    names: str,
    scale: float | None,
    softcap: float | None,
    head_chunks: int | None,
) -> list[Tensor]:
    """[dq, dk, dv], and dsinks if there are sinks."""
    schedule, kernel = _schedule_and_kernel(token, names)
    plan = plan_for(
        grad_out, kv_shape[2], schedule, scale=scale, softcap=softcap, kernel=kernel, head_chunks=head_chunks
    )
    like_kv = grad_out.new_empty(kv_shape, device="meta")
    q, k, v = (unit_last_stride(like_kv if x is None else x) for x in (q, k, v))
    *grads, grad_sinks = attend_backward(
        grad_out, q, k, v, like_kv if out is None else out, sinks, saved, plan
    )
    return [*(x.contiguous() for x in grads), *(() if grad_sinks is None else (grad_sinks,))]


@_backward_op.register_fake
def _backward_fake(
    grad_out: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor | None,
    sinks: Tensor | None,
    saved: list[Tensor],
    token: Tensor,
    kv_shape: list[int],
    names: str,
    scale: float | None,
    softcap: float | None,
    head_chunks: int | None,
) -> list[Tensor]:
    del q, k, v, out, saved, token, names, scale, softcap, head_chunks
    dq = torch.empty_like(grad_out, memory_format=torch.contiguous_format)
    grads = [dq, grad_out.new_empty(kv_shape), grad_out.new_empty(kv_shape)]
    return grads if sinks is None else [*grads, torch.empty_like(sinks)]


_forward_op.register_autograd(_backward, setup_context=_setup)
