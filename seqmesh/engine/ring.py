"""The ring: walk over the stages of a schedule, next stage's rows in flight, and merge; and the same walk for
the gradients.

    forward     stage 0: own K/V   | stage 1: received rows       | stage 2 ...
                fetch 1 in flight  | fetch 2 in flight            |
    backward    the same fetches; each stage's partial dK/dV travel home while the next stage computes

Own rows never travel. All ranks issue the same collectives in the same order, whether or not they have
anything to send.
Legend: N rows of the ring rank, b batch, h query heads and g K/V heads of this rank, d head dim. Tensors are
rows-first, (N, b, heads, d), so that rows are slices; kernels see (b, heads, rows, d) views.

Source: Ring-Attention (Liu et al. 2023); sending partial gradients straight home and accumulating there in
fp32 is ours.
"""

import torch
from torch import Tensor

from seqmesh.engine.call import Plan
from seqmesh.engine.exchange import Pending, add_returned_rows_, fetch_rows, return_rows
from seqmesh.engine.merge import RowSums, RunningAttention, accumulator_dtype
from seqmesh.masks import Band
from seqmesh.schedule.heads import HeadShare
from seqmesh.schedule.ring import Stage


def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan, share: HeadShare
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's rows and heads to all keys: (N, b, h, d), lse (b, h, N)."""
    running, stages = RunningAttention(q), plan.schedule.ring.stages
    keys, values, coming = k, v, _fetch(k, v, plan, 1)
    for number, stage in enumerate(stages):
        if coming is not None and number:
            keys, values = _arrived(coming, stage, k)
            coming = None  # frees what was sent before the next buffers are made
            coming = _fetch(k, v, plan, number + 1)
        for tile in _tiles(stage, plan):
            rows, cols = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
            running.add(
                tile.q_start, tile.q_stop, *_forward(q[rows], keys[cols], values[cols], tile, plan, share)
            )
    return running.finish(sinks)


def ring_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, share: HeadShare
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
            coming = None  # frees what was sent before the next buffers are made
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


def _fetch(k: Tensor, v: Tensor, plan: Plan, number: int) -> Pending | None:
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


def _tiles(stage: Stage, plan: Plan) -> list[Band]:
    return [tile for block in stage.blocks for tile in plan.kernel.tiles(block)]


def _heads_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)  # (rows, b, heads, d) -> (b, heads, rows, d)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Band, plan: Plan, share: HeadShare
) -> tuple[Tensor, Tensor]:
    """The kernel on one tile: (b, h, rows, d) and (b, h, rows).

    One call per group of equally used K/V heads: mostly one.
    """
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


def _backward(
    tensors: tuple[Tensor, ...], lse: Tensor, tile: Band, plan: Plan, share: HeadShare
) -> list[Tensor]:
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
