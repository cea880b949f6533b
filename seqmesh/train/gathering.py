"""What every rank has, brought to every rank. A run of one rank has no process group: it has all already."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def gather_objects(mine: Any, ranks: int) -> list[Any]:
    """What every rank has, by rank. A collective."""
    everyone: list[Any] = [mine]
    if ranks > 1:
        everyone = [None] * ranks
        dist.all_gather_object(everyone, mine)
    return everyone


def gather(number: float, ranks: int) -> list[float]:
    """One number of every rank, by rank. A collective."""
    return [found for (found,) in gather_numbers((number,), ranks)]


def gather_numbers(mine: Sequence[float], ranks: int) -> list[list[float]]:
    """As many numbers of every rank, by rank. A collective."""
    return [one.tolist() for one in gather_tensors(torch.tensor(mine, dtype=torch.float64), ranks)]


def gather_tensors(numbers: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """A tensor of every rank, all of one shape, by rank. A collective."""
    if ranks == 1:
        return [numbers]
    everyone = [torch.empty_like(numbers) for _ in range(ranks)]
    dist.all_gather(everyone, numbers)
    return everyone
