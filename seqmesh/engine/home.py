"""The way home: results of a chunk of heads go to the ranks whose rows they are, and into their heads' place.

    (N, b, heads of this rank)  -- gather_heads -->  (n, b, heads of every ulysses rank)  -->  (b, n, h, dim)

One chunk's results may be under way while the next chunk is computed. At U = 1 all rows are this rank's, and
nothing travels.

Legend: b batch, n local rows, N rows of the ring rank, h query heads, g K/V heads, d head dim of queries and
keys, e of values, U ulysses degree.
Source: DeepSpeed-Ulysses (Jacobs et al. 2023).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seqmesh.engine.call import AttentionCall, Needs
from seqmesh.engine.exchange import Pending, columns, gather_heads, gathered
from seqmesh.engine.merge import accumulator_dtype
from seqmesh.engine.results import RowSums
from seqmesh.schedule.heads import HeadShare

Shares = tuple[HeadShare, ...]
"""Heads of every ulysses rank in one chunk."""


class OutHome:
    """A result (b, n, h, dim) of this rank's rows, such as the output, filled chunk by chunk."""

    def __init__(self, q: Tensor, call: AttentionCall, dim: int) -> None:
        """For queries q (b, n, h, d)."""
        self._q = q
        self._call = call
        self._dim = dim
        self._out: Tensor | None = None
        self._under_way: tuple[Pending, Shares] | None = None

    def send(self, chunk_out: Tensor, shares: Shares, *, keep: bool) -> None:
        """Take a chunk's result (N, b, heads of this rank, dim): heads of all ulysses ranks come home.

        `keep` it, if it is saved for the backward.
        """
        call = self._call
        schedule = call.schedule
        group = schedule.mesh.ulysses_group
        if group is None:
            self._take(chunk_out, call.mine(shares))
            return
        self._receive()
        flat = chunk_out.flatten(2).contiguous()
        me = schedule.mesh.ulysses_rank
        pending = gather_heads(flat, schedule.rows, self._widths(shares), me, group, is_ours=not keep)
        self._under_way = pending, shares
        if not call.overlaps:
            self._receive()

    def finish(self) -> Tensor:
        """The whole result."""
        self._receive()
        assert self._out is not None
        return self._out

    def _take(self, chunk_out: Tensor, mine: HeadShare) -> None:
        """At U = 1: all rows and heads of a chunk are this rank's."""
        if len(self._call.chunks) == 1:
            self._out = chunk_out.transpose(0, 1).contiguous()  # (N, b, h, dim) -> (b, n, h, dim)
        else:
            self._put(chunk_out, mine)

    def _receive(self) -> None:
        """Put what has been under way in place, if anything is."""
        if self._under_way is None:
            return
        pending, shares = self._under_way
        self._under_way = None
        b, n = self._q.shape[:2]
        parts = gathered(pending.wait(), n, b, self._widths(shares))
        for share, part in zip(shares, parts, strict=True):
            self._put(part.view(n, b, share.q, self._dim), share)

    def _put(self, heads: Tensor, share: HeadShare) -> None:
        """Write heads (n, b, heads, dim) to their place."""
        if self._out is None:  # not before the first chunk's buffers are gone
            self._out = heads.new_empty((*self._q.shape[:3], self._dim))
        self._out[:, :, share.q_start : share.q_stop].copy_(heads.transpose(0, 1))

    def _widths(self, shares: Shares) -> list[int]:
        return [share.q * self._dim for share in shares]


class _GradMessage(NamedTuple):
    """Gradients under way: of the queries, of keys and values, or of both side by side."""

    pending: Pending
    has_q: bool
    has_kv: bool


class LocalGrads:
    """dq (b, n, h, d), dk (b, n, g, d) and dv (b, n, g, e) of this rank's rows, filled chunk by chunk.

    A K/V head that several ulysses ranks used gets several parts: they are added in fp32.
    """

    def __init__(self, grad_out: Tensor, call: AttentionCall, needs: Needs) -> None:
        """For the output's gradient (b, n, h, e)."""
        self._call = call
        self._needs = needs
        self._grad_out = grad_out
        self._batch, self._rows, self._heads, _ = grad_out.shape
        self._kv_rows = call.schedule.kv_rows[call.schedule.mesh.ulysses_rank]
        # More parts than K/V heads: some head is used by several ranks, and its parts must add up.
        parts = 0
        for shares in call.chunks:
            parts += sum(share.kv for share in shares)
        self._adds_up = parts > call.kv_heads
        self._dq: Tensor | None = None
        self._dkv: list[Tensor] = []
        self._is_made = False
        self._under_way: tuple[list[_GradMessage], Shares] | None = None

    def _make(self) -> None:
        """Make the gradients, before the first chunk's are put in place."""
        if self._is_made:
            return
        self._is_made = True
        call, like, b = self._call, self._grad_out, self._batch
        if self._needs.q:
            self._dq = like.new_empty((b, self._rows, self._heads, call.head_dim))
        if self._needs.kv:
            dtype = accumulator_dtype(like.dtype) if self._adds_up else like.dtype
            make = like.new_zeros if self._adds_up else like.new_empty
            shape = (b, self._kv_rows, call.kv_heads)
            self._dkv = [make((*shape, dim), dtype=dtype) for dim in (call.head_dim, call.value_head_dim)]

    def send(self, dq: RowSums | None, dkv: RowSums | None, shares: Shares) -> None:
        """Send a chunk's dq (N, b, q heads, d) and dkv home, and put what arrives in place."""
        call = self._call
        group = call.schedule.mesh.ulysses_group
        if group is None and len(call.chunks) == 1:  # nothing to put together
            self._dq = None if dq is None else dq.finish()[0].transpose(0, 1)
            self._dkv = [] if dkv is None else [x.transpose(0, 1) for x in dkv.finish()]
            return
        self._make()
        if group is None:
            mine = call.mine(shares)
            if dq is not None:
                self._put_q(dq.finish()[0], mine)
            if dkv is not None:
                self._put_kv(dkv.finish(), mine)
            return
        self._receive()
        self._under_way = list(self._messages(dq, dkv, shares, group)), shares
        if not call.overlaps:
            self._receive()

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients in the inputs' dtype, None where not needed."""
        self._receive()
        if not self._dkv:
            return self._dq, None, None
        dk, dv = (x.to(self._grad_out.dtype) for x in self._dkv)
        return self._dq, dk, dv

    def _messages(
        self, dq: RowSums | None, dkv: RowSums | None, shares: Shares, group: str
    ) -> Iterator[_GradMessage]:
        """What goes home, in one collective if queries and keys lie on the same rows."""
        if dq is not None and dkv is not None and self._call.same_rows:
            flat = torch.cat([x.flatten(2) for x in (*dq.finish(), *dkv.finish())], -1)
            yield self._message(flat, shares, group, has_q=True, has_kv=True)
            return
        if dq is not None:
            yield self._message(dq.finish_flat(), shares, group, has_q=True, has_kv=False)
        if dkv is not None:
            yield self._message(dkv.finish_flat(), shares, group, has_q=False, has_kv=True)

    def _message(
        self, flat: Tensor, shares: Shares, group: str, *, has_q: bool, has_kv: bool
    ) -> _GradMessage:
        schedule = self._call.schedule
        rows = schedule.rows if has_q else schedule.kv_rows
        widths = self._widths(shares, has_q=has_q, has_kv=has_kv)
        pending = gather_heads(flat, rows, widths, schedule.mesh.ulysses_rank, group, is_ours=True)
        return _GradMessage(pending, has_q, has_kv)

    def _receive(self) -> None:
        """Put what has been under way in place, if anything is."""
        if self._under_way is None:
            return
        messages, shares = self._under_way
        self._under_way = None
        for pending, has_q, has_kv in messages:
            n = self._rows if has_q else self._kv_rows
            widths = self._widths(shares, has_q=has_q, has_kv=has_kv)
            parts = gathered(pending.wait(), n, self._batch, widths)
            for share, part in zip(shares, parts, strict=True):
                heads = columns(part, self._shapes(share, has_q=has_q, has_kv=has_kv))
                if has_q:
                    self._put_q(heads[0], share)
                if has_kv:
                    self._put_kv(heads[-2:], share)

    def _shapes(self, share: HeadShare, *, has_q: bool, has_kv: bool) -> list[tuple[int, int]]:
        """(heads, dim) of each gradient in a row of a message."""
        d, e = self._call.head_dim, self._call.value_head_dim
        q = [(share.q, d)] if has_q else []
        kv = [(share.kv, d), (share.kv, e)] if has_kv else []
        return q + kv

    def _widths(self, shares: Shares, *, has_q: bool, has_kv: bool) -> list[int]:
        """Elements of a row of every ulysses rank's message."""
        shapes = (self._shapes(share, has_q=has_q, has_kv=has_kv) for share in shares)
        return [sum(heads * dim for heads, dim in each) for each in shapes]

    def _put_q(self, dq: Tensor, share: HeadShare) -> None:
        """Write (n, b, heads, d) to its heads."""
        assert self._dq is not None
        self._dq[:, :, share.q_start : share.q_stop].copy_(dq.transpose(0, 1))

    def _put_kv(self, gradients: list[Tensor], share: HeadShare) -> None:
        """Add dk (n, b, heads, d) and dv to their heads."""
        for into, came in zip(self._dkv, gradients, strict=True):
            heads = into[:, :, share.kv_start : share.kv_stop]
            if self._adds_up:
                heads.add_(came.transpose(0, 1))
            else:
                heads.copy_(came.transpose(0, 1))
