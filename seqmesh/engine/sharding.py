"""`Schedule`: a mask and a layout, bound to this rank of a mesh.

What users shard with and hand to `attention`.

    global x (b, s, ...)   -- shard -->   this rank's n tokens, in storage order   -- unshard -->   global x on every rank

A ring rank's storage order (layouts.py) is cut in U near-equal consecutive pieces, one for each ulysses rank.
Token ids, labels and position ids are sharded with the same call, so nothing can get out of step. Build one
schedule per mask (per batch when documents differ), not per layer.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from seqmesh import layouts
from seqmesh.engine.exchange import start_exchange
from seqmesh.engine.mesh import SequenceMesh
from seqmesh.layouts import Layout, Span, split_evenly
from seqmesh.masks import Band, Mask
from seqmesh.schedule.heads import split_heads
from seqmesh.schedule.ring import RingSchedule, ring_schedule
from seqmesh.schedule.traffic import Traffic, attention_traffic


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """Who holds which token, and what this rank sends, receives and computes. Make it with `Schedule.build`."""

    mask: Mask
    mesh: SequenceMesh
    layout: Layout
    """Layout of the queries (and of the keys in self-attention); `layout.reason` says why it was picked."""
    kv_layout: Layout
    """Layout of the keys: the same object in self-attention."""
    ring: RingSchedule
    """Stages of this ring rank."""
    token: Tensor
    """All of the above as int64 numbers: how torch.compile carries a schedule through its graph (see
    `from_token`).
    """

    @staticmethod
    def build(
        mask: Mask,
        mesh: SequenceMesh,
        layout: str | Layout = "auto",
        *,
        kv_layout: str | Layout | None = None,
        stages: int | None = None,
    ) -> "Schedule":
        """The schedule of this rank.

        Args:
            mask: which query meets which key.
            mesh: ring x ulysses.
            layout: "auto", "contiguous", "zigzag", "striped", "balanced", or a Layout of mask.q_len tokens.
            kv_layout: for cross-attention, where keys have a layout of their own; default: `layout` when
                q_len = k_len, else the layout of the same name over k_len ("contiguous" for "auto").
            stages: exchanges to spread the ring over, see `ring_schedule`.

        Raises:
            ValueError: an unknown layout, or a layout of another length or ring degree.
        """
        own_keys = kv_layout is not None or mask.q_len != mask.k_len
        q_layout = _named(layout, mask, mask.q_len, mesh.ring, "contiguous" if own_keys else "auto")
        keys = q_layout
        if own_keys:
            wanted = (
                kv_layout if kv_layout is not None else layout if isinstance(layout, str) else "contiguous"
            )
            keys = _named(wanted, mask, mask.k_len, mesh.ring, "contiguous")
        for held in (q_layout, keys):
            if held.ring != mesh.ring:
                raise ValueError(
                    f"the layout is for ring={held.ring} but the mesh has ring={mesh.ring}; build it for {mesh.ring}"
                )
        ring = ring_schedule(mask, q_layout, keys, mesh.ring_rank, stages)
        token = _token(mask, mesh, q_layout, keys, stages)
        return Schedule(mask=mask, mesh=mesh, layout=q_layout, kv_layout=keys, ring=ring, token=token)

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Query tokens of every ulysses rank of this ring rank."""
        return _pieces(self.layout, self.mesh)

    @cached_property
    def kv_rows(self) -> tuple[int, ...]:
        """Key tokens of every ulysses rank of this ring rank."""
        return _pieces(self.kv_layout, self.mesh)

    def positions(self, *, keys: bool = False, device: torch.device | str | None = None) -> Tensor:
        """Global positions of this rank's tokens, (n,) int64; of its keys if `keys` (cross-attention)."""
        layout, mesh = (self.kv_layout if keys else self.layout), self.mesh
        return _positions(layout, mesh, mesh.ring_rank, mesh.ulysses_rank).to(device)

    def shard(self, x: Tensor, dim: int, *, keys: bool = False) -> Tensor:
        """This rank's tokens of a global tensor.

        Differentiable: the gradient is zero at the tokens of other ranks.

        Args:
            x: any tensor with q_len tokens along `dim` (k_len if `keys`), the same on every rank.
            dim: its sequence dimension.
            keys: shard the keys' side of cross-attention.

        Raises:
            ValueError: `dim` does not have as many tokens as the mask.
        """
        length = self.mask.k_len if keys else self.mask.q_len
        if not -x.ndim <= dim < x.ndim or x.shape[dim] != length:
            raise ValueError(
                f"shard: dim {dim} of a tensor of shape {tuple(x.shape)} must hold the mask's {length} tokens; pass that dim"
            )
        if self._keeps_order(keys):
            return x
        return x.index_select(dim, self.positions(keys=keys, device=x.device))

    def unshard(self, x_local: Tensor, dim: int, *, keys: bool = False, reduce_grad: bool = False) -> Tensor:
        """The inverse of `shard`: the global tensor, on every rank.

        A collective over the whole sequence mesh.

        Differentiable. By default each rank takes its own tokens' part of the gradient, which is right when
        every rank computes the same thing from the global tensor (as DTensor.full_tensor does). With
        `reduce_grad` the gradients of all ranks are summed, which is right when each rank computes a part of
        the loss.

        Args:
            x_local: this rank's tokens along `dim`, in storage order.
            dim: its sequence dimension.
            keys: unshard the keys' side of cross-attention.
            reduce_grad: sum the gradient over ranks in the backward.

        Raises:
            ValueError: `dim` does not have this rank's number of tokens.
        """
        n = (self.kv_rows if keys else self.rows)[self.mesh.ulysses_rank]
        if not -x_local.ndim <= dim < x_local.ndim or x_local.shape[dim] != n:
            raise ValueError(
                f"unshard: dim {dim} of a tensor of shape {tuple(x_local.shape)} must hold this rank's {n} tokens; pass that dim"
            )
        if self._keeps_order(keys):
            return x_local
        out: Tensor = _Unshard.apply(x_local, self, dim % x_local.ndim, keys, reduce_grad)
        return out

    def _keeps_order(self, keys: bool) -> bool:
        """One rank that holds everything in its global order: nothing to shard."""
        spans = (self.kv_layout if keys else self.layout).ranks[0]
        return self.mesh.size == 1 and len(spans) <= 1 and all(span.stride == 1 for span in spans)

    def traffic(self, *, batch: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Traffic:
        """Bytes that this rank sends in one forward and in one backward of `attention`, exactly
        (exchange.CountBytes agrees).

        Args:
            batch: sequences b.
            heads: query heads h.
            kv_heads: K/V heads g.
            head_dim: head dim d.
            dtype: of q, k and v.
        """
        (shares,) = split_heads(heads, kv_heads, self.mesh.ulysses)
        unit = batch * head_dim * dtype.itemsize
        return attention_traffic(
            rows_sent=self.ring.rows_sent,
            rows_received=self.ring.rows_received,
            rows=self.rows,
            kv_rows=self.kv_rows,
            shares=shares,
            ulysses_rank=self.mesh.ulysses_rank,
            row_head_bytes=unit,
        )


def _named(layout: str | Layout, mask: Mask, s: int, ring: int, auto: str) -> Layout:
    if isinstance(layout, Layout):
        return layout
    return layouts.named(auto if layout == "auto" else layout, mask, s, ring)


def _pieces(layout: Layout, mesh: SequenceMesh) -> tuple[int, ...]:
    cut = split_evenly(layout.counts[mesh.ring_rank], mesh.ulysses)
    return tuple(stop - start for start, stop in itertools.pairwise(cut))


def _positions(layout: Layout, mesh: SequenceMesh, ring_rank: int, ulysses_rank: int) -> Tensor:
    cut = split_evenly(layout.counts[ring_rank], mesh.ulysses)
    spans = [torch.arange(t.start, t.stop, t.step) for t in (span.tokens for span in layout.ranks[ring_rank])]
    stored = torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)
    return stored[cut[ulysses_rank] : cut[ulysses_rank + 1]]


class _Unshard(torch.autograd.Function):
    """All-gather over ulysses, then over ring, then from storage order to global order; and its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, schedule: Schedule, dim: int, keys: bool, reduce_grad: bool) -> Tensor:
        ctx.schedule, ctx.dim, ctx.keys, ctx.reduce_grad = schedule, dim, keys, reduce_grad
        mesh, layout = schedule.mesh, schedule.kv_layout if keys else schedule.layout
        rows = schedule.kv_rows if keys else schedule.rows
        shape = x.movedim(dim, 0).shape[1:]
        row = shape.numel()
        gathered = x.movedim(dim, 0).contiguous().view(-1)
        for group, counts in ((mesh.ulysses_group, rows), (mesh.ring_group, layout.counts)):
            if group is not None:
                size = gathered.numel()
                copies = gathered.expand(len(counts), size).reshape(-1)
                gathered = start_exchange(
                    copies, [size] * len(counts), [n * row for n in counts], group
                ).wait(keep_sent=True)
        stored = gathered.view(-1, *shape)
        order = torch.cat(
            [_positions(layout, mesh, r, u) for r in range(mesh.ring) for u in range(mesh.ulysses)]
        )
        return torch.empty_like(stored).index_copy_(0, order.to(x.device), stored).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad, dim, schedule = grads[0], ctx.dim, ctx.schedule
        if ctx.reduce_grad:
            grad = _sum_to_owner(grad.movedim(dim, 0), schedule, ctx.keys).movedim(0, dim)
        else:
            grad = grad.index_select(dim, schedule.positions(keys=ctx.keys, device=grad.device))
        return grad, None, None, None, None


def _sum_to_owner(grad: Tensor, schedule: Schedule, keys: bool) -> Tensor:
    """(s, ...) gradients of all ranks -> (n, ...) this rank's rows, summed: to the ring rank, then to the
    ulysses rank.
    """
    mesh, layout = schedule.mesh, schedule.kv_layout if keys else schedule.layout
    rows = schedule.kv_rows if keys else schedule.rows
    order = torch.cat([_positions(layout, mesh, r, u) for r in range(mesh.ring) for u in range(mesh.ulysses)])
    stored = grad.index_select(0, order.to(grad.device))
    row = stored.shape[1:].numel()
    for group, counts, me in (
        (mesh.ring_group, layout.counts, mesh.ring_rank),
        (mesh.ulysses_group, rows, mesh.ulysses_rank),
    ):
        if group is not None:
            sizes = [n * row for n in counts]
            received = start_exchange(stored.reshape(-1), sizes, [sizes[me]] * len(counts), group).wait(
                keep_sent=True
            )
            stored = received.view(len(counts), counts[me], *grad.shape[1:]).sum(0)
    return stored


_OPEN = -(1 << 62)
"""Stands for an open bound of a band in a token."""


def _token(mask: Mask, mesh: SequenceMesh, q_layout: Layout, kv_layout: Layout, stages: int | None) -> Tensor:
    numbers = [
        mask.q_len,
        mask.k_len,
        mesh.ulysses,
        mesh.ulysses_rank,
        mesh.ring_rank,
        stages or 0,
        len(mask.bands),
    ]
    numbers += [_OPEN if n is None else n for band in mask.bands for n in band]
    for layout in (q_layout,) if kv_layout is q_layout else (q_layout, kv_layout):
        numbers.append(layout.ring)
        for spans in layout.ranks:
            numbers += [len(spans), *(n for span in spans for n in span)]
    return torch.tensor(numbers, dtype=torch.int64)


def from_token(token: bytes, ulysses_group: str | None, ring_group: str | None) -> Schedule:
    """The schedule whose `token` has these bytes, on a mesh of these process groups (without its device
    mesh).
    """
    numbers = iter(memoryview(token).cast("q"))
    q_len, k_len, ulysses, ulysses_rank, ring_rank, stages, bands = (next(numbers) for _ in range(7))
    opened = ([None if n == _OPEN else n for n in itertools.islice(numbers, 6)] for _ in range(bands))
    mask = Mask(q_len, k_len, tuple(Band(*band) for band in opened))  # type: ignore[arg-type]
    held: list[Layout] = []
    for ring in numbers:
        ranks = [
            tuple(Span(*itertools.islice(numbers, 3)) for _ in range(next(numbers))) for _ in range(ring)
        ]
        held.append(Layout((q_len, k_len)[len(held)], tuple(ranks)))
    mesh = SequenceMesh(
        ulysses=ulysses,
        ring=held[0].ring,
        ulysses_rank=ulysses_rank,
        ring_rank=ring_rank,
        ulysses_group=ulysses_group,
        ring_group=ring_group,
        device_mesh=None,
    )
    return Schedule.build(
        mask, mesh, held[0], kv_layout=held[-1] if len(held) > 1 else None, stages=stages or None
    )
