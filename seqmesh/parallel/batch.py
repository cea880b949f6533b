"""Micro-batches of a step -> this rank's tokens, their schedules, and the one count that divides the loss.

    TokenBatch (b, s)  -- pack -->  (1, s) and its mask  -- schedule.shard -->  LocalBatch (1, n)

Ranks of a sequence (and of tp and pp) pass the same micro-batches; ranks of dp pass their own. The count of
labels is that of all micro-batches of all ranks: it is the only number that they need of each other, and the
only divisor anywhere.

    share of the loss of a rank and micro-batch  =  sum over its labels  /  label_count
    loss  =  sum of the shares,  gradient  =  sum of the gradients of the shares

A micro-batch that one rank cannot run is refused on all ranks, in the same exchange as the count: a rank that
raised alone would leave the others waiting in a collective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from seqmesh import layouts
from seqmesh.engine.sharding import Schedule
from seqmesh.integrations.calls import LayerCall
from seqmesh.layouts import Layout
from seqmesh.parallel.dims import ParallelMesh
from seqmesh.parallel.layer_kinds import KindMasks, LayerKinds
from seqmesh.parallel.packing import PackedTokens, TokenBatch, pack


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalBatch:
    """This rank's tokens of a micro-batch, on the mesh's device, and what they are computed with."""

    input_ids: Tensor
    """(1, n) int64"""
    shift_labels: Tensor
    """(1, n) int64, shifted before they were sharded; -100 where there is nothing to predict."""
    position_ids: Tensor
    """(1, n) int64: place in the document."""
    schedule: Schedule
    """Of layers that see whole documents; of the first other kind if none does."""
    sliding_schedule: Schedule | None
    """Of layers with a sliding window, over the same layout."""
    chunked_schedule: Schedule | None
    """Of layers that see chunks, over the same layout."""
    label_count: int
    """Labels of all ranks and micro-batches of the step."""
    batch_count: int
    """Micro-batches of all data-parallel ranks in the step."""

    def schedule_of(self, call: LayerCall) -> Schedule:
        """The schedule of a layer that calls attention so."""
        if call.chunk is not None:
            found = self.chunked_schedule
        else:
            found = self.schedule if call.window is None else self.sliding_schedule
        assert found is not None
        return found


class _Sharded(NamedTuple):
    """A micro-batch whose label count is not known yet."""

    packed: PackedTokens
    schedule: Schedule
    sliding: Schedule | None
    chunked: Schedule | None


WHOLE_DOCUMENTS = LayerKinds(full=1)
"""All layers see all of a document."""


class _Vote(NamedTuple):
    """What data-parallel ranks tell each other of a step."""

    labels: int
    micro_batches: int
    is_refused: int


def shard_batch(
    batch: TokenBatch | PackedTokens,
    mesh: ParallelMesh,
    *,
    layout: str | Layout = "auto",
    layers: LayerKinds = WHOLE_DOCUMENTS,
) -> LocalBatch:
    """`shard_micro_batches` of a step with one micro-batch."""
    (local,) = shard_micro_batches([batch], mesh, layout=layout, layers=layers)
    return local


def shard_micro_batches(
    batches: Sequence[TokenBatch | PackedTokens],
    mesh: ParallelMesh,
    *,
    layout: str | Layout = "auto",
    layers: LayerKinds = WHOLE_DOCUMENTS,
) -> tuple[LocalBatch, ...]:
    """This rank's tokens of all micro-batches of a step. A collective over data-parallel ranks.

    Args:
        batches: the micro-batches of this data-parallel rank, of any lengths.
        mesh: of all parallelisms.
        layout: as of `Schedule.build`.
        layers: what the model's layers see of a document; the layout is chosen for all of them.

    Raises:
        ValueError: on all ranks alike: a micro-batch that cannot be packed or that leaves a rank without a
            token, numbers of micro-batches that differ, or no label anywhere.
    """
    problem = ""
    sharded: list[_Sharded] = []
    for number, batch in enumerate(batches):
        try:
            sharded.append(_shard(batch, mesh, layout, layers))
        except ValueError as error:
            problem = f"micro-batch {number}: {error}"
            break
    labels = sum(one.packed.label_count for one in sharded)
    votes = _all_votes(_Vote(labels, len(batches), int(bool(problem))), mesh)
    _check(votes, problem)
    total = _Vote(sum(vote.labels for vote in votes), sum(vote.micro_batches for vote in votes), 0)
    return tuple(_local(one, total, mesh.device_type) for one in sharded)


def _shard(
    batch: TokenBatch | PackedTokens, mesh: ParallelMesh, layout: str | Layout, layers: LayerKinds
) -> _Sharded:
    packed = pack(batch) if isinstance(batch, TokenBatch) else batch
    kinds = layers.masks_of(packed)
    shared = _layout_for(kinds, layers, mesh.sequence.ring, layout)
    fewest = min(shared.counts) // mesh.sequence.ulysses
    if fewest == 0:
        # A model cannot run on no rows: some layers of transformers index the first one.
        raise ValueError(
            f"{packed.mask.q_len} tokens on ring={mesh.sequence.ring} x ulysses={mesh.sequence.ulysses}"
            " leave a rank without any; put more sequences into a micro-batch"
        )
    full, sliding, chunked = (
        None if mask is None else Schedule.build(mask, mesh.sequence, shared)
        for mask in (kinds.full, kinds.sliding, kinds.chunked)
    )
    schedule = full or sliding or chunked
    assert schedule is not None
    return _Sharded(packed, schedule, sliding, chunked)


def _layout_for(kinds: KindMasks, layers: LayerKinds, ring: int, layout: str | Layout) -> Layout:
    """The one layout of all kinds of layers."""
    if isinstance(layout, Layout):
        return layout
    found = kinds.present()
    if len(found) > 1 and layout in ("auto", "balanced"):
        choose = layouts.auto if layout == "auto" else layouts.balanced
        return choose(found, ring, weights=layers.counts())
    return layouts.named(layout, found[0], found[0].q_len, ring)


def _local(one: _Sharded, total: _Vote, device: str) -> LocalBatch:
    def shard(x: Tensor) -> Tensor:  # (1, s) -> (1, n)
        return one.schedule.shard(x, 1).to(device)

    return LocalBatch(
        input_ids=shard(one.packed.input_ids),
        shift_labels=shard(one.packed.shift_labels),
        position_ids=shard(one.packed.position_ids),
        schedule=one.schedule,
        sliding_schedule=one.sliding,
        chunked_schedule=one.chunked,
        label_count=total.labels,
        batch_count=total.micro_batches,
    )


def _all_votes(mine: _Vote, mesh: ParallelMesh) -> list[_Vote]:
    """The vote of every data-parallel rank, in their order."""
    group = mesh.group("data")
    if group is None:
        return [mine]
    sent = torch.tensor(mine, dtype=torch.int64, device=mesh.device_type)
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, sent, group=group)
    return [_Vote(*vote.tolist()) for vote in received]


def _check(votes: Sequence[_Vote], problem: str) -> None:
    """Raise what every rank has reason to, given the same votes."""
    if problem:
        raise ValueError(problem)
    refusing = [rank for rank, vote in enumerate(votes) if vote.is_refused]
    if refusing:
        raise ValueError(
            f"data-parallel ranks {refusing} refused a micro-batch of this step, so no rank runs it;"
            " see what they say"
        )
    numbers = [vote.micro_batches for vote in votes]
    if len(set(numbers)) > 1 or not numbers[0]:
        raise ValueError(
            f"data-parallel ranks have {numbers} micro-batches in this step; give each the same number,"
            " at least 1"
        )
    if not any(vote.labels for vote in votes):
        raise ValueError(
            "no token of this step has a label, so its loss is 0 / 0; leave the step out, on all ranks"
        )
