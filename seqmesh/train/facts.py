"""What every rank knows after a step and the others do not, gathered, so that all of them judge it alike.

Nobody sends weights: they stay equal because every rank sums the same gradients and takes the same step. The
sum of their bits (bits.py) is how a rank whose weights have drifted is found.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from seqmesh.parallel.shards import local_part
from seqmesh.train.costs import RankCosts
from seqmesh.train.gathering import gather_tensors


class RankFacts(NamedTuple):
    """One rank's part of a step."""

    loss_share: float
    """Cross entropies of this rank's tokens over the labels of all ranks: the shares add up to the loss."""
    grad_norm: float
    """Of the gradients summed over ranks, before clipping: the same on every rank."""
    bytes_scheduled: float
    """What attention and recurrent layers send to other ranks, as the rank's schedules say."""
    weight_sum: float
    """`weight_sum` after the step: finite if all weights are."""
    weight_bits: int
    """Sum of the bits of the weights after the step, a signed 64-bit number."""
    costs: RankCosts
    """Its time, and what it sent."""

    @property
    def bytes_sent(self) -> int:
        """Sent by layers that mix tokens, counted at the collectives.

        Schedules know nothing of weights and gradients.
        """
        return sum(self.costs.sent[axis] for axis in ("ulysses", "ring", "sequence"))


@torch.no_grad()
def weight_sum(parameters: Iterable[nn.Parameter]) -> float:
    """The sum of the weights that a rank holds: not a finite number if one of them is not."""
    sums = [local_part(parameter).sum(dtype=torch.float32) for parameter in parameters]
    return float(torch.stack(sums).sum()) if sums else 0.0


def gather_facts(mine: RankFacts, ranks: int) -> list[RankFacts]:
    """The facts of every rank, by rank. A collective."""
    if ranks == 1:
        return [mine]
    *numbers, bits, costs = mine
    # As integers of the same bits: no fp64 has 64 bits of a sum.
    fp64 = torch.tensor([*numbers, *costs.numbers()], dtype=torch.float64).view(torch.int64)
    found = []
    for one in gather_tensors(torch.cat([torch.tensor([bits]), fp64]), ranks):
        row = one[1:].view(torch.float64).tolist()
        of_costs = RankCosts.of(row[len(numbers) :])
        found.append(RankFacts._make([*row[: len(numbers)], int(one[0]), of_costs]))
    return found


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
    weights = sum(rank.weight_sum for rank in facts)
    if not all(math.isfinite(number) for number in (loss, norm, weights)):
        raise FloatingPointError(
            f"step {step} has loss {loss}, gradient norm {norm} and sum of weights {weights};"
            " lower train.lr or lengthen train.warmup"
        )
    first: dict[Hashable, int] = {}
    for rank, one in enumerate(facts):
        other = first.setdefault(holders[rank], rank)
        if one.weight_bits != facts[other].weight_bits:
            raise RuntimeError(
                f"rank {rank} diverged at step {step}: the bits of its weights add up to"
                f" {one.weight_bits:#x}, rank {other}'s to {facts[other].weight_bits:#x};"
                " run all ranks on equal machines and libraries, or report this as a bug"
            )
