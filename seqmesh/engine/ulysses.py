"""Ulysses: swap sequence shards for head shards, run the ring on each chunk of heads, swap back.

    chunk of heads    scatter_heads -> ring_forward -> gather_heads           written into out (b, n, h, d)
    its backward      scatter_heads(dout) -> ring_backward -> gather_heads    dq, dk, dv likewise

Computing the heads in chunks divides the memory of every buffer by the number of chunks. Q, K and V of a
chunk travel in one collective each way, or in two where keys lie on rows of their own (cross-attention). At U
= 1 nothing is exchanged, and q, k and v are read where they lie.

Legend: b batch, n local rows, N rows of the ring rank, h query heads, g K/V heads, d head dim, U ulysses
degree.
Source: DeepSpeed-Ulysses (Jacobs et al. 2023).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqmesh.engine.call import AttentionCall
from seqmesh.engine.exchange import HeadSlices, gather_heads, scatter_heads
from seqmesh.engine.merge import accumulator_dtype
from seqmesh.engine.ring import ring_backward, ring_forward
from seqmesh.schedule.heads import HeadShare

Shares = tuple[HeadShare, ...]
"""Heads of every ulysses rank in one chunk."""


@dataclass(frozen=True, kw_only=True)
class LocalTensors:
    """The call's own tensors: q and out (b, n, h, d), k and v (b, n, g, d).

    They are what the backward reads at U = 1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


@dataclass(frozen=True, kw_only=True)
class ReceivedHeads:
    """What the exchange of heads delivered for one chunk, and the output made of it.

    The backward reads them at U > 1.
    """

    buffers: tuple[Tensor, ...]
    """q, k and v in one (N, b, heads, d); or q, and k with v, where keys lie on rows of their own."""
    out: Tensor
    """(N, b, h of this rank, d)"""


@dataclass(frozen=True, kw_only=True)
class SavedChunk:
    """What the forward leaves to the backward of one chunk of heads."""

    lse: Tensor
    """(b, h of this rank, N)"""
    received: ReceivedHeads | None
    """None at U = 1."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What the forward leaves to the backward: nothing that grows with R or U, nothing exchanged twice."""

    local: LocalTensors | None
    """At U = 1; None where heads are exchanged, whose chunks hold all that is needed."""
    chunks: tuple[SavedChunk, ...]

    def tensors(self) -> list[Tensor]:
        """All of them in the order that `of` knows: first the call's own, then what attention made."""
        own = [] if self.local is None else [self.local.q, self.local.k, self.local.v, self.local.out]
        return own + self.made()

    def made(self) -> list[Tensor]:
        """What attention made besides its output.

        The fake forward of compiled.py has its shapes, in this order.
        """
        found: list[Tensor] = []
        for chunk in self.chunks:
            if chunk.received is not None:
                found += [*chunk.received.buffers, chunk.received.out]
            found.append(chunk.lse)
        return found

    @staticmethod
    def of(tensors: Sequence[Tensor], call: AttentionCall) -> "Saved":
        """The structure of `tensors()`, given the call that they were saved of."""
        rest = iter(tensors)
        local = None
        if not call.exchanges_heads:
            local = LocalTensors(q=next(rest), k=next(rest), v=next(rest), out=next(rest))
        chunks = []
        for _ in call.chunks:
            received = None
            if call.exchanges_heads:
                buffers = tuple(next(rest) for _ in range(1 if call.same_rows else 2))
                received = ReceivedHeads(buffers=buffers, out=next(rest))
            chunks.append(SavedChunk(lse=next(rest), received=received))
        return Saved(local=local, chunks=tuple(chunks))


def unit_last_stride(x: Tensor) -> Tensor:
    """Flash kernels read a head's d numbers as one run of memory, whatever the strides say.

    `out.sum()` sends back a gradient of stride 0.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: AttentionCall
) -> tuple[Tensor, Saved]:
    """Forward: out (b, n, h, d), and what the backward needs."""
    out: Tensor | None = None
    chunks = []
    for shares in call.chunks:
        mine = call.mine(shares)
        buffers = _exchange_qkv(q, k, v, call, shares)  # (b, n, heads, d) -> (N, b, heads of this rank, d)
        chunk_q, chunk_k, chunk_v = _my_qkv(buffers, call, mine) if buffers else _slice_qkv(q, k, v, mine)
        # Sinks are whole on every rank: each takes those of its heads.
        chunk_sinks = None if sinks is None else sinks[mine.q_start : mine.q_stop]
        chunk_out, lse = ring_forward(chunk_q, chunk_k, chunk_v, chunk_sinks, call, mine)
        if not call.exchanges_heads and len(call.chunks) == 1:
            out = chunk_out.transpose(0, 1).contiguous()  # (N, b, h, d) -> (b, n, h, d)
        else:
            if out is None:  # not before the first chunk's buffers are gone
                out = torch.empty_like(q, memory_format=torch.contiguous_format)
            _bring_out_home_(out, chunk_out, call, shares)
        received = ReceivedHeads(buffers=buffers, out=chunk_out) if buffers else None
        chunks.append(SavedChunk(lse=lse, received=received))
    assert out is not None
    local = None if call.exchanges_heads else LocalTensors(q=q, k=k, v=v, out=out)
    return out, Saved(local=local, chunks=tuple(chunks))


def attend_backward(
    grad_out: Tensor, sinks: Tensor | None, saved: Saved, call: AttentionCall
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and dsinks, of the gradient (b, n, h, d) of the output."""
    grad_out = unit_last_stride(grad_out)
    grads = _LocalGrads(grad_out, call)
    grad_sinks = None if sinks is None else torch.zeros_like(sinks)
    for shares, chunk in zip(call.chunks, saved.chunks, strict=True):
        mine = call.mine(shares)
        heads = slice(mine.q_start, mine.q_stop)
        if chunk.received is not None:
            chunk_out = chunk.received.out
            chunk_q, chunk_k, chunk_v = _my_qkv(chunk.received.buffers, call, mine)
        else:
            assert saved.local is not None
            chunk_out = saved.local.out.transpose(0, 1)[:, :, heads]
            chunk_q, chunk_k, chunk_v = _slice_qkv(saved.local.q, saved.local.k, saved.local.v, mine)
        chunk_grad = _exchange_grad(grad_out, call, shares)  # (b, n, h, d) -> (N, b, h of this rank, d)
        if sinks is not None and grad_sinks is not None:
            grad_sinks[heads] = _sinks_grad(chunk_grad, chunk_out, chunk.lse, sinks[heads])
        dq, dkv = ring_backward(chunk_grad, chunk_q, chunk_k, chunk_v, chunk_out, chunk.lse, call, mine)
        grads.add(dq, dkv, shares)
    return *grads.finish(), grad_sinks


def _of_q(x: Tensor, shares: Shares) -> HeadSlices:
    """(b, n, h, d) as a rows-first view, with the query heads that each ulysses rank needs."""
    return HeadSlices(x.transpose(0, 1), tuple((share.q_start, share.q_stop) for share in shares))


def _of_kv(x: Tensor, shares: Shares) -> HeadSlices:
    """(b, n, g, d) as a rows-first view, with the K/V heads that each ulysses rank needs."""
    return HeadSlices(x.transpose(0, 1), tuple((share.kv_start, share.kv_stop) for share in shares))


def _exchange_qkv(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, shares: Shares) -> tuple[Tensor, ...]:
    """Nothing at U = 1; else `ReceivedHeads.buffers`."""
    schedule = call.schedule
    group = schedule.mesh.ulysses_group
    if group is None:
        return ()
    me = schedule.mesh.ulysses_rank
    q_part = _of_q(q, shares)
    kv_parts = [_of_kv(k, shares), _of_kv(v, shares)]
    if call.same_rows:
        return (scatter_heads([q_part, *kv_parts], schedule.rows, me, group),)
    return (
        scatter_heads([q_part], schedule.rows, me, group),
        scatter_heads(kv_parts, schedule.kv_rows, me, group),
    )


def _my_qkv(
    buffers: tuple[Tensor, ...], call: AttentionCall, mine: HeadShare
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (N, b, heads of this rank, d): views of the received buffers."""
    if call.same_rows:
        (qkv,) = buffers
        q, k, v = qkv.split([mine.q, mine.kv, mine.kv], dim=2)
    else:
        q, kv = buffers
        k, v = kv.split([mine.kv, mine.kv], dim=2)
    return q, k, v


def _slice_qkv(q: Tensor, k: Tensor, v: Tensor, mine: HeadShare) -> tuple[Tensor, Tensor, Tensor]:
    """The same at U = 1: views of the inputs."""
    kv_heads = slice(mine.kv_start, mine.kv_stop)
    return (
        q.transpose(0, 1)[:, :, mine.q_start : mine.q_stop],
        k.transpose(0, 1)[:, :, kv_heads],
        v.transpose(0, 1)[:, :, kv_heads],
    )


def _exchange_grad(grad_out: Tensor, call: AttentionCall, shares: Shares) -> Tensor:
    """(N, b, heads of this rank, d) of the output's gradient; a view at U = 1."""
    schedule = call.schedule
    group = schedule.mesh.ulysses_group
    if group is None:
        mine = call.mine(shares)
        return grad_out.transpose(0, 1)[:, :, mine.q_start : mine.q_stop]
    return scatter_heads([_of_q(grad_out, shares)], schedule.rows, schedule.mesh.ulysses_rank, group)


def _bring_out_home_(out: Tensor, chunk_out: Tensor, call: AttentionCall, shares: Shares) -> None:
    """Write (N, b, heads of this rank, d) of every ulysses rank to the heads of (b, n, h, d)."""
    schedule = call.schedule
    group = schedule.mesh.ulysses_group
    parts = [chunk_out]
    if group is not None:
        widths = [share.q for share in shares]
        parts = gather_heads(chunk_out, schedule.rows, widths, schedule.mesh.ulysses_rank, group)
    for share, part in zip(shares, parts, strict=True):
        out[:, :, share.q_start : share.q_stop].copy_(part.transpose(0, 1))


class _LocalGrads:
    """dq, dk, dv (b, n, heads, d) of this rank's rows, filled chunk by chunk.

    A K/V head that several ulysses ranks used gets several parts: they are added in fp32.
    """

    def __init__(self, grad_out: Tensor, call: AttentionCall) -> None:
        self._call = call
        self._dtype = grad_out.dtype
        b, _, _, d = grad_out.shape
        held = call.schedule.kv_rows[call.schedule.mesh.ulysses_rank]
        kv_shape = (b, held, call.kv_heads, d)
        # More parts than K/V heads: some head is used by several ranks, and its parts must add up.
        parts = 0
        for shares in call.chunks:
            parts += sum(share.kv for share in shares)
        self._adds_up = parts > call.kv_heads
        dtype = accumulator_dtype(grad_out.dtype) if self._adds_up else grad_out.dtype
        self.dq = torch.empty_like(grad_out, memory_format=torch.contiguous_format)
        self.dk = grad_out.new_zeros(kv_shape, dtype=dtype)
        self.dv = grad_out.new_zeros(kv_shape, dtype=dtype)

    def add(self, dq: Tensor, dkv: Tensor, shares: Shares) -> None:
        """Send dq (N, b, q heads, d) and dkv (N, b, 2 kv heads, d) home, and put what arrives in place."""
        for share, (part_q, part_kv) in zip(shares, self._bring_home(dq, dkv, shares), strict=True):
            self.dq[:, :, share.q_start : share.q_stop].copy_(part_q.transpose(0, 1))
            part_k = part_kv[:, :, : share.kv].transpose(0, 1)
            part_v = part_kv[:, :, share.kv :].transpose(0, 1)
            kv_heads = slice(share.kv_start, share.kv_stop)
            if self._adds_up:
                self.dk[:, :, kv_heads].add_(part_k)
                self.dv[:, :, kv_heads].add_(part_v)
            else:
                self.dk[:, :, kv_heads].copy_(part_k)
                self.dv[:, :, kv_heads].copy_(part_v)

    def _bring_home(self, dq: Tensor, dkv: Tensor, shares: Shares) -> Iterator[tuple[Tensor, Tensor]]:
        """Of every ulysses rank, its dq and dkv (n, b, heads, d) of this rank's rows."""
        schedule = self._call.schedule
        group = schedule.mesh.ulysses_group
        me = schedule.mesh.ulysses_rank
        q_widths = [share.q for share in shares]
        kv_widths = [2 * share.kv for share in shares]
        if group is None:
            yield dq, dkv
        elif self._call.same_rows:
            widths = [q + kv for q, kv in zip(q_widths, kv_widths, strict=True)]
            both = gather_heads(torch.cat((dq, dkv), 2), schedule.rows, widths, me, group)
            for q, part in zip(q_widths, both, strict=True):
                yield part[:, :, :q], part[:, :, q:]
        else:
            q_parts = gather_heads(dq, schedule.rows, q_widths, me, group)
            kv_parts = gather_heads(dkv, schedule.kv_rows, kv_widths, me, group)
            yield from zip(q_parts, kv_parts, strict=True)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in the inputs' dtype."""
        return self.dq, self.dk.to(self._dtype), self.dv.to(self._dtype)


def _sinks_grad(grad_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """d loss / d sinks (h,): minus the sink's softmax weight times rowsum(dout out), over batch and rows."""
    dtype = accumulator_dtype(out.dtype)
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)  # (N, b, h)
    logits = sinks.to(dtype)[None, :, None]
    # A sink of -inf is none, and weighs nothing, also in rows that see nothing and have lse -inf.
    weight = torch.where(logits == -torch.inf, 0.0, (logits - lse).exp()).permute(2, 0, 1)
    return -(weight * delta).sum((0, 1)).to(sinks.dtype)
