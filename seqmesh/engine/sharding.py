"""`Schedule`: a mask and a layout, bound to this rank of a mesh.

What users shard with and hand to `attention`.

    global x (b, s, ...)  -- shard -->  this rank's n tokens, in storage order  -- unshard -->  global x

A ring rank's storage order (layouts) is cut in U near-equal consecutive pieces, one for each ulysses rank.
Token ids, labels and position ids are sharded with the same call, so nothing can get out of step. Build one
schedule per mask (per batch when documents differ), not per layer.
"""

import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from seqmesh import layouts
from seqmesh.engine.asked_layouts import layouts_of
from seqmesh.engine.encoding import EncodedFields, encode
from seqmesh.engine.exchange import all_gather, start_exchange
from seqmesh.engine.mesh import SequenceMesh
from seqmesh.engine.reshard import Reshard, positions_of, route
from seqmesh.layouts import Layout, split_evenly
from seqmesh.masks import Mask
from seqmesh.schedule import RingSchedule, Stages, ring_schedule
from seqmesh.schedule.chains import Chains, PassedSizes, chains_of
from seqmesh.schedule.heads import split_heads
from seqmesh.schedule.traffic import Traffic, attention_traffic

Kept = TypeVar("Kept")


class Side(NamedTuple):
    """The queries' or the keys' tokens: as they lie on all ranks, and on this ring rank."""

    layout: Layout
    rows: tuple[int, ...]
    """Tokens of every ulysses rank of this ring rank."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """Who holds which token, and what this rank sends, receives and computes. Made by `Schedule.build`."""

    mask: Mask
    mesh: SequenceMesh
    layout: Layout
    """Layout of the queries (and of the keys in self-attention); `layout.reason` says why it was picked."""
    kv_layout: Layout
    """Layout of the keys: the same object in self-attention."""
    ring: RingSchedule
    """Stages of this ring rank."""
    _encoded: Tensor = field(repr=False)
    """What torch.compile carries through its graph in place of this object, see encoding.py."""
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What was derived from the schedule before, see `kept`."""

    @staticmethod
    def build(
        mask: Mask,
        mesh: SequenceMesh,
        layout: str | Layout = "auto",
        *,
        kv_layout: str | Layout | None = None,
        stages: Stages = None,
    ) -> "Schedule":
        """The schedule of this rank.

        Args:
            mask: which query meets which key.
            mesh: ring x ulysses.
            layout: "auto", "contiguous", "zigzag", "striped", "balanced", or a Layout of mask.q_len tokens.
            kv_layout: for cross-attention, where keys have a layout of their own; default: `layout` when
                q_len = k_len, else the layout of the same name over k_len ("contiguous" for "auto" and
                "balanced", which lay out queries).
            stages: None for an exchange for each hop that some rank uses, "auto" to merge exchanges so small
                that latency is most of their cost, or the most exchanges there may be; see `ring_schedule`.

        Raises:
            ValueError: an unknown layout, or a layout of another length or ring degree.
        """
        q_layout, keys = layouts_of(mask, mesh.ring, layout, kv_layout)
        fields = EncodedFields(
            mask=mask,
            ulysses=mesh.ulysses,
            ulysses_rank=mesh.ulysses_rank,
            ring_rank=mesh.ring_rank,
            stages=stages,
            layout=q_layout,
            kv_layout=keys,
        )
        ring = ring_schedule(mask, q_layout, keys, mesh.ring_rank, stages)
        encoded = encode(fields)
        made = Schedule(mask=mask, mesh=mesh, layout=q_layout, kv_layout=keys, ring=ring, _encoded=encoded)
        made._prepare()
        return made

    def _prepare(self) -> None:
        """What the compiler needs, now: it cannot follow the lock of a cached property (Python 3.11)."""
        _ = self.same_rows
        with suppress(ValueError):  # not of documents: layers that carry a state will say so
            _ = self.passed

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Query tokens of every ulysses rank of this ring rank."""
        return _pieces(self.layout, self.mesh)

    @cached_property
    def kv_rows(self) -> tuple[int, ...]:
        """Key tokens of every ulysses rank of this ring rank."""
        return _pieces(self.kv_layout, self.mesh)

    @cached_property
    def same_rows(self) -> bool:
        """Whether ranks hold as many keys as queries. For the compiler one fact, not numbers to watch."""
        return self.rows == self.kv_rows

    @cached_property
    def chains(self) -> Chains:
        """The pieces of documents on all ranks, for layers that carry a state along the sequence.

        Raises:
            ValueError: a mask that is not of whole causal documents, or a strided layout.
        """
        return chains_of(self.mask, self.layout, self.mesh.ulysses)

    @cached_property
    def passed(self) -> PassedSizes:
        """Sizes of the chains, for the compiler."""
        return self.chains.sizes(self.mesh.rank)

    def kept(self, key: Any, make: Callable[[], Kept]) -> Kept:
        """What follows from this schedule and `key`, made once: the layers of a model ask for the same."""
        try:
            found: Kept = self._kept[key]
        except KeyError:
            found = self._kept[key] = make()
        except TypeError:  # a kernel of the user's own that has no hash
            found = make()
        return found

    def side(self, *, keys: bool) -> Side:
        """The tokens of the keys, or of the queries."""
        return Side(self.kv_layout, self.kv_rows) if keys else Side(self.layout, self.rows)

    def positions(self, *, keys: bool = False, device: torch.device | str | None = None) -> Tensor:
        """Global positions of this rank's tokens, (n,) int64; of its keys if `keys` (cross-attention)."""
        return self._positions(keys=keys, device=torch.device(device or "cpu")).clone()

    def _positions(self, *, keys: bool, device: torch.device) -> Tensor:
        """`positions`, made once per device: nobody may change them."""
        mesh = self.mesh
        layout = self.side(keys=keys).layout
        return self.kept(
            ("positions", keys, device),
            lambda: positions_of(layout, mesh.ulysses, mesh.ring_rank, mesh.ulysses_rank).to(device),
        )

    def _order(self, *, keys: bool, device: torch.device) -> Tensor:
        """Global positions of all tokens, (s,), in the order in which ranks are gathered; made once."""
        layout = self.side(keys=keys).layout
        return self.kept(("order", keys, device), lambda: _all_positions(layout, self.mesh).to(device))

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
                f"shard: dim {dim} of a tensor of shape {tuple(x.shape)}"
                f" must hold the mask's {length} tokens; pass that dim"
            )
        if self._keeps_order(keys):  # no copy on one rank
            return x
        return x.index_select(dim, self._positions(keys=keys, device=x.device))

    def shard_local(
        self, x_local: Tensor, dim: int, held: str | Layout = "contiguous", *, keys: bool = False
    ) -> Tensor:
        """`shard` for data of which each rank already holds a part: nobody needs the whole sequence.

        A collective over the whole sequence mesh. Differentiable: gradients go back where tokens came from.

        Args:
            x_local: the tokens that this rank holds, along `dim`.
            dim: its sequence dimension.
            held: how ranks hold them: "contiguous" for the next tokens each, near-equally many, in the order
                ring rank, ulysses rank; or any layout, whose ring ranks' tokens are cut for the ulysses ranks
                as a schedule's are.
            keys: the keys' side of cross-attention.

        Raises:
            ValueError: a layout of another length or ring degree, or `dim` does not have the tokens that it
                gives this rank.
        """
        wanted = self.side(keys=keys).layout
        if isinstance(held, str):
            held = layouts.named(held, self.mask, wanted.s, self.mesh.ring)
        _check_held(x_local, dim, held, wanted, self.mesh)
        way = self.kept(
            ("route", keys, held, x_local.device),
            lambda: route(self.mesh, held, wanted, x_local.device),
        )
        rows: Tensor = Reshard.apply(x_local.movedim(dim, 0), way)
        return rows.movedim(0, dim)

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
        n = self.side(keys=keys).rows[self.mesh.ulysses_rank]
        if not -x_local.ndim <= dim < x_local.ndim or x_local.shape[dim] != n:
            raise ValueError(
                f"unshard: dim {dim} of a tensor of shape {tuple(x_local.shape)}"
                f" must hold this rank's {n} tokens; pass that dim"
            )
        if self._keeps_order(keys):
            return x_local
        out: Tensor = _Unshard.apply(x_local, self, dim % x_local.ndim, keys, reduce_grad)
        return out

    def _keeps_order(self, keys: bool) -> bool:
        """One rank that holds everything in its global order: nothing to shard."""
        spans = self.side(keys=keys).layout.ranks[0]
        return self.mesh.size == 1 and len(spans) <= 1 and all(span.stride == 1 for span in spans)

    def traffic(
        self,
        *,
        batch: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        value_head_dim: int | None = None,
    ) -> Traffic:
        """Bytes that this rank sends in one forward and in one backward of `attention`, exactly.

        `exchange.CountBytes`, which counts at the collective, agrees with it.

        Args:
            batch: sequences b.
            heads: query heads h.
            kv_heads: K/V heads g.
            head_dim: head dim d.
            dtype: of q, k and v.
            value_head_dim: head dim e of values, if not d.
        """
        (shares,) = split_heads(heads, kv_heads, self.mesh.ulysses)
        return attention_traffic(
            rows_sent=self.ring.rows_sent,
            rows_received=self.ring.rows_received,
            rows=self.rows,
            kv_rows=self.kv_rows,
            shares=shares,
            ulysses_rank=self.mesh.ulysses_rank,
            row_head_bytes=batch * head_dim * dtype.itemsize,
            value_row_head_bytes=batch * (value_head_dim or head_dim) * dtype.itemsize,
        )


def _pieces(layout: Layout, mesh: SequenceMesh) -> tuple[int, ...]:
    """Tokens of every ulysses rank of this ring rank."""
    cut = split_evenly(layout.counts[mesh.ring_rank], mesh.ulysses)
    return tuple(stop - start for start, stop in itertools.pairwise(cut))


def _all_positions(layout: Layout, mesh: SequenceMesh) -> Tensor:
    """Global positions of all tokens, (s,), rank after rank: the order in which they are gathered."""
    places = itertools.product(range(mesh.ring), range(mesh.ulysses))
    return torch.cat(
        [positions_of(layout, mesh.ulysses, ring_rank, ulysses_rank) for ring_rank, ulysses_rank in places]
    )


def _check_held(x: Tensor, dim: int, held: Layout, wanted: Layout, mesh: SequenceMesh) -> None:
    if (held.s, held.ring) != (wanted.s, wanted.ring):
        raise ValueError(
            f"shard_local: tokens are held by a layout of {held.s} tokens for ring={held.ring}, the schedule"
            f" is of {wanted.s} for ring={wanted.ring}; build it for those"
        )
    n = _pieces(held, mesh)[mesh.ulysses_rank]
    if not -x.ndim <= dim < x.ndim or x.shape[dim] != n:
        raise ValueError(
            f"shard_local: dim {dim} of a tensor of shape {tuple(x.shape)} must hold the {n} tokens that the"
            f" layout {held.name!r} gives rank {mesh.rank}; pass that dim, or the layout by which it is held"
        )


class _Unshard(torch.autograd.Function):
    """All-gather over ulysses, then over ring, then from storage order to global order; and its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, schedule: Schedule, dim: int, keys: bool, reduce_grad: bool) -> Tensor:
        ctx.schedule = schedule
        ctx.dim = dim
        ctx.keys = keys
        ctx.reduce_grad = reduce_grad
        mesh = schedule.mesh
        side = schedule.side(keys=keys)
        rows_first = x.movedim(dim, 0)
        row_shape = rows_first.shape[1:]
        gathered = rows_first.contiguous().view(-1)
        for group, counts in ((mesh.ulysses_group, side.rows), (mesh.ring_group, side.layout.counts)):
            if group is not None:
                gathered = all_gather(gathered, [count * row_shape.numel() for count in counts], group)
        stored = gathered.view(-1, *row_shape)  # (s, ...), rank after rank
        order = schedule._order(keys=keys, device=x.device)
        return torch.empty_like(stored).index_copy_(0, order, stored).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        if ctx.reduce_grad:  # every rank used the whole tensor in a part of the loss
            rows_first = grad.movedim(ctx.dim, 0)
            own = _sum_to_owner(rows_first, ctx.schedule, ctx.keys).movedim(0, ctx.dim)
        else:
            own = grad.index_select(ctx.dim, ctx.schedule._positions(keys=ctx.keys, device=grad.device))
        return own, None, None, None, None


def _sum_to_owner(grad: Tensor, schedule: Schedule, keys: bool) -> Tensor:
    """(s, ...) gradients of all ranks -> (n, ...) this rank's rows, summed.

    First to the ring rank that holds them, then to the ulysses rank.
    """
    mesh = schedule.mesh
    side = schedule.side(keys=keys)
    stored = grad.index_select(0, schedule._order(keys=keys, device=grad.device))
    if mesh.ring_group is not None:
        stored = _sum_scatter(stored, side.layout.counts, mesh.ring_rank, mesh.ring_group)
    if mesh.ulysses_group is not None:
        stored = _sum_scatter(stored, side.rows, mesh.ulysses_rank, mesh.ulysses_group)
    return stored


def _sum_scatter(stored: Tensor, counts: tuple[int, ...], me: int, group: str) -> Tensor:
    """Rows for all ranks of a group -> this rank's rows, summed over the group; ranks hold `counts` rows."""
    row_shape = stored.shape[1:]
    sizes = [count * row_shape.numel() for count in counts]
    pending = start_exchange(stored.reshape(-1), sizes, [sizes[me]] * len(counts), group, is_ours=False)
    received = pending.wait()  # what was sent may be a view of the incoming gradient: not ours
    return received.view(len(counts), counts[me], *row_shape).sum(0)
