"""Demand: what a layout is balanced for, the masks of all layers that share it.

A model of full and of sliding-window layers has two masks and one layout: its tokens lie where they lie in
every layer. All ranks exchange rows in every layer, so they wait for the busiest rank of each:

                          rank 0   rank 1
    1 layer, full            6        2        waits 1 x 6
    3 layers, window         2        4        waits 3 x 4      18 in all, though each rank has 12 or 14

In self-attention a rank holds the keys of its own tokens. In cross-attention the keys have a layout of their
own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import NamedTuple

from seqmesh.layouts import load
from seqmesh.layouts.fixed import contiguous
from seqmesh.layouts.layout import Layout, Span
from seqmesh.masks import Band, Mask


class WeightedBand(NamedTuple):
    """A band, and how many layers have it."""

    band: Band
    weight: int


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Masks of one shape, each with the number of layers that have it, and where the keys lie."""

    masks: tuple[Mask, ...]
    weights: tuple[int, ...]
    """Layers of each mask, or any whole numbers in that proportion."""
    kv_layout: Layout | None
    """None in self-attention: keys lie where the queries do."""

    @staticmethod
    def of(
        masks: Mask | Sequence[Mask], ring: int, weights: Sequence[int] | None, kv_layout: Layout | None
    ) -> "Demand":
        """The demand of one mask, or of several with weights.

        Keys of another number than the queries are laid out contiguously, if nothing else is said.

        Raises:
            ValueError: no mask, masks of different shapes, weights that are not one whole number >= 1 for
                each mask, or a layout of the keys of another length or ring degree.
        """
        given = (masks,) if isinstance(masks, Mask) else tuple(masks)
        shapes = {(mask.q_len, mask.k_len) for mask in given}
        if len(shapes) != 1:
            raise ValueError(
                f"masks of (queries, keys) {sorted(shapes)}: one layout is for masks of one shape;"
                " pass one mask, or several of equal lengths"
            )
        ((q_len, k_len),) = shapes
        if kv_layout is None and q_len != k_len:
            kv_layout = contiguous(k_len, ring)
        if kv_layout is not None and (kv_layout.s, kv_layout.ring) != (k_len, ring):
            raise ValueError(
                f"kv_layout holds {kv_layout.s} keys over ring={kv_layout.ring}, but the mask has {k_len} and"
                f" ring={ring}; build it for those"
            )
        return Demand(masks=given, weights=_weights(weights, len(given)), kv_layout=kv_layout)

    @property
    def q_len(self) -> int:
        """Tokens that are laid out: the queries of every mask."""
        return self.masks[0].q_len

    @cached_property
    def area(self) -> int:
        """Pairs of all layers."""
        return sum(weight * mask.area for mask, weight in self._layers())

    @property
    def heaviest(self) -> Mask:
        """The mask whose layers have the most pairs."""
        return max(self._layers(), key=lambda layer: layer[1] * layer[0].area)[0]

    def bands(self) -> Iterator[WeightedBand]:
        """Every band of every mask."""
        for mask, weight in self._layers():
            for band in mask.bands:
                yield WeightedBand(band, weight)

    def apart(self) -> Iterator["Demand"]:
        """The demand of each mask by itself."""
        for mask in self.masks:
            yield Demand(masks=(mask,), weights=(1,), kv_layout=self.kv_layout)

    def areas_of(self, spans: Sequence[Span]) -> list[int]:
        """Pairs that the holder of some queries computes by each mask, in all its layers."""
        return [weight * load.area(mask, spans) for mask, weight in self._layers()]

    def rows_of(self, layout: Layout, rank: int) -> list[int]:
        """K/V rows that a rank receives by each mask, in all its layers."""
        spans = layout.ranks[rank]
        held = spans if self.kv_layout is None else self.kv_layout.ranks[rank]
        return [weight * load.rows(mask, spans, held) for mask, weight in self._layers()]

    def _layers(self) -> Iterator[tuple[Mask, int]]:
        return zip(self.masks, self.weights, strict=True)


def _weights(weights: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """One weight for each of `count` masks.

    Whole, so that areas add up exactly: a rounding would look like a bend in the area of the rows.
    """
    if weights is None:
        return (1,) * count
    try:
        whole = tuple(map(index, weights))
    except TypeError:
        whole = ()
    if len(whole) != count or min(whole, default=1) < 1:
        raise ValueError(
            f"weights={weights!r} of {count} masks; pass one whole number >= 1 for each, such as its layers"
        )
    return whole
