"""Which data-parallel rank computes which sequences of a step: even work, so that none waits for another.

Packed sequences have equal tokens but not equal areas: one long document has many more (query, key) pairs
than short ones. Every rank has as many micro-batches of as many sequences, so tokens are equal whatever is
dealt, and FLOPs differ by area alone.

    areas of a step's 8 sequences, 2 ranks, 4 micro-batches of 1

    in turn    rank 0   9 2 1 1       a step waits for the larger of each column where weights are gathered
               rank 1   1 8 2 2       layer by layer (ZeRO-3), else for the larger row:     9+8+2+2 = 21, 13
    evened     rank 0   9 2 1 1
               rank 1   8 2 2 1                                                             9+2+2+1 = 14, 13

    1. micro-batches: the largest sequence first, to the one with the least area that has room.
    2. columns: micro-batches in the order of their areas, so that ranks compute equal ones at the same time.
    3. ranks: in each column, the largest to the rank that has least so far.

1 is the longest-processing-time rule for bins of equal counts: at most 4/3 of the optimum (Babel, Kellerer
and Kotov 1998). With single sequences 2 makes the least sum of columns' maxima that there is.

Which sequences a step has does not depend on any of it, so neither do its loss and its gradient.
"""

import heapq
from collections.abc import Sequence

MicroBatch = tuple[int, ...]
"""Numbers of a step's sequences, in their order."""


def deal(areas: Sequence[int], ranks: int, micro_batches: int) -> list[list[MicroBatch]]:
    """The sequences of every rank and micro-batch, the same wherever it is worked out.

    Args:
        areas: pairs of each sequence of a step: a multiple of ranks x micro_batches.
        ranks: data-parallel ranks.
        micro_batches: of each rank.

    Returns:
        [rank][micro-batch] -> numbers of sequences.
    """
    bins = _even_bins(areas, ranks * micro_batches)
    loads = [sum(areas[number] for number in one) for one in bins]
    by_load = sorted(range(len(bins)), key=lambda one: -loads[one])
    dealt: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for first in range(0, len(bins), ranks):
        least_first = sorted(range(ranks), key=totals.__getitem__)
        for rank, one in zip(least_first, by_load[first : first + ranks], strict=True):
            dealt[rank].append(bins[one])
            totals[rank] += loads[one]
    return dealt


def _even_bins(areas: Sequence[int], count: int) -> list[MicroBatch]:
    """`count` bins of equally many sequences and nearly equal areas."""
    size, rest = divmod(len(areas), count)
    assert rest == 0
    filled: list[list[int]] = [[] for _ in range(count)]
    with_room = [(0, one) for one in range(count)]  # a heap of (area, bin)
    for number in sorted(range(len(areas)), key=lambda number: -areas[number]):
        area, one = heapq.heappop(with_room)
        filled[one].append(number)
        if len(filled[one]) < size:
            heapq.heappush(with_room, (area + areas[number], one))
    return [tuple(sorted(numbers)) for numbers in filled]
