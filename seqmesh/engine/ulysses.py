"""Ulysses: swap sequence shards for head shards, run the ring on each chunk of heads, swap back.

    chunk of heads    scatter_heads -> ring_forward -> gather_heads           written into out (b, n, h, e)
    its backward      scatter_heads(dout) -> ring_backward -> gather_heads    dq, dk, dv likewise

Computing the heads in chunks divides the memory of every buffer by the number of chunks. Q, K and V of a
chunk travel in one collective each way, or in two where keys lie on rows of their own (cross-attention). At U
= 1 nothing is exchanged, and q, k and v are read where they lie.

With enough chunks the exchange overlaps the attention: the next chunk's heads travel while one is computed,
and its results land while the next is. All ranks issue the same collectives in this order:

    scatter 0 | scatter 1, ring 0, gather 0 | scatter 2, ring 1, (gather 0 lands) gather 1 | ...

Legend: b batch, n local rows, N rows of the ring rank, h query heads, g K/V heads, d head dim of queries and
keys, e of values, U ulysses degree.
Source: DeepSpeed-Ulysses (Jacobs et al. 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqmesh.engine.call import AttentionCall, Needs
from seqmesh.engine.exchange import HeadSlices, Pending, columns, scatter_heads
from seqmesh.engine.home import LocalGrads, OutHome, Shares
from seqmesh.engine.merge import accumulator_dtype
from seqmesh.engine.ring import ring_backward, ring_forward, start_walk
from seqmesh.schedule.heads import HeadShare


@dataclass(frozen=True, kw_only=True)
class LocalTensors:
    """The call's own tensors: q (b, n, h, d), k (b, n, g, d), v (b, n, g, e) and out (b, n, h, e).

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
    """q, k and v in one flat (N, b, width); or q, and k with v, where keys lie on rows of their own."""
    out: Tensor
    """(N, b, h of this rank, e)"""


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


@dataclass(frozen=True, kw_only=True)
class Attended:
    """What a forward gives."""

    out: Tensor
    """(b, n, h, e)"""
    lse: Tensor | None
    """(b, h, n) log-sum-exp of this rank's rows, if it was asked for."""
    saved: Saved | None
    """What the backward needs, if that was to be kept."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    call: AttentionCall,
    *,
    keep: bool,
    with_lse: bool = False,
) -> Attended:
    """Forward."""
    home = OutHome(q, call, call.value_head_dim)
    lse_home = OutHome(q, call, 1) if with_lse else None
    saved: list[SavedChunk] = []
    coming = _start_qkv(q, k, v, call, 0)
    for number, shares in enumerate(call.chunks):
        mine = call.mine(shares)
        buffers = _arrived(coming, q.shape[0], call, mine)
        coming = _start_qkv(q, k, v, call, number + 1) if call.overlaps else ()
        heads = _my_qkv(buffers, call, mine) if buffers else _slice_qkv(q, k, v, mine)
        chunk_out, lse = _attend_chunk(heads, sinks, call, mine)
        del heads
        home.send(chunk_out, shares, keep=keep)
        if lse_home is not None:
            lse_home.send(lse.permute(2, 0, 1).unsqueeze(-1), shares, keep=True)
        if keep:
            received = ReceivedHeads(buffers=buffers, out=chunk_out) if buffers else None
            saved.append(SavedChunk(lse=lse, received=received))
        del buffers, chunk_out, lse  # before the next chunk's are made
        if not call.overlaps:
            coming = _start_qkv(q, k, v, call, number + 1)
    out = home.finish()
    all_lse = None if lse_home is None else _by_head(lse_home.finish())
    if not keep:
        return Attended(out=out, lse=all_lse, saved=None)
    local = None if call.exchanges_heads else LocalTensors(q=q, k=k, v=v, out=out)
    return Attended(out=out, lse=all_lse, saved=Saved(local=local, chunks=tuple(saved)))


def _by_head(lse: Tensor) -> Tensor:
    """(b, n, h, 1) -> (b, h, n), in memory of its own: one head's could be what the backward keeps."""
    return lse.squeeze(-1).transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _attend_chunk(
    heads: tuple[Tensor, Tensor, Tensor], sinks: Tensor | None, call: AttentionCall, mine: HeadShare
) -> tuple[Tensor, Tensor]:
    """A chunk's output (N, b, h of this rank, e) and lse (b, h of this rank, N), of its q, k and v."""
    q, k, v = heads
    # Sinks are whole on every rank: each takes those of its heads.
    my_sinks = None if sinks is None else sinks[mine.q_start : mine.q_stop]
    out, lse = ring_forward(q, start_walk(k, v, call), my_sinks, call, mine)
    # As it travels, so that it is not copied for that.
    return out.contiguous() if call.exchanges_heads else out, lse


def attend_backward(
    grad_out: Tensor, sinks: Tensor | None, saved: Saved, call: AttentionCall, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, dv and dsinks, of the gradient (b, n, h, e) of the output; None where not needed."""
    grad_out = unit_last_stride(grad_out)
    grads = LocalGrads(grad_out, call, needs)
    grad_sinks = torch.zeros_like(sinks) if sinks is not None and needs.sinks else None
    coming: Pending | None = None
    for number, (shares, chunk) in enumerate(zip(call.chunks, saved.chunks, strict=True)):
        mine = call.mine(shares)
        heads = slice(mine.q_start, mine.q_stop)
        if chunk.received is not None:
            chunk_out = chunk.received.out
            chunk_q, chunk_k, chunk_v = _my_qkv(chunk.received.buffers, call, mine)
        else:
            assert saved.local is not None
            chunk_out = saved.local.out.transpose(0, 1)[:, :, heads]
            chunk_q, chunk_k, chunk_v = _slice_qkv(saved.local.q, saved.local.k, saved.local.v, mine)
        walk = start_walk(chunk_k, chunk_v, call)  # K/V rows need no gradient to travel
        coming = coming or _start_grad(grad_out, call, number)
        chunk_grad = _arrived_grad(grad_out, coming, call, mine)  # (b, n, h, e) -> (N, b, h of this rank, e)
        coming = _start_grad(grad_out, call, number + 1) if call.overlaps else None
        if sinks is not None and grad_sinks is not None:
            grad_sinks[heads] = _sinks_grad(chunk_grad, chunk_out, chunk.lse, sinks[heads])
        dq, dkv = ring_backward(chunk_grad, chunk_q, walk, chunk_out, chunk.lse, call, mine, needs)
        del chunk_grad, walk
        grads.send(dq, dkv, shares)
        del dq, dkv
    return *grads.finish(), grad_sinks


def _of_q(x: Tensor, shares: Shares) -> HeadSlices:
    """(b, n, h, dim) as a rows-first view, with the query heads that each ulysses rank needs."""
    return HeadSlices(x.transpose(0, 1), tuple((share.q_start, share.q_stop) for share in shares))


def _of_kv(x: Tensor, shares: Shares) -> HeadSlices:
    """(b, n, g, dim) as a rows-first view, with the K/V heads that each ulysses rank needs."""
    return HeadSlices(x.transpose(0, 1), tuple((share.kv_start, share.kv_stop) for share in shares))


def _start_qkv(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, number: int) -> tuple[Pending, ...]:
    """Start the exchange of a chunk's heads: of q, k and v, or of q, and of k and v. Nothing at U = 1."""
    schedule = call.schedule
    group = schedule.mesh.ulysses_group
    if group is None or number == len(call.chunks):
        return ()
    me = schedule.mesh.ulysses_rank
    shares = call.chunks[number]
    q_part = _of_q(q, shares)
    kv_parts = [_of_kv(k, shares), _of_kv(v, shares)]
    if call.same_rows:
        return (scatter_heads([q_part, *kv_parts], schedule.rows, me, group),)
    return (
        scatter_heads([q_part], schedule.rows, me, group),
        scatter_heads(kv_parts, schedule.kv_rows, me, group),
    )


def _arrived(coming: tuple[Pending, ...], b: int, call: AttentionCall, mine: HeadShare) -> tuple[Tensor, ...]:
    """`ReceivedHeads.buffers` of what has been under way."""
    q_width = mine.q * call.head_dim
    kv_width = mine.kv * (call.head_dim + call.value_head_dim)
    shapes = [(sum(call.schedule.rows), b, q_width), (sum(call.schedule.kv_rows), b, kv_width)]
    if call.same_rows:
        shapes = [(sum(call.schedule.rows), b, q_width + kv_width)]
    return tuple(pending.wait().view(shape) for pending, shape in zip(coming, shapes, strict=False))


def _my_qkv(
    buffers: tuple[Tensor, ...], call: AttentionCall, mine: HeadShare
) -> tuple[Tensor, Tensor, Tensor]:
    """q (N, b, h, d), k (N, b, g, d) and v (N, b, g, e) of this rank's heads: views of the buffers."""
    q_shape = (mine.q, call.head_dim)
    kv_shapes = [(mine.kv, call.head_dim), (mine.kv, call.value_head_dim)]
    if call.same_rows:
        (qkv,) = buffers
        q, k, v = columns(qkv, [q_shape, *kv_shapes])
    else:
        (q,) = columns(buffers[0], [q_shape])
        k, v = columns(buffers[1], kv_shapes)
    return q, k, v


def _slice_qkv(q: Tensor, k: Tensor, v: Tensor, mine: HeadShare) -> tuple[Tensor, Tensor, Tensor]:
    """The same at U = 1: views of the inputs."""
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    if mine.q == q.shape[2]:  # one chunk has them all
        return q, k, v
    kv_heads = slice(mine.kv_start, mine.kv_stop)
    return q[:, :, mine.q_start : mine.q_stop], k[:, :, kv_heads], v[:, :, kv_heads]


def _start_grad(grad_out: Tensor, call: AttentionCall, number: int) -> Pending | None:
    """Start the exchange of the output's gradient of a chunk; nothing at U = 1."""
    schedule = call.schedule
    group = schedule.mesh.ulysses_group
    if group is None or number == len(call.chunks):
        return None
    return scatter_heads(
        [_of_q(grad_out, call.chunks[number])], schedule.rows, schedule.mesh.ulysses_rank, group
    )


def _arrived_grad(grad_out: Tensor, coming: Pending | None, call: AttentionCall, mine: HeadShare) -> Tensor:
    """(N, b, h of this rank, e) of the output's gradient; a view at U = 1."""
    if coming is None:
        return grad_out.transpose(0, 1)[:, :, mine.q_start : mine.q_stop]
    return coming.wait().view(sum(call.schedule.rows), grad_out.shape[0], mine.q, call.value_head_dim)


def _sinks_grad(grad_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """d loss / d sinks (h,): minus the sink's softmax weight times rowsum(dout out), over batch and rows."""
    dtype = accumulator_dtype(out.dtype)
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)  # (N, b, h)
    logits = sinks.to(dtype)[None, :, None]
    # A sink of -inf is none, and weighs nothing, also in rows that see nothing and have lse -inf.
    weight = torch.where(logits == -torch.inf, 0.0, (logits - lse).exp()).permute(2, 0, 1)
    return -(weight * delta).sum((0, 1)).to(sinks.dtype)
