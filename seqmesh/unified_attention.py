"""Unified sequence-parallel attention: exchange heads, run the schedule, exchange back. Start reading here.

    q (b, n, h, d), k, v (b, n, g, d)           local rows, all heads
      -> scatter_heads over ulysses             the ring rank's N rows, this rank's heads       one collective
      -> stage 0: attention to own K/V          while the rows of stage 1 travel
      -> stage 1, 2, ...: to received K/V       while the rows of the next stage travel         one collective a stage
      -> merged (out, lse), sinks once
      -> gather_heads over ulysses              local rows, all heads                           one collective
    out (b, n, h, d)

The backward walks the same stages, fetches K/V again, computes each block's gradients with the *global* out and lse, and sends
partial dK/dV straight to the rows' owners, who add them up in fp32. Saved for it: q, k, v, out and lse of this rank's rows
and heads, nothing that grows with R or U; at U = 1 they are the inputs and the output themselves.

Legend: b batch, n local rows, N rows of the ring rank, h query heads, g K/V heads, d head dim, U ulysses, R ring degree.
Inside, tensors are rows-first, (N, b, heads, d), so that rows are slices; kernels see (b, heads, rows, d) views.

Where it sits: the torch layer's top. Source: USP (Fang & Zhao 2024), algorithm 1; DeepSpeed-Ulysses; Ring-Attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqmesh.exchange import HeadSlices, Pending, add_returned_rows_, fetch_rows, gather_heads, return_rows, scatter_heads
from seqmesh.heads import HeadShare, split_heads
from seqmesh.kernels import Kernel, Problem, select
from seqmesh.masks import Band
from seqmesh.merge import RowSums, RunningAttention, accumulator_dtype
from seqmesh.schedule import Stage
from seqmesh.sharding import Schedule

MOST_HEAD_CHUNKS = 4
"""Default limit of head chunks: with four, the buffers of a mesh of any degree stay below the size of the inputs."""
CHUNK_ELEMENTS = 1 << 18
"""By default a chunk holds at least this many elements of K per rank: below, latency costs more than memory is worth."""


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
    """Exact attention over a sequence that is spread over the schedule's mesh. A collective: every rank of the mesh calls it.

    Args:
        q: (b, n, h, d) this rank's queries, in the order of `schedule.shard`. fp64, fp32, bf16 or fp16; any strides.
        k: (b, n, g, d) this rank's keys; g divides h. In cross-attention n is the number of this rank's keys.
        v: like k.
        schedule: mask, layout and mesh.
        scale: factor of the logits; default d ** -0.5.
        softcap: c for logits c tanh(logits / c).
        sinks: (h,) one learned logit per head that joins the softmax's denominator, the same on every rank.
        kernel: "auto", the name of a kernel, or a Kernel.
        head_chunks: compute the heads in that many parts, one after the other, which divides the buffers' memory; default: up to
            4 while the parts stay large. Must be the same on every rank.

    Returns:
        (b, n, h, d) in q's dtype; a query that the mask allows nothing is 0.

    Gradients reach q, k, v and sinks, as if the losses of all ranks were summed. Like any replicated parameter's, the gradient
    of `sinks` is this rank's part: sum it over the mesh (data-parallel wrappers do). Differentiable once.

    Raises:
        ValueError: before any communication, if the inputs do not fit the schedule or each other, or no kernel supports them.
    """
    _check_inputs(q, k, v, sinks, schedule)
    _check_logits(scale, softcap)
    d, mesh = q.shape[3], schedule.mesh
    if head_chunks is None:
        head_chunks = _default_chunks(schedule, q.shape[0] * k.shape[2] * d)
    plan = _Plan(
        schedule=schedule,
        chunks=split_heads(q.shape[2], k.shape[2], mesh.ulysses, head_chunks),
        kernel=select(kernel, Problem(device_type=q.device.type, dtype=q.dtype, head_dim=d, softcap=softcap)),
        scale=d**-0.5 if scale is None else scale,
        softcap=softcap,
    )
    out: Tensor = _Attention.apply(q, k, v, sinks, plan)
    return out


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """Everything about one call that is not a tensor."""

    schedule: Schedule
    chunks: tuple[tuple[HeadShare, ...], ...]
    kernel: Kernel
    scale: float
    softcap: float | None


def _default_chunks(schedule: Schedule, elements_per_token: int) -> int:
    """Head chunks, from global sizes only: every rank must come to the same number."""
    if schedule.mesh.size == 1:
        return 1
    elements = schedule.mask.k_len * elements_per_token // schedule.mesh.size
    return max(1, min(MOST_HEAD_CHUNKS, elements // CHUNK_ELEMENTS))


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, schedule: Schedule) -> None:
    """Refuse what does not fit, on this rank, before anything is sent."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: need q (b, n, h, d) and k, v (b, n, g, d) with one b and one d; transpose or slice the inputs")
    if q.shape[0] < 1 or q.shape[3] < 1:
        raise ValueError(f"{shapes}: batch and head dim must be at least 1; skip the call for an empty batch")
    for name, x, rows in (("q", q, schedule.rows), ("k and v", k, schedule.kv_rows)):
        if x.shape[1] != rows[schedule.mesh.ulysses_rank]:
            raise ValueError(
                f"{name} has {x.shape[1]} tokens but rank {schedule.mesh.rank} of the mesh holds {rows[schedule.mesh.ulysses_rank]};"
                " pass what schedule.shard returned for this schedule"
            )
    extra = () if sinks is None else (("sinks", sinks),)
    for name, x in (("k", k), ("v", v), *extra):
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move all inputs to one device")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: one dtype is needed; cast them alike")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q is {q.dtype}: attention needs a floating dtype; cast the inputs")
    if sinks is not None and (sinks.shape != (q.shape[2],) or not sinks.dtype.is_floating_point):
        raise ValueError(f"sinks is {sinks.dtype} {tuple(sinks.shape)}; need one floating logit per query head, ({q.shape[2]},)")


def _check_logits(scale: float | None, softcap: float | None) -> None:
    """Flash kernels scale after masking: a scale of 0 or less would turn their -inf into NaN or +inf."""
    if scale is not None and not 0 < scale < inf:
        raise ValueError(f"scale={scale}: the factor of the logits must be positive and finite; negate q to flip the sign")
    if softcap is not None and not 0 < softcap < inf:
        raise ValueError(f"softcap={softcap}: the cap must be positive and finite; use None for no softcap")


class _Attention(torch.autograd.Function):
    """Forward and backward side by side, both over the same chunks of heads and the same stages."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: _Plan) -> Tensor:
        me, exchanged = plan.schedule.mesh.ulysses_rank, plan.schedule.mesh.ulysses_group is not None
        out, saved = None, []
        for shares in plan.chunks:
            mine = shares[me]
            chunk_q, chunk_k, chunk_v = _to_heads((q, k, v), plan, shares)
            chunk_sinks = None if sinks is None else sinks[mine.q_start : mine.q_stop]
            chunk_out, lse = _ring_forward(chunk_q, chunk_k, chunk_v, chunk_sinks, plan, mine)
            if not exchanged and len(plan.chunks) == 1:
                out = chunk_out.transpose(0, 1).contiguous()  # (N, b, h, d) -> (b, n, h, d)
            else:
                out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
                _from_heads_(out, chunk_out, plan, shares)
            saved += [chunk_q, chunk_k, chunk_v, chunk_out if exchanged else None, lse]
        ctx.save_for_backward(*saved, None if exchanged else out, sinks)  # without an exchange, keep the output, not a copy
        ctx.plan = plan
        assert out is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        plan: _Plan = ctx.plan
        *saved, local_out, sinks = ctx.saved_tensors
        me = plan.schedule.mesh.ulysses_rank
        q_heads, kv_heads = plan.chunks[-1][-1].q_stop, plan.chunks[-1][-1].kv_stop
        grads = _LocalGrads(grad_out, q_heads, kv_heads, plan)
        grad_sinks = None if sinks is None else torch.zeros_like(sinks)
        for chunk, shares in enumerate(plan.chunks):
            q, k, v, out, lse = saved[5 * chunk : 5 * chunk + 5]
            mine = shares[me]
            out = local_out.transpose(0, 1)[:, :, mine.q_start : mine.q_stop] if out is None else out
            (chunk_grad,) = _to_heads((grad_out,), plan, shares)
            if grad_sinks is not None:
                grad_sinks[mine.q_start : mine.q_stop] = _sinks_grad(chunk_grad, out, lse, sinks[mine.q_start : mine.q_stop])
            dq, dkv = _ring_backward(chunk_grad, q, k, v, out, lse, plan, mine)
            grads.add(dq, dkv, shares)
        return *grads.finish(), grad_sinks, None


def _to_heads(tensors: tuple[Tensor, ...], plan: _Plan, shares: Sequence[HeadShare]) -> list[Tensor]:
    """q or q, k, v: (b, n, heads, d) -> (N, b, heads of this rank, d). Views where there is nothing to exchange."""
    mesh, schedule = plan.schedule.mesh, plan.schedule
    q_ranges, kv_ranges = tuple((s.q_start, s.q_stop) for s in shares), tuple((s.kv_start, s.kv_stop) for s in shares)
    parts = [HeadSlices(x.transpose(0, 1), kv_ranges if n else q_ranges) for n, x in enumerate(tensors)]
    me = mesh.ulysses_rank
    if mesh.ulysses_group is None:
        return [tensor[:, :, ranges[me][0] : ranges[me][1]] for tensor, ranges in parts]
    if schedule.kv_rows == schedule.rows:
        together = [(parts, schedule.rows)]
    else:  # cross-attention: queries and keys have different rows
        together = [(parts[:1], schedule.rows)] + ([(parts[1:], schedule.kv_rows)] if parts[1:] else [])
    received: list[Tensor] = []
    for group_parts, rows in together:
        x = scatter_heads(group_parts, rows, me, mesh.ulysses_group)
        received += x.split([part.ranges[me][1] - part.ranges[me][0] for part in group_parts], dim=2)
    return received


def _from_heads_(out: Tensor, chunk_out: Tensor, plan: _Plan, shares: Sequence[HeadShare]) -> None:
    """Write (N, b, heads of this rank, d) of every ulysses rank to the heads of (b, n, h, d)."""
    mesh = plan.schedule.mesh
    parts = [chunk_out]
    if mesh.ulysses_group is not None:
        parts = gather_heads(chunk_out, plan.schedule.rows, [share.q for share in shares], mesh.ulysses_rank, mesh.ulysses_group)
    for share, part in zip(shares, parts, strict=True):
        out[:, :, share.q_start : share.q_stop].copy_(part.transpose(0, 1))


class _LocalGrads:
    """dq, dk, dv (b, n, heads, d) of this rank's rows, filled chunk by chunk.

    A K/V head that several ulysses ranks used gets several parts: they are added in fp32.
    """

    def __init__(self, grad_out: Tensor, q_heads: int, kv_heads: int, plan: _Plan) -> None:
        mesh, schedule = plan.schedule.mesh, plan.schedule
        b, n, _, d = grad_out.shape
        self._plan, self._dtype = plan, grad_out.dtype
        n_kv = schedule.kv_rows[mesh.ulysses_rank]
        routed_twice = sum(share.kv for chunk in plan.chunks for share in chunk) > kv_heads
        self._sums = routed_twice
        self.dq = grad_out.new_empty((b, n, q_heads, d))
        dtype = accumulator_dtype(grad_out.dtype) if routed_twice else grad_out.dtype
        self.dk = grad_out.new_zeros((b, n_kv, kv_heads, d), dtype=dtype)
        self.dv = torch.zeros_like(self.dk)

    def add(self, dq: Tensor, dkv: Tensor, shares: Sequence[HeadShare]) -> None:
        """Send dq (N, b, q heads, d) and dkv (N, b, 2 kv heads, d) of this rank's heads home, and put what arrives in place."""
        mesh, schedule = self._plan.schedule.mesh, self._plan.schedule
        if mesh.ulysses_group is None:
            arrived = [(dq, dkv)]
        elif schedule.kv_rows == schedule.rows:
            widths = [share.q + 2 * share.kv for share in shares]
            both = gather_heads(torch.cat((dq, dkv), 2), schedule.rows, widths, mesh.ulysses_rank, mesh.ulysses_group)
            arrived = [(part[:, :, : share.q], part[:, :, share.q :]) for part, share in zip(both, shares, strict=True)]
        else:
            q_parts = gather_heads(dq, schedule.rows, [share.q for share in shares], mesh.ulysses_rank, mesh.ulysses_group)
            kv_widths = [2 * share.kv for share in shares]
            kv_parts = gather_heads(dkv, schedule.kv_rows, kv_widths, mesh.ulysses_rank, mesh.ulysses_group)
            arrived = list(zip(q_parts, kv_parts, strict=True))
        for share, (part_q, part_kv) in zip(shares, arrived, strict=True):
            self.dq[:, :, share.q_start : share.q_stop].copy_(part_q.transpose(0, 1))
            for grad, part in ((self.dk, part_kv[:, :, : share.kv]), (self.dv, part_kv[:, :, share.kv :])):
                into = grad[:, :, share.kv_start : share.kv_stop]
                if self._sums:
                    into.add_(part.transpose(0, 1))
                else:
                    into.copy_(part.transpose(0, 1))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in the inputs' dtype."""
        return self.dq, self.dk.to(self._dtype), self.dv.to(self._dtype)


def _ring_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: _Plan, share: HeadShare) -> tuple[Tensor, Tensor]:
    """Attention of this rank's rows and heads to all keys: (N, b, h, d), lse (b, h, N)."""
    running, stages = RunningAttention(q), plan.schedule.ring.stages
    keys, values, coming = k, v, _fetch(k, v, plan, 1)
    for number, stage in enumerate(stages):
        if coming is not None and number:
            keys, values = _arrived(coming, stage, k)
            coming = _fetch(k, v, plan, number + 1)
        for tile in _tiles(stage, plan):
            rows, cols = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
            running.add(tile.q_start, tile.q_stop, *_forward(q[rows], keys[cols], values[cols], tile, plan, share))
    return running.finish(sinks)


def _ring_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: _Plan, share: HeadShare
) -> tuple[Tensor, Tensor]:
    """dq (N, b, h, d) and dkv (N, b, 2 g, d), the keys' heads first, in the inputs' dtype."""
    stages, mesh = plan.schedule.ring.stages, plan.schedule.mesh
    n_kv, b, g, d = k.shape
    dq, home = RowSums((q.shape[0], b, q.shape[2], d), q), RowSums((n_kv, b, 2 * g, d), k)
    keys, values, coming = k, v, _fetch(k, v, plan, 1)
    going: tuple[Pending, Stage] | None = None
    for number, stage in enumerate(stages):
        if coming is not None and number:
            keys, values = _arrived(coming, stage, k)
            coming = _fetch(k, v, plan, number + 1)
        dkv = RowSums((stage.rows_received, b, 2 * g, d), k) if number else home
        for tile in _tiles(stage, plan):
            rows, cols = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
            tensors = (grad_out[rows], q[rows], keys[cols], values[cols], out[rows])
            tile_dq, tile_dk, tile_dv = _backward(tensors, lse[:, :, rows], tile, plan, share)
            dq.add(tile.q_start, tile.q_stop, tile_dq)
            dkv.add(tile.k_start, tile.k_stop, tile_dk, tile_dv)
        if going is not None:
            add_returned_rows_(home.sums(), going[0].wait(), going[1].sends)
            going = None
        if number:
            assert mesh.ring_group is not None
            partial = dkv.sums().to(k.dtype)
            going = return_rows(partial, stage.sends, stage.receives, mesh.ring, mesh.ring_group), stage
    if going is not None:
        add_returned_rows_(home.sums(), going[0].wait(), going[1].sends)
    return dq.sums().to(q.dtype), home.sums().to(k.dtype)


def _fetch(k: Tensor, v: Tensor, plan: _Plan, number: int) -> Pending | None:
    """Start the exchange of a stage, if there is such a stage."""
    stages, mesh = plan.schedule.ring.stages, plan.schedule.mesh
    if number >= len(stages):
        return None
    assert mesh.ring_group is not None
    return fetch_rows(k, v, stages[number].sends, stages[number].receives, mesh.ring, mesh.ring_group)


def _arrived(coming: Pending, stage: Stage, k: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values (received rows, b, g, d) of a stage."""
    _, b, g, d = k.shape
    received = coming.wait().view(stage.rows_received, b, 2 * g, d)
    return received[:, :, :g], received[:, :, g:]


def _tiles(stage: Stage, plan: _Plan) -> list[Band]:
    return [tile for block in stage.blocks for tile in plan.kernel.tiles(block)]


def _heads_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)  # (rows, b, heads, d) -> (b, heads, rows, d)


def _forward(q: Tensor, k: Tensor, v: Tensor, tile: Band, plan: _Plan, share: HeadShare) -> tuple[Tensor, Tensor]:
    """The kernel on one tile: (b, h, rows, d) and (b, h, rows). One call per group of equally used K/V heads: mostly one."""
    q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
    parts = [
        plan.kernel.forward(q[:, g.q_start : g.q_stop], k[:, kv], v[:, kv], tile, plan.scale, plan.softcap)
        for g in share.groups
        for kv in (slice(g.kv_start, g.kv_stop),)
    ]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return q, q.new_zeros(q.shape[:3], dtype=accumulator_dtype(q.dtype))
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)


def _backward(tensors: tuple[Tensor, ...], lse: Tensor, tile: Band, plan: _Plan, share: HeadShare) -> list[Tensor]:
    """The kernel's gradients on one tile: dq (b, h, rows, d), dk, dv (b, g, rows, d)."""
    grad_out, q, k, v, out = map(_heads_first, tensors)
    parts = []
    for g in share.groups:
        heads, kv = slice(g.q_start, g.q_stop), slice(g.kv_start, g.kv_stop)
        inputs = (grad_out[:, heads], q[:, heads], k[:, kv], v[:, kv], out[:, heads], lse[:, heads])
        parts.append(plan.kernel.backward(*inputs, tile, plan.scale, plan.softcap))
    if len(parts) == 1:
        return list(parts[0])
    if not parts:
        return [q, k, v]
    return [torch.cat(gradients, 1) for gradients in zip(*parts, strict=True)]


def _sinks_grad(grad_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """d loss / d sinks (h,): the sink's softmax weight times minus rowsum(dout out), summed over batch and rows."""
    dtype = accumulator_dtype(out.dtype)
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)  # (N, b, h)
    weight = (sinks.to(dtype)[None, :, None] - lse).exp().permute(2, 0, 1)
    return -(weight * delta).sum((0, 1)).to(sinks.dtype)
