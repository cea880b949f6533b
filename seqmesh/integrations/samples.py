"""Samples of a batch that have one mask: attention is called once for each mask, for its samples."""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


class Samples(NamedTuple):
    """Some samples of a batch."""

    numbers: tuple[int, ...] | None
    """None: all of them, however many there are."""

    def of(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Their part of what attention gets, with the batch dim in front."""
        if self.numbers is None:
            return q, k, v
        own = list(self.numbers)
        return q[own], k[own], v[own]

    def count(self, batch: int) -> int:
        """How many they are, of a batch of so many."""
        return batch if self.numbers is None else len(self.numbers)


EVERY = Samples(None)


def by_mask(masks: Iterable[Key]) -> dict[Key, Samples]:
    """The samples of each mask, from the masks of all samples; in the order in which masks first occur."""
    found: dict[Key, list[int]] = {}
    for number, mask in enumerate(masks):
        found.setdefault(mask, []).append(number)
    if len(found) == 1:
        return dict.fromkeys(found, EVERY)
    return {mask: Samples(tuple(numbers)) for mask, numbers in found.items()}


def together(groups: Sequence[Samples], parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One batch again of what was computed for each group of samples, whose samples are along `dim`."""
    if groups[0].numbers is None:
        return parts[0]
    numbers = [number for group in groups for number in group.numbers or ()]
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    return torch.cat(list(parts), dim)[(slice(None),) * dim + (order,)]
