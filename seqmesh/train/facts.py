"""What every rank knows after a step and the others do not, gathered, so that all of them judge it alike.

Nobody sends weights: they stay equal because every rank sums the same gradients and takes the same step. The
checksum is how a rank whose weights have drifted is found.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from seqmesh.parallel.shards import local_part


class RankFacts(NamedTuple):
    """One rank's part of a step, as numbers that one fp64 tensor carries: whole ones exactly up to 2^53."""

    loss_share: float
    """Cross entropies of this rank's tokens over the labels of all ranks: the shares add up to the loss."""
    grad_norm: float
    """Of the gradients summed over ranks, before clipping: the same on every rank."""
    bytes_sent: float
    """Sent by attention to other ranks, counted at the collectives."""
    bytes_scheduled: float
    """What the rank's schedule says."""
    weight_checksum: float
    """`weight_checksum` after the step."""


@torch.no_grad()
def weight_checksum(parameters: Iterable[nn.Parameter]) -> float:
    """Sum over the weights w that a rank holds of w + w^2, in fp64: a change in the last bit of one shows."""
    total = torch.zeros((), dtype=torch.float64)
    for parameter in parameters:
        weight = local_part(parameter).double()
        total = total + (weight.sum() + weight.square().sum())
    return float(total)


def gather_facts(mine: RankFacts, ranks: int) -> list[RankFacts]:
    """The facts of every rank, by rank. A collective."""
    return [RankFacts._make(numbers) for numbers in gather_numbers(mine, ranks)]


def gather(number: float, ranks: int) -> list[float]:
    """One number of every rank, by rank. A collective."""
    return [found for (found,) in gather_numbers((number,), ranks)]


def gather_numbers(mine: Sequence[float], ranks: int) -> list[list[float]]:
    """As many numbers of every rank, by rank. A collective."""
    numbers = torch.tensor(mine, dtype=torch.float64)
    if ranks == 1:
        return [numbers.tolist()]
    everyone = [torch.empty_like(numbers) for _ in range(ranks)]
    dist.all_gather(everyone, numbers)
    return [one.tolist() for one in everyone]


def check_agreement(facts: Sequence[RankFacts], step: int, holders: Sequence[Hashable]) -> None:
    """Nobody sends weights, so ranks that hold the same ones must find them equal, or not go on.

    Only the weights can tell: gradients, and their norm, are summed to the same bits everywhere, whatever
    weights made them.

    Args:
        facts: of every rank.
        step: from 1.
        holders: what each rank holds; ranks with equal entries hold the same weights.

    Raises:
        FloatingPointError: loss, gradient norm or weights are not finite.
        RuntimeError: a rank whose weights differ from those of another that holds the same.
    """
    loss = sum(rank.loss_share for rank in facts)
    norm = facts[0].grad_norm
    checksums = [rank.weight_checksum for rank in facts]
    if not all(math.isfinite(number) for number in (loss, norm, *checksums)):
        raise FloatingPointError(
            f"step {step} has loss {loss}, gradient norm {norm} and weight checksum {checksums[0]};"
            " lower train.lr or lengthen train.warmup"
        )
    first: dict[Hashable, int] = {}
    for rank, checksum in enumerate(checksums):
        other = first.setdefault(holders[rank], rank)
        if checksum != checksums[other]:
            raise RuntimeError(
                f"rank {rank} diverged at step {step}: its weights have checksum {checksum!r},"
                f" rank {other}'s have {checksums[other]!r};"
                " run all ranks on equal machines and libraries, or report this as a bug"
            )
