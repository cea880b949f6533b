"""Ulysses: swap sequence shards for head shards, run the ring on each chunk of heads, swap back; and the same
backward.

    chunk of heads    scatter_heads -> ring_forward -> gather_heads        written into out (b, n, h, d)
    its backward      scatter_heads(dout) -> ring_backward -> gather_heads      dq, dk, dv of these heads in one collective

Computing the heads in chunks divides the memory of every buffer by the number of chunks. Q, K and V travel in
one collective each way. At U = 1 nothing is exchanged and nothing copied.

Legend: b batch, n local rows, N rows of the ring rank, h query heads, g K/V heads, d head dim, U ulysses
degree.

Source: DeepSpeed-Ulysses (Jacobs et al. 2023).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqmesh.engine.call import Plan
from seqmesh.engine.exchange import HeadSlices, gather_heads, scatter_heads
from seqmesh.engine.merge import accumulator_dtype
from seqmesh.engine.ring import ring_backward, ring_forward
from seqmesh.schedule.heads import HeadShare


def unit_last_stride(x: Tensor) -> Tensor:
    """Flash kernels read a head's d numbers as one run of memory, whatever the strides say; `out.sum()` sends
    back stride 0.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan) -> tuple[Tensor, list[Tensor]]:
    """Forward: out (b, n, h, d), and for the backward, per chunk: what was received, its out if heads were
    exchanged, its lse.
    """
    mesh = plan.schedule.mesh
    exchanged = mesh.ulysses_group is not None
    out, saved = None, []
    for shares in plan.chunks:
        mine = shares[mesh.ulysses_rank]
        received = _exchange_heads((q, k, v), plan, shares)
        chunk_q, chunk_k, chunk_v = _my_heads((q, k, v), received, plan, shares)
        chunk_sinks = None if sinks is None else sinks[mine.q_start : mine.q_stop]
        chunk_out, lse = ring_forward(chunk_q, chunk_k, chunk_v, chunk_sinks, plan, mine)
        if not exchanged and len(plan.chunks) == 1:
            out = chunk_out.transpose(0, 1).contiguous()  # (N, b, h, d) -> (b, n, h, d)
        else:
            out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
            _from_heads_(out, chunk_out, plan, shares)
        saved += [*received, chunk_out, lse] if exchanged else [lse]
    assert out is not None
    return out, saved


def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sinks: Tensor | None,
    saved: Sequence[Tensor],
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and dsinks. If heads were exchanged, q, k, v and out are not read, but for the shape of k."""
    mesh = plan.schedule.mesh
    exchanged = mesh.ulysses_group is not None
    grad_out = unit_last_stride(grad_out)
    each = len(saved) // len(plan.chunks)
    grads = _LocalGrads(grad_out, k.shape, plan)
    grad_sinks = None if sinks is None else torch.zeros_like(sinks)
    for chunk, shares in enumerate(plan.chunks):
        mine = shares[mesh.ulysses_rank]
        heads = slice(mine.q_start, mine.q_stop)
        *kept, lse = saved[each * chunk : each * (chunk + 1)]
        chunk_out = kept.pop() if exchanged else out.transpose(0, 1)[:, :, heads]
        chunk_q, chunk_k, chunk_v = _my_heads((q, k, v), kept, plan, shares)
        (chunk_grad,) = _my_heads((grad_out,), _exchange_heads((grad_out,), plan, shares), plan, shares)
        if sinks is not None and grad_sinks is not None:
            grad_sinks[heads] = _sinks_grad(chunk_grad, chunk_out, lse, sinks[heads])
        dq, dkv = ring_backward(chunk_grad, chunk_q, chunk_k, chunk_v, chunk_out, lse, plan, mine)
        grads.add(dq, dkv, shares)
    return *grads.finish(), grad_sinks


def _parts(tensors: tuple[Tensor, ...], shares: Sequence[HeadShare]) -> list[HeadSlices]:
    """q, or q, k, v: (b, n, heads, d) -> rows-first views, with the heads that each ulysses rank needs."""
    q_ranges, kv_ranges = (
        tuple((s.q_start, s.q_stop) for s in shares),
        tuple((s.kv_start, s.kv_stop) for s in shares),
    )
    return [HeadSlices(x.transpose(0, 1), kv_ranges if n else q_ranges) for n, x in enumerate(tensors)]


def _exchange_heads(tensors: tuple[Tensor, ...], plan: Plan, shares: Sequence[HeadShare]) -> list[Tensor]:
    """Nothing at U = 1; else one buffer (N, b, heads of this rank over all tensors, d), or two where keys
    have other rows.
    """
    mesh, schedule, parts = plan.schedule.mesh, plan.schedule, _parts(tensors, shares)
    if mesh.ulysses_group is None:
        return []
    if schedule.kv_rows == schedule.rows or len(parts) == 1:
        return [scatter_heads(parts, schedule.rows, mesh.ulysses_rank, mesh.ulysses_group)]
    sides = ((parts[:1], schedule.rows), (parts[1:], schedule.kv_rows))
    return [scatter_heads(side, rows, mesh.ulysses_rank, mesh.ulysses_group) for side, rows in sides]


def _my_heads(
    tensors: tuple[Tensor, ...], received: Sequence[Tensor], plan: Plan, shares: Sequence[HeadShare]
) -> list[Tensor]:
    """q, or q, k, v as (N, b, heads of this rank, d): views of the received buffers, or of the inputs at U =
    1.
    """
    mine = shares[plan.schedule.mesh.ulysses_rank]
    if not received:
        return [x[:, :, slice(*ranges[0])] for x, ranges in _parts(tensors, shares)]
    if len(tensors) == 1:
        return list(received)
    if len(received) == 1:
        return list(received[0].split([mine.q, mine.kv, mine.kv], dim=2))
    return [received[0], *received[1].split([mine.kv, mine.kv], dim=2)]


def _from_heads_(out: Tensor, chunk_out: Tensor, plan: Plan, shares: Sequence[HeadShare]) -> None:
    """Write (N, b, heads of this rank, d) of every ulysses rank to the heads of (b, n, h, d)."""
    mesh = plan.schedule.mesh
    parts = [chunk_out]
    if mesh.ulysses_group is not None:
        parts = gather_heads(
            chunk_out,
            plan.schedule.rows,
            [share.q for share in shares],
            mesh.ulysses_rank,
            mesh.ulysses_group,
        )
    for share, part in zip(shares, parts, strict=True):
        out[:, :, share.q_start : share.q_stop].copy_(part.transpose(0, 1))


class _LocalGrads:
    """dq, dk, dv (b, n, heads, d) of this rank's rows, filled chunk by chunk.

    A K/V head that several ulysses ranks used gets several parts: they are added in fp32.
    """

    def __init__(self, grad_out: Tensor, kv_shape: torch.Size, plan: Plan) -> None:
        self._plan, self._dtype = plan, grad_out.dtype
        self._add_up = sum(share.kv for chunk in plan.chunks for share in chunk) > kv_shape[2]
        self.dq = torch.empty_like(grad_out, memory_format=torch.contiguous_format)
        dtype = accumulator_dtype(grad_out.dtype) if self._add_up else grad_out.dtype
        self.dk, self.dv = (grad_out.new_zeros(kv_shape, dtype=dtype) for _ in range(2))

    def add(self, dq: Tensor, dkv: Tensor, shares: Sequence[HeadShare]) -> None:
        """Send dq (N, b, q heads, d) and dkv (N, b, 2 kv heads, d) of this rank's heads home, and put what
        arrives in place.
        """
        mesh, schedule = self._plan.schedule.mesh, self._plan.schedule
        if mesh.ulysses_group is None:
            arrived = [(dq, dkv)]
        elif schedule.kv_rows == schedule.rows:
            widths = [share.q + 2 * share.kv for share in shares]
            both = gather_heads(
                torch.cat((dq, dkv), 2), schedule.rows, widths, mesh.ulysses_rank, mesh.ulysses_group
            )
            arrived = [
                (part[:, :, : share.q], part[:, :, share.q :])
                for part, share in zip(both, shares, strict=True)
            ]
        else:
            q_parts = gather_heads(
                dq, schedule.rows, [share.q for share in shares], mesh.ulysses_rank, mesh.ulysses_group
            )
            kv_widths = [2 * share.kv for share in shares]
            kv_parts = gather_heads(dkv, schedule.kv_rows, kv_widths, mesh.ulysses_rank, mesh.ulysses_group)
            arrived = list(zip(q_parts, kv_parts, strict=True))
        for share, (part_q, part_kv) in zip(shares, arrived, strict=True):
            self.dq[:, :, share.q_start : share.q_stop].copy_(part_q.transpose(0, 1))
            for grad, part in ((self.dk, part_kv[:, :, : share.kv]), (self.dv, part_kv[:, :, share.kv :])):
                into = grad[:, :, share.kv_start : share.kv_stop]
                if self._add_up:
                    into.add_(part.transpose(0, 1))
                else:
                    into.copy_(part.transpose(0, 1))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in the inputs' dtype."""
        return self.dq, self.dk.to(self._dtype), self.dv.to(self._dtype)


def _sinks_grad(grad_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """d loss / d sinks (h,): the sink's softmax weight times minus rowsum(dout out), summed over batch and
    rows.
    """
    dtype = accumulator_dtype(out.dtype)
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)  # (N, b, h)
    logits = sinks.to(dtype)[
        None, :, None
    ]  # -inf, no sink for a head, has weight 0 also in rows that see nothing
    weight = torch.where(logits == -torch.inf, 0.0, (logits - lse).exp()).permute(2, 0, 1)
    return -(weight * delta).sum((0, 1)).to(sinks.dtype)
