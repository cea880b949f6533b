"""A schedule as one tensor of whole numbers: how torch.compile carries it through a graph.

    mask, layouts, place on the mesh  -- encode -->  (m,) int64  -- through the graph, decode -->  the same

Dynamo turns the objects that a function closes over into guards, and would compile again for every batch
whose documents differ. A tensor is an input of the graph, whose contents and length may change freely. Names
of process groups and sizes that shapes depend on travel beside it: see compiled.py.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seqmesh.layouts import Layout, Span
from seqmesh.masks import Band, Mask
from seqmesh.schedule import Stages

_OPEN = -(1 << 62)
"""Stands for an open bound of a band."""
_AUTO = -1
"""Stands for stages="auto"; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class EncodedFields:
    """What a schedule is built of, but for its process groups."""

    mask: Mask
    ulysses: int
    ulysses_rank: int
    ring_rank: int
    stages: Stages
    """As given to Schedule.build."""
    layout: Layout
    kv_layout: Layout
    """The same object as `layout` in self-attention."""


def encode(fields: EncodedFields) -> Tensor:
    """The fields as an (m,) int64 tensor on the CPU."""
    mask = fields.mask
    numbers = [mask.q_len, mask.k_len, len(mask.bands)]
    numbers += [fields.ulysses, fields.ulysses_rank, fields.ring_rank, _of_stages(fields.stages)]
    for band in mask.bands:
        numbers += [_OPEN if number is None else number for number in band]
    numbers += _of_layout(fields.layout)
    if fields.kv_layout is not fields.layout:
        numbers += _of_layout(fields.kv_layout)
    return torch.tensor(numbers, dtype=torch.int64)


def _of_stages(stages: Stages) -> int:
    return _AUTO if stages == "auto" else stages or 0


def _stages(number: int) -> Stages:
    return "auto" if number == _AUTO else number or None


def _of_layout(layout: Layout) -> Iterator[int]:
    """Ring degree; then of every rank the number of its spans, and the spans."""
    yield layout.ring
    for spans in layout.ranks:
        yield len(spans)
        for span in spans:
            yield from span


def decode(encoded: bytes) -> EncodedFields:
    """The fields whose tensor has these bytes."""
    numbers = iter(memoryview(encoded).cast("q"))
    q_len, k_len, band_count = itertools.islice(numbers, 3)
    ulysses, ulysses_rank, ring_rank, stages = itertools.islice(numbers, 4)
    bands = tuple(_band(numbers) for _ in range(band_count))
    layout = _layout(q_len, next(numbers), numbers)
    kv_layout = layout
    for ring in numbers:  # nothing is left in self-attention
        kv_layout = _layout(k_len, ring, numbers)
    return EncodedFields(
        mask=Mask(q_len, k_len, bands),
        ulysses=ulysses,
        ulysses_rank=ulysses_rank,
        ring_rank=ring_rank,
        stages=_stages(stages),
        layout=layout,
        kv_layout=kv_layout,
    )


def _band(numbers: Iterator[int]) -> Band:
    q_start, q_stop, k_start, k_stop, lo, hi = itertools.islice(numbers, 6)
    return Band(q_start, q_stop, k_start, k_stop, None if lo == _OPEN else lo, None if hi == _OPEN else hi)


def _layout(s: int, ring: int, numbers: Iterator[int]) -> Layout:
    ranks = []
    for _ in range(ring):
        count = next(numbers)
        ranks.append(tuple(Span(*itertools.islice(numbers, 3)) for _ in range(count)))
    return Layout(s, tuple(ranks))
