"""From any sharding of a sequence to a schedule's, without the whole sequence on any rank.

A data loader may give each rank the next s / (R U) tokens, in order. What a schedule wants of each rank lies
elsewhere: two exchanges bring every token to its rank, along the ring and along ulysses.

    held by (r, u)  -- along ring: to the ring rank that wants it -->  (r', u)  -- along ulysses -->  (r', u')

Every rank works out from both layouts who sends what: nothing is negotiated. The gradient takes the same way
back.

Legend: s tokens, n held and m wanted tokens of a rank, R ring degree, U ulysses degree, (r, u) a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from seqmesh.engine.exchange import start_exchange
from seqmesh.engine.mesh import SequenceMesh
from seqmesh.layouts import Layout, Span, split_evenly


def positions_of(layout: Layout, ulysses: int, ring_rank: int, ulysses_rank: int) -> Tensor:
    """Global positions of any rank's tokens, (n,) int64, in storage order."""
    cut = split_evenly(layout.counts[ring_rank], ulysses)
    return tokens_in_order(layout.ranks[ring_rank])[cut[ulysses_rank] : cut[ulysses_rank + 1]]


def tokens_in_order(spans: Sequence[Span]) -> Tensor:
    """The tokens of some spans, (n,) int64, one span after the other."""
    ranges = [torch.arange(span.tokens.start, span.tokens.stop, span.tokens.step) for span in spans]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Hop:
    """One exchange: rows in the order in which they are sent, and how many go to and come from each peer."""

    order: Tensor
    back: Tensor
    """The inverse permutation."""
    sent: list[int]
    received: list[int]
    group: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Route:
    """The way of this rank's tokens. Made by `route`."""

    hops: tuple[_Hop, _Hop]
    order: Tensor
    """Rows as the last exchange brings them, in the order of storage."""
    back: Tensor


def route(mesh: SequenceMesh, held: Layout, wanted: Layout, device: torch.device) -> Route:
    """How the tokens that ranks hold by one layout come to the ranks that want them by another."""
    ring_of, ulysses_of, place_of = (torch.empty(wanted.s, dtype=torch.int64) for _ in range(3))
    for r, u in product(range(mesh.ring), range(mesh.ulysses)):
        tokens = positions_of(wanted, mesh.ulysses, r, u)
        ring_of[tokens] = r
        ulysses_of[tokens] = u
        place_of[tokens] = torch.arange(len(tokens))

    def after_ring(u: int) -> list[Tensor]:
        """Tokens that (mesh.ring_rank, u) gets from each ring rank, in the order in which they were held."""
        every = (positions_of(held, mesh.ulysses, r, u) for r in range(mesh.ring))
        return [tokens[ring_of[tokens] == mesh.ring_rank] for tokens in every]

    mine = positions_of(held, mesh.ulysses, mesh.ring_rank, mesh.ulysses_rank)
    along_ring = _hop(ring_of[mine], after_ring(mesh.ulysses_rank), mesh.ring, mesh.ring_group, device)
    came = torch.cat(after_ring(mesh.ulysses_rank))
    all_came = (torch.cat(after_ring(u)) for u in range(mesh.ulysses))
    wanted_here = [tokens[ulysses_of[tokens] == mesh.ulysses_rank] for tokens in all_came]
    along_ulysses = _hop(ulysses_of[came], wanted_here, mesh.ulysses, mesh.ulysses_group, device)
    places = place_of[torch.cat(wanted_here)]
    return Route(hops=(along_ring, along_ulysses), order=places.argsort().to(device), back=places.to(device))


def _hop(targets: Tensor, comes: list[Tensor], ranks: int, group: str | None, device: torch.device) -> _Hop:
    """An exchange of rows, each of which goes to a target, where `comes` are the rows of every peer."""
    order = targets.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return _Hop(
        order=order.to(device),
        back=back.to(device),
        sent=torch.bincount(targets, minlength=ranks).tolist(),
        received=[len(tokens) for tokens in comes],
        group=group,
    )


class Reshard(torch.autograd.Function):
    """Rows (n, ...) that this rank holds -> rows (m, ...) that it wants; and the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Route) -> Tensor:
        ctx.way = way
        for hop in way.hops:
            x = _exchange(x.index_select(0, hop.order), hop.sent, hop.received, hop.group)
        return x.index_select(0, way.order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        grad = grad.index_select(0, ctx.way.back)
        for hop in reversed(ctx.way.hops):
            grad = _exchange(grad, hop.received, hop.sent, hop.group).index_select(0, hop.back)
        return grad, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: str | None) -> Tensor:
    """Rows to every rank of a group, in order, and those that come from each; unchanged without a group."""
    if group is None:
        return rows
    row = rows.shape[1:].numel()
    flat = rows.contiguous().view(-1)
    pending = start_exchange(
        flat, [count * row for count in sent], [count * row for count in received], group, is_ours=False
    )
    return pending.wait().view(sum(received), *rows.shape[1:])
