"""The ring: walk over the stages of a schedule, the next stage's rows in flight; forward and backward.

    forward     stage 0: own K/V   | stage 1: received rows       | stage 2 ...
                fetch 1 in flight  | fetch 2 in flight            |
    backward    the same walk; each stage's partial dK/dV travel home while the next stage computes

Own rows never travel. All ranks issue the same collectives in the same order, whether or not they have
anything to send.

Legend: N rows of the ring rank, b batch, h query heads and g K/V heads of this rank, d head dim of queries
and keys, e of values, t rows of a launch. Tensors are rows-first, (N, b, heads, dim): rows are slices, and
kernels see (b, heads, rows, dim) views.
Source: Ring-Attention (Liu et al. 2023); sending partial gradients straight home and accumulating there in
fp32 is ours.
"""

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from seqmesh.engine.call import AttentionCall, Needs
from seqmesh.engine.exchange import Pending, columns, fetch_rows, pack_rows, return_rows
from seqmesh.engine.kernels import BatchKernel, Launch
from seqmesh.engine.merge import check_mergeable
from seqmesh.engine.program import StagePlan
from seqmesh.engine.results import RowSums, RunningAttention
from seqmesh.schedule.heads import HeadShare
from seqmesh.schedule.pieces import Runs


class Ready(NamedTuple):
    """A stage, and the keys and values that its launches index."""

    work: StagePlan
    keys: Tensor
    """(received rows, b, g, d); at stage 0 this rank's own rows."""
    values: Tensor
    """(received rows, b, g, e)"""


def start_walk(k: Tensor, v: Tensor, call: AttentionCall) -> Iterator[Ready]:
    """Every stage, for keys k (N, b, g, d) and values v (N, b, g, e) of this rank.

    The rows of stage 1 start to come now.
    """
    program = call.program
    hops = program.stages[1:]
    packed = None
    if hops and program.packs_keys:
        packed = pack_rows(k, v, [(0, k.shape[0])])
    coming = _fetch(k, v, packed, hops[0], call) if hops else None
    return _walk(k, v, packed, coming, call)


def _walk(
    k: Tensor, v: Tensor, packed: Tensor | None, coming: Pending | None, call: AttentionCall
) -> Iterator[Ready]:
    """The stages, one after the other, the exchange of the next one's rows in flight.

    What it yields lives until the next stage's rows have arrived, if whoever walks lets go of it: two
    buffers, of what is computed on and of what is under way, never three.
    """
    own, *hops = call.program.stages
    shapes = [(x.shape[2], x.shape[3]) for x in (k, v)]
    row_shape = (k.shape[1], sum(heads * dim for heads, dim in shapes))
    yield Ready(own, k, v)
    for number, work in enumerate(hops, start=1):
        assert coming is not None
        received = coming.wait().view(work.message.received, *row_shape)
        coming = None  # frees what was sent, before the next buffers are made
        if number < len(hops):
            coming = _fetch(k, v, packed, hops[number], call)
        keys, values = columns(received, shapes)
        del received
        yield Ready(work, keys, values)
        del keys, values


def _fetch(k: Tensor, v: Tensor, packed: Tensor | None, work: StagePlan, call: AttentionCall) -> Pending:
    """Start the exchange of a stage's rows."""
    group = call.schedule.mesh.ring_group
    assert group is not None
    message = work.message
    return fetch_rows(k, v, packed, message.runs, message.sent_to, message.received_from, group)


def ring_forward(
    q: Tensor, walk: Iterator[Ready], sinks: Tensor | None, call: AttentionCall, share: HeadShare
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's rows q (N, b, h, d) to all keys: (N, b, h, e), lse (b, h, N)."""
    running = RunningAttention(call.program.queries, q, call.value_head_dim)
    of_queries = _QueryRows(_heads_first(q))
    for work, keys, values in walk:
        k, v = _heads_first(keys), _heads_first(values)
        del keys, values
        for part, launch in _launches(work, share):
            # Not kept in variables: its output must not live on while the next one is computed.
            running.add(part, *_forward(of_queries, k, v, launch, call, share))
        del k, v  # the walk frees them before it makes the next buffers
    return running.finish(sinks)


def ring_backward(
    grad_out: Tensor,
    q: Tensor,
    walk: Iterator[Ready],
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
    share: HeadShare,
    needs: Needs,
) -> tuple[RowSums | None, RowSums | None]:
    """dq (N, b, h, d), and dk and dv of this rank's own rows; None where not needed."""
    dq = RowSums(call.program.queries, [q]) if needs.q else None
    home = _KeysHome(call) if needs.kv else None
    of_queries = _QueryRows(_heads_first(q), _heads_first(grad_out), _heads_first(out), lse)
    for number, (work, keys, values) in enumerate(walk):
        dkv = None if home is None else home.sums_of(work, keys, values)
        k, v = _heads_first(keys), _heads_first(values)
        del keys, values
        for part, launch in _launches(work, share):
            launch_dq, *launch_dkv = _backward(of_queries, k, v, launch, call, share)
            if dq is not None:
                dq.add(part, launch_dq)
            if dkv is not None:
                dkv.add(part - work.first_part, *launch_dkv)
            del launch_dq, launch_dkv
        del k, v  # the walk frees them before it makes the next buffers
        if home is not None and dkv is not None:
            home.stage_is_done(number, dkv)
    return dq, None if home is None else home.finish()


class _KeysHome:
    """Gradients of this rank's own K/V rows: what it computes itself, and what peers send home.

    At most one part is under way: it is sent after a stage, and travels while the next one computes.
    """

    def __init__(self, call: AttentionCall) -> None:
        self._call = call
        self._own: RowSums | None = None
        self._row_shape = (0, 0)
        self._under_way: tuple[Pending, int] | None = None

    def sums_of(self, work: StagePlan, keys: Tensor, values: Tensor) -> RowSums:
        """What adds up the gradients of a stage's keys and values."""
        if work.received is not None:
            return RowSums(work.received, [keys, values])
        self._row_shape = (keys.shape[1], keys.shape[2:].numel() + values.shape[2:].numel())
        self._own = RowSums(self._call.program.own_keys, [keys, values])
        return self._own

    def stage_is_done(self, number: int, dkv: RowSums) -> None:
        """Add what the stage before has sent, which travelled while this one computed; send this one's."""
        self._receive()
        if number == 0:
            return
        group = self._call.schedule.mesh.ring_group
        assert group is not None
        message = self._call.program.stages[number].message
        pending = return_rows(dkv.finish_flat(), message.sent_to, message.received_from, group)
        self._under_way = pending, number

    def finish(self) -> RowSums:
        """All of them, when the last stage's, which nothing hides, are there."""
        self._receive()
        assert self._own is not None
        return self._own

    def _receive(self) -> None:
        """Add what has been under way, if anything is."""
        if self._under_way is None or self._own is None:
            return
        program = self._call.program
        pending, number = self._under_way
        self._under_way = None
        came = pending.wait().view(program.stages[number].message.sent, *self._row_shape)
        self._own.add_flat(program.home_part(number), came)


def _launches(work: StagePlan, share: HeadShare) -> Iterator[tuple[int, Launch]]:
    """The launches of a stage with their numbers; none without a head."""
    return enumerate(work.launches if share.groups else (), start=work.first_part)


def _heads_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)  # (rows, b, heads, dim) -> (b, heads, rows, dim), as kernels take it


class _QueryRows:
    """Rows of tensors of the queries (b, heads, n, ...). Stage after stage asks for the same run of them."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._views: dict[Runs, list[Tensor]] = {}

    def __call__(self, runs: Runs) -> list[Tensor]:
        """The rows of these runs of every tensor; what is copied for several runs is not kept."""
        found = self._views.get(runs)
        if found is None:
            found = [_rows(x, runs) for x in self._tensors]
            if len(runs) == 1:
                self._views[runs] = found
        return found


def _rows(x: Tensor, runs: Runs) -> Tensor:
    """Rows of (b, heads, n, ...), one run after the other; a view of one run."""
    if len(runs) == 1:
        ((start, stop),) = runs
        return x if stop - start == x.shape[2] else x.narrow(2, start, stop - start)
    return torch.cat([x.narrow(2, start, stop - start) for start, stop in runs], 2)


def _forward(
    of_queries: _QueryRows, k: Tensor, v: Tensor, launch: Launch, call: AttentionCall, share: HeadShare
) -> tuple[Tensor, Tensor]:
    """One launch of the kernel: (b, h, t, e) and (b, h, t).

    One call per group of equally used K/V heads: one in all, unless query heads are split unevenly.
    """
    (q,) = of_queries(launch.queries)
    k, v = _rows(k, launch.keys), _rows(v, launch.keys)
    if len(share.groups) == 1:  # all heads: no need to slice them
        return _launched(q, k, v, launch, call)
    parts = []
    for group in share.groups:
        heads = slice(group.q_start, group.q_stop)
        kv = slice(group.kv_start, group.kv_stop)
        parts.append(_launched(q[:, heads], k[:, kv], v[:, kv], launch, call))
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)


def _launched(q: Tensor, k: Tensor, v: Tensor, launch: Launch, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The kernel's call."""
    if len(launch.tiles) == 1:
        found = call.kernel.forward(q, k, v, launch.tiles[0], call.rule)
    else:
        found = cast(BatchKernel, call.kernel).forward_many(q, k, v, launch, call.rule)
    if torch.is_anomaly_enabled():
        check_mergeable(*found, launch.tiles)
    return found


def _backward(
    of_queries: _QueryRows, k: Tensor, v: Tensor, launch: Launch, call: AttentionCall, share: HeadShare
) -> tuple[Tensor, ...]:
    """The kernel's gradients of one launch: dq (b, h, t, d), dk (b, g, t, d) and dv (b, g, t, e)."""
    q, grad_out, out, lse = of_queries(launch.queries)
    k, v = _rows(k, launch.keys), _rows(v, launch.keys)
    if len(share.groups) == 1:
        return _launched_backward((grad_out, q, k, v, out, lse), launch, call)
    parts = []
    for group in share.groups:
        heads = slice(group.q_start, group.q_stop)
        kv = slice(group.kv_start, group.kv_stop)
        tensors = grad_out[:, heads], q[:, heads], k[:, kv], v[:, kv], out[:, heads], lse[:, heads]
        parts.append(_launched_backward(tensors, launch, call))
    return tuple(torch.cat(gradients, 1) for gradients in zip(*parts, strict=True))


def _launched_backward(
    tensors: tuple[Tensor, ...], launch: Launch, call: AttentionCall
) -> tuple[Tensor, ...]:
    """The kernel's call, for grad_out, q, k, v, out and lse."""
    grad_out, q, k, v, out, lse = tensors
    if len(launch.tiles) == 1:
        return call.kernel.backward(grad_out, q, k, v, out, lse, launch.tiles[0], call.rule)
    return cast(BatchKernel, call.kernel).backward_many(grad_out, q, k, v, out, lse, launch, call.rule)
