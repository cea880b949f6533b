"""Which tokens of one forward are whose, and what all layers of a cache share."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from seqmesh import layouts
from seqmesh.engine.mesh import SequenceMesh
from seqmesh.engine.reshard import tokens_in_order
from seqmesh.generate.held import Spans, dealt, joined, pieces, since, tokens_of, zigzagged
from seqmesh.generate.sight import Runs
from seqmesh.integrations.samples import Samples
from seqmesh.layouts import Layout, Span
from seqmesh.masks import causal

_ROWS_TO_SHARD = 2
"""Tokens a rank from which on a forward is sharded: fewer would save no time, and leave ranks without any."""


class SamePadding(NamedTuple):
    """Sequences of the batch with the same padding."""

    samples: Samples
    real: Runs | None
    """Their tokens that are no padding; None if all are."""


@dataclass(frozen=True, kw_only=True)
class ForwardPlan:
    """Which of a forward's tokens are whose. The same on every rank, but for `rank`."""

    rank: int
    past: int
    """Tokens before."""
    tokens: int
    """Of this forward."""
    before: list[Spans]
    """What every rank held."""
    kept: list[Spans]
    """Of the new tokens, what every rank keeps."""
    is_sharded: bool
    """Whether a rank computes what it keeps, and nothing else."""
    prompt_layout: Layout | None
    """Of a sharded prompt on an empty cache, over the ring of the mesh: it fixes who keeps what."""

    @staticmethod
    def of(mesh: SequenceMesh, before: list[Spans], past: int, tokens: int) -> "ForwardPlan":
        """The plan of the next tokens."""
        counts = [tokens_of(spans) for spans in before]
        is_sharded = mesh.size > 1 and tokens >= _ROWS_TO_SHARD * mesh.size
        layout = None
        if not is_sharded:
            kept = dealt(counts, past, tokens)
        elif past:
            kept = zigzagged(counts, past, tokens)
        else:
            layout = layouts.auto(causal(tokens), mesh.ring)
            kept = pieces(layout, mesh.ulysses)
        return ForwardPlan(
            rank=mesh.rank,
            past=past,
            tokens=tokens,
            before=before,
            kept=kept,
            is_sharded=is_sharded,
            prompt_layout=layout,
        )

    @property
    def total(self) -> int:
        """Tokens before and of this forward."""
        return self.past + self.tokens

    @cached_property
    def after(self) -> list[Spans]:
        """What every rank holds in this forward."""
        return [joined(before, new) for before, new in zip(self.before, self.kept, strict=True)]

    @property
    def own_after(self) -> Spans:
        """What this rank holds."""
        return self.after[self.rank]

    @cached_property
    def kept_here(self) -> slice:
        """Of the rows that a layer of this rank computes, those that it keeps."""
        if self.is_sharded:
            return slice(None)
        own = self.kept[self.rank]
        return slice(own[0].start - self.past, own[0].start - self.past + own[0].count) if own else slice(0)

    @cached_property
    def places(self) -> Tensor:
        """Which of the forward's tokens this rank computes, (n,), in its order."""
        if not self.is_sharded:
            return torch.arange(self.tokens)
        return tokens_in_order(self.kept[self.rank]) - self.past

    @cached_property
    def queries(self) -> Layout:
        """The forward's tokens as ranks compute them, counted from 0, all ranks on one ring."""
        return Layout(self.tokens, tuple(shifted(spans, self.past) for spans in self.kept))

    def keys(self, first: int) -> Layout:
        """The cache's tokens from `first` on, counted from there, all ranks on one ring."""
        ranks = tuple(shifted(since(spans, first), first) for spans in self.after)
        return Layout(self.total - first, ranks)


def shifted(spans: Spans, by: int) -> Spans:
    """The same tokens counted from `by`."""
    return tuple(Span(span.start - by, span.count) for span in spans)


@dataclass(kw_only=True, eq=False)
class CacheState:
    """What all layers of a cache share. The same on every rank, but for the meshes' own ranks."""

    mesh: SequenceMesh
    ring: SequenceMesh
    """Its ranks as one ring."""
    held: list[Spans] = field(default_factory=list)
    """Tokens of every rank, in storage order, with those that some layers have dropped."""
    seen: int = 0
    """Tokens so far."""
    plan: ForwardPlan | None = None
    """Of the forward that is under way."""

    def __post_init__(self) -> None:
        """Begin empty."""
        self.reset()

    def reset(self) -> None:
        """Hold nothing."""
        self.held, self.seen, self.plan = [()] * self.mesh.size, 0, None

    def finished(self) -> None:
        """The forward has ended: its tokens are held."""
        assert self.plan is not None
        self.held, self.seen, self.plan = self.plan.after, self.plan.total, None
