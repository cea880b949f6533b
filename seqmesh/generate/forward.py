"""One forward on a sharded cache: how its layers attend, and which hidden states go on."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from seqmesh.engine.attention import attention
from seqmesh.engine.merge import accumulator_dtype
from seqmesh.engine.mesh import SequenceMesh
from seqmesh.engine.reshard import tokens_in_order
from seqmesh.engine.sharding import Schedule
from seqmesh.generate.held import since, tokens_of
from seqmesh.generate.moving import RowSizes, moves_queries
from seqmesh.generate.parts import AttentionPart, from_everyone, merged, own_part, rows_of_all, to_owners
from seqmesh.generate.plan import CacheState, ForwardPlan, SamePadding, shifted
from seqmesh.generate.rows import HeldRows
from seqmesh.generate.sight import Sight, as_stored
from seqmesh.integrations.cached import CachedForward, Softmax
from seqmesh.integrations.samples import together
from seqmesh.layouts import Span
from seqmesh.masks import Mask

Made = TypeVar("Made")


class ShardedForward(CachedForward):
    """What travels through the layers of a model in place of a schedule."""

    def __init__(
        self,
        state: CacheState,
        plan: ForwardPlan,
        layers: Sequence[HeldRows],
        groups: Sequence[SamePadding],
        *,
        logits_to_keep: int,
    ) -> None:
        self.state = state
        self.plan = plan
        self.layers = layers
        self.groups = groups
        self.past = plan.past
        self.logits_to_keep = logits_to_keep
        """Last tokens of which logits are asked; 0: all."""
        self._kept: dict[object, object] = {}

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        chunk: int | None,
        softmax: Softmax,
    ) -> Tensor:
        """Attention of this forward's queries to all that the mesh holds, as CachedForward says."""
        kind, rows = Sight(window, chunk), self.layers[layer]
        rows.check(layer)
        if self._first_seen(kind, self.past) < rows.first:
            raise ValueError(
                f"layer {layer} has forgotten tokens that this attention_mask shows again, as its chunks"
                " begin elsewhere; keep the padding of the calls before"
            )
        if self.plan.is_sharded and not self._moves_queries(kind, rows.first, q, k, v):
            schedules = self._once(("schedules", kind, rows.first), lambda: self._schedules(kind, rows.first))
            found = [
                attention(*group.samples.of(q, k, v), schedule, *softmax)
                for group, schedule in zip(self.groups, schedules, strict=True)
            ]
            out = self._together(found, 0)
        else:
            out = self._by_parts(kind, rows.first, q, k, v, softmax)
        rows.drop(self._first_seen(kind, self.plan.total), self.plan.total)
        return out

    def _first_seen(self, kind: Sight, token: int) -> int:
        """The first token that this one sees, of any sequence."""
        return min(kind.first_seen(token, group.real) for group in self.groups)

    # Keys move.

    def _schedules(self, kind: Sight, first: int) -> list[Schedule]:
        """Of each group: on the mesh if the cache was empty, else over all ranks as one ring."""
        plan = self.plan
        if plan.prompt_layout is not None:
            mesh, queries, keys = self.state.mesh, plan.prompt_layout, None
        else:
            mesh, queries, keys = self.state.ring, plan.queries, plan.keys(first)
        return [Schedule.build(mask, mesh, queries, kv_layout=keys) for mask in self._masks(kind, first)]

    def _masks(self, kind: Sight, first: int) -> list[Mask]:
        return [kind.mask(self.plan.past, self.plan.tokens, first, group.real) for group in self.groups]

    def _moves_queries(self, kind: Sight, first: int, q: Tensor, k: Tensor, v: Tensor) -> bool:
        plan = self.plan
        if plan.prompt_layout is not None:
            return False
        sizes = RowSizes(
            heads=q.shape[2],
            kv_heads=k.shape[2],
            key_dim=q.shape[3],
            value_dim=v.shape[3],
            itemsize=q.element_size(),
            lse_itemsize=accumulator_dtype(q.dtype).itemsize,
        )

        def decide() -> bool:
            masks = [
                mask
                for mask, group in zip(self._masks(kind, first), self.groups, strict=True)
                for _ in range(group.samples.count(q.shape[0]))
            ]
            return moves_queries(masks, plan.queries, plan.keys(first), sizes)

        return self._once(("moves", kind, first, sizes), decide)

    # Queries move, or are everywhere.

    def _by_parts(self, kind: Sight, first: int, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> Tensor:
        plan, ring = self.plan, self.state.ring
        counts = plan.queries.counts
        if plan.is_sharded:
            assert ring.ring_group is not None
            q = rows_of_all(q, counts, ring.ring_group)
        schedules = self._once(("own", kind, first), lambda: self._own_schedules(kind, first))
        found = [
            own_part(*group.samples.of(q, k, v), schedule, softmax.scale, softmax.softcap)
            for group, schedule in zip(self.groups, schedules, strict=True)
        ]
        part = AttentionPart(
            out=self._together([one.out for one in found], 1),
            lse=self._together([one.lse for one in found], 0),
        )
        if plan.is_sharded:
            assert ring.ring_group is not None
            return merged(to_owners(part, counts, plan.rank, ring.ring_group), softmax.sinks)
        return merged(from_everyone(part, ring.size, ring.ring_group), softmax.sinks)

    def _own_schedules(self, kind: Sight, first: int) -> list[Schedule | None]:
        """Of each group, on this rank alone: all queries, one rank's after the other, by its keys."""
        plan = self.plan
        keys = shifted(since(plan.own_after, first), first)
        asked = plan.queries.ranks if plan.is_sharded else ((Span(0, plan.tokens),),)
        queries = [span for spans in asked for span in spans]
        masks = [as_stored(mask, queries, keys) for mask in self._masks(kind, first)]
        return [
            Schedule.build(mask, SequenceMesh.alone(), "contiguous") if mask.area else None for mask in masks
        ]

    # Of all.

    def finish(self, hidden: Tensor) -> Tensor:
        """The last hidden states of which logits are asked, on every rank. Ends the forward.

        Raises:
            ValueError: on every rank alike, a layer that did not use the cache.
        """
        plan, ring = self.plan, self.state.ring
        if self.state.plan is not plan:  # a model around the one that ended it
            return hidden
        for number, rows in enumerate(self.layers):
            rows.check(number)
        self.state.finished()
        if not plan.is_sharded:
            return hidden
        assert ring.ring_group is not None
        first = plan.total - (self.logits_to_keep or plan.tokens)
        asked = [since(spans, first) for spans in plan.kept]
        own = (plan.places + plan.past >= first).nonzero()[:, 0].to(hidden.device)
        last = rows_of_all(
            hidden.index_select(1, own), [tokens_of(spans) for spans in asked], ring.ring_group
        )
        order = torch.cat([tokens_in_order(spans) for spans in asked]).argsort().to(hidden.device)
        return last.index_select(1, order)

    def _together(self, parts: list[Tensor], dim: int) -> Tensor:
        """Groups' results as one batch, whose sequences are along `dim`."""
        return together([group.samples for group in self.groups], parts, dim)

    def _once(self, key: object, make: Callable[[], Made]) -> Made:
        """What all layers of a kind ask for, made once."""
        if key not in self._kept:
            self._kept[key] = make()
        found: Made = self._kept[key]  # type: ignore[assignment]
        return found
