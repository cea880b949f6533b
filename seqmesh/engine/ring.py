"""The ring: walk over the stages of a schedule, the next stage's rows in flight; forward and backward.

    forward     stage 0: own K/V   | stage 1: received rows       | stage 2 ...
                fetch 1 in flight  | fetch 2 in flight            |
    backward    the same walk; each stage's partial dK/dV travel home while the next stage computes

Own rows never travel. All ranks issue the same collectives in the same order, whether or not they have
anything to send.

Legend: N rows of the ring rank, b batch, h query heads and g K/V heads of this rank, d head dim. Tensors are
rows-first, (N, b, heads, d), so that rows are slices; kernels see (b, heads, rows, d) views.
Source: Ring-Attention (Liu et al. 2023); sending partial gradients straight home and accumulating there in
fp32 is ours.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seqmesh.engine.call import AttentionCall
from seqmesh.engine.exchange import Pending, add_returned_rows_, fetch_rows, return_rows
from seqmesh.engine.kernels import Tile
from seqmesh.engine.merge import RowSums, RunningAttention, accumulator_dtype
from seqmesh.schedule import Stage
from seqmesh.schedule.heads import HeadShare


class Ready(NamedTuple):
    """A stage, and the keys and values that its blocks index."""

    stage: Stage
    keys: Tensor
    """(received rows, b, g, d); at stage 0 this rank's own rows."""
    values: Tensor


def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: AttentionCall, share: HeadShare
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's rows and heads to all keys: (N, b, h, d), lse (b, h, N)."""
    running = RunningAttention(q)
    for stage, keys, values in _walk(k, v, call):
        for tile in _tiles(stage, call):
            rows, columns = _slices(tile)
            # Not kept in variables: a tile's output must not live on while the next one is computed.
            running.add(rows, *_tile_forward(q[rows], keys[columns], values[columns], tile, call, share))
        del keys, values  # the walk frees them before it makes the next buffers
    return running.finish(sinks)


def ring_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
    share: HeadShare,
) -> tuple[Tensor, Tensor]:
    """dq (N, b, h, d) and dkv (N, b, 2 g, d), the keys' heads first, in the inputs' dtype."""
    _, b, g, d = k.shape
    dq = RowSums((q.shape[0], b, q.shape[2], d), q)
    home = _Home(k, call)
    for number, (stage, keys, values) in enumerate(_walk(k, v, call)):
        is_own = number == 0
        dkv = home.grads if is_own else RowSums((stage.rows_received, b, 2 * g, d), k)
        for tile in _tiles(stage, call):
            rows, columns = _slices(tile)
            tile_dq, tile_dk, tile_dv = _tile_backward(
                grad_out[rows],
                q[rows],
                keys[columns],
                values[columns],
                out[rows],
                lse[:, :, rows],
                tile,
                call,
                share,
            )
            dq.add(rows, tile_dq)
            dkv.add(columns, tile_dk, tile_dv)
        home.receive()  # what the stage before has sent; it travelled while this one computed
        if not is_own:
            home.send(dkv.sums().to(k.dtype), stage)
        del keys, values  # the walk frees them before it makes the next buffers
    home.receive()  # of the last stage, which nothing hides
    return dq.sums().to(q.dtype), home.grads.sums().to(k.dtype)


def _walk(k: Tensor, v: Tensor, call: AttentionCall) -> Iterator[Ready]:
    """Every stage of this rank with its keys and values, the exchange of the next stage's rows in flight.

    What it yields lives until the next stage's rows have arrived, if whoever walks lets go of it: two
    buffers, of what is computed on and of what is under way, never three.
    """
    own, *hops = call.schedule.ring.stages
    coming = _fetch(k, v, hops[0], call) if hops else None
    yield Ready(own, k, v)
    for number, stage in enumerate(hops, start=1):
        assert coming is not None
        ready = _arrived(coming, stage, k)
        coming = None  # frees what was sent, before the next buffers are made
        if number < len(hops):
            coming = _fetch(k, v, hops[number], call)
        yield ready


def _fetch(k: Tensor, v: Tensor, stage: Stage, call: AttentionCall) -> Pending:
    """Start the exchange of a stage's rows."""
    mesh = call.schedule.mesh
    assert mesh.ring_group is not None
    return fetch_rows(k, v, stage.sends, stage.receives, mesh.ring, mesh.ring_group)


def _arrived(coming: Pending, stage: Stage, k: Tensor) -> Ready:
    """Wait for the rows of a stage."""
    _, b, g, d = k.shape
    received = coming.wait().view(stage.rows_received, b, 2 * g, d)
    return Ready(stage, received[:, :, :g], received[:, :, g:])


class _Home:
    """Gradients of this rank's own K/V rows, in fp32: what it computes itself, and what peers send home.

    At most one part is under way: it is sent after a stage, and travels while the next one computes.
    """

    def __init__(self, k: Tensor, call: AttentionCall) -> None:
        rows, b, g, d = k.shape
        self.grads = RowSums((rows, b, 2 * g, d), k)
        self._mesh = call.schedule.mesh
        self._under_way: tuple[Pending, Stage] | None = None

    def send(self, partial: Tensor, stage: Stage) -> None:
        """Send gradients (received rows, b, 2 g, d) of a stage's rows to their owners; ours start to come."""
        mesh = self._mesh
        assert mesh.ring_group is not None
        pending = return_rows(partial, stage.sends, stage.receives, mesh.ring, mesh.ring_group)
        self._under_way = pending, stage

    def receive(self) -> None:
        """Add what has been under way, if anything is."""
        if self._under_way is not None:
            pending, stage = self._under_way
            add_returned_rows_(self.grads.sums(), pending.wait(), stage.sends)
            self._under_way = None


def _tiles(stage: Stage, call: AttentionCall) -> Iterator[Tile]:
    for block in stage.blocks:
        yield from call.kernel.tiles(block)


def _slices(tile: Tile) -> tuple[slice, slice]:
    """Query rows and key rows of a tile."""
    band = tile.band
    return slice(band.q_start, band.q_stop), slice(band.k_start, band.k_stop)


def _heads_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)  # (rows, b, heads, d) -> (b, heads, rows, d)


def _tile_forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, call: AttentionCall, share: HeadShare
) -> tuple[Tensor, Tensor]:
    """The kernel on one tile: (b, h, rows, d) and (b, h, rows).

    One call per group of equally used K/V heads: one in all, unless query heads are split unevenly.
    """
    q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
    if not share.groups:  # no head of the chunk is ours: q has none either, and is its own output
        return q, q.new_zeros(q.shape[:3], dtype=accumulator_dtype(q.dtype))
    parts = []
    for group in share.groups:
        heads = slice(group.q_start, group.q_stop)
        kv = slice(group.kv_start, group.kv_stop)
        parts.append(call.kernel.forward(q[:, heads], k[:, kv], v[:, kv], tile, call.rule))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)


def _tile_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tile: Tile,
    call: AttentionCall,
    share: HeadShare,
) -> tuple[Tensor, ...]:
    """The kernel's gradients on one tile: dq (b, h, rows, d), dk and dv (b, g, rows, d).

    As in the forward, tensors come rows-first, but for lse (b, h, rows).
    """
    grad_out, q, k, v, out = map(_heads_first, (grad_out, q, k, v, out))
    if not share.groups:
        return q, k, v  # without a head, and so are their gradients
    parts = []
    for group in share.groups:
        heads = slice(group.q_start, group.q_stop)
        kv = slice(group.kv_start, group.kv_stop)
        parts.append(
            call.kernel.backward(
                grad_out[:, heads],
                q[:, heads],
                k[:, kv],
                v[:, kv],
                out[:, heads],
                lse[:, heads],
                tile,
                call.rule,
            )
        )
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(gradients, 1) for gradients in zip(*parts, strict=True))
