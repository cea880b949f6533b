"""Sequences dealt to data-parallel ranks: every one once, equal counts, and near the best there is."""

import random
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqmesh.planner.cost.dealing import in_turn
from seqmesh.train.evening import MicroBatch, deal

pytestmark = pytest.mark.fast

Dealt = list[list[MicroBatch]]
SHAPES = [(2, 1, 2), (2, 1, 3), (2, 2, 1), (2, 2, 2), (3, 1, 2), (2, 3, 1), (4, 2, 1), (1, 2, 3), (1, 1, 4)]
"""(ranks, micro-batches, sequences in each)"""


class Waits(NamedTuple):
    """What a step takes, in pairs."""

    columns: int
    """All ranks wait after every micro-batch."""
    rows: int
    """They wait at the end."""


def waits(dealt: Dealt, areas: Sequence[int]) -> Waits:
    loads = [[sum(areas[number] for number in batch) for batch in rank] for rank in dealt]
    return Waits(
        columns=sum(max(column) for column in zip(*loads, strict=True)), rows=max(sum(rank) for rank in loads)
    )


def groupings(numbers: frozenset[int], count: int, size: int) -> Iterator[list[tuple[int, ...]]]:
    """Every way to split numbers into `count` unordered groups of `size`."""
    if not count:
        yield []
        return
    first = min(numbers)
    for others in combinations(sorted(numbers - {first}), size - 1):
        group = (first, *others)
        for rest in groupings(numbers - set(group), count - 1, size):
            yield [group, *rest]


def best(areas: Sequence[int], ranks: int, micro_batches: int, size: int) -> Waits:
    """The least of each that any dealing has, by trying all."""
    everything = frozenset(range(len(areas)))
    columns = min(
        _columns(areas, ranks, batches) for batches in groupings(everything, ranks * micro_batches, size)
    )
    rows = min(
        max(sum(areas[number] for number in rank) for rank in split)
        for split in groupings(everything, ranks, micro_batches * size)
    )
    return Waits(columns=columns, rows=rows)


def _columns(areas: Sequence[int], ranks: int, batches: Sequence[tuple[int, ...]]) -> int:
    """Of given micro-batches, the least: those that are alike in one column (an exchange shows it)."""
    loads = sorted((sum(areas[number] for number in batch) for batch in batches), reverse=True)
    return sum(loads[::ranks])


def drawn(count: int, seed: int) -> list[int]:
    """Areas with a long tail."""
    rng = random.Random(seed)
    return [int(rng.lognormvariate(5, 1.2)) + 1 for _ in range(count)]


@pytest.mark.parametrize(("ranks", "micro_batches", "size"), SHAPES)
@pytest.mark.parametrize("seed", range(20))
def test_the_step_is_within_a_third_of_the_shortest_there_is(
    ranks: int, micro_batches: int, size: int, seed: int
) -> None:
    areas = drawn(ranks * micro_batches * size, seed)
    found = waits(deal(areas, ranks, micro_batches), areas)
    least = best(areas, ranks, micro_batches, size)
    assert least.columns <= found.columns <= least.columns * 4 / 3
    assert least.rows <= found.rows <= least.rows * 4 / 3
    if size == 1:
        assert found.columns == least.columns


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_sequence_is_dealt_once_and_counts_are_equal(
    ranks: int, micro_batches: int, size: int, rng: random.Random
) -> None:
    areas = [rng.randint(1, 9) for _ in range(ranks * micro_batches * size)]
    for dealt in (deal(areas, ranks, micro_batches), in_turn(len(areas), ranks, micro_batches)):
        assert [len(rank) for rank in dealt] == [micro_batches] * ranks
        numbers = [number for rank in dealt for batch in rank for number in batch]
        assert sorted(numbers) == list(range(len(areas)))
        assert {len(batch) for rank in dealt for batch in rank} == {size}
        assert all(list(batch) == sorted(batch) for rank in dealt for batch in rank)


def test_one_rank_with_one_micro_batch_has_the_sequences_in_their_order() -> None:
    assert deal([5, 9, 1], 1, 1) == [[(0, 1, 2)]]


def test_in_turn_is_rank_after_rank_in_the_order_of_the_sequences() -> None:
    assert in_turn(8, 2, 2) == [[(0, 1), (4, 5)], [(2, 3), (6, 7)]]


def test_the_example_at_the_top_of_the_file() -> None:
    areas = [9, 1, 2, 8, 1, 2, 1, 2]
    assert waits(in_turn(8, 2, 4), areas) == (21, 13)
    assert waits(deal(areas, 2, 4), areas) == (14, 13)
    loads = [[areas[number] for (number,) in rank] for rank in deal(areas, 2, 4)]
    assert loads == [[9, 2, 1, 1], [8, 2, 2, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_long_tails_wait_less_than_in_turn(seed: int) -> None:
    areas = drawn(64, seed)
    evened = waits(deal(areas, 8, 8), areas)
    turns = waits(in_turn(64, 8, 8), areas)
    assert evened.columns < 0.7 * turns.columns
    assert evened.rows <= turns.rows


def test_micro_batches_of_several_sequences_are_even() -> None:
    areas = [min(area, 1000) for area in drawn(512, seed=1)]  # as seq_len bounds them
    assert waits(deal(areas, 8, 4), areas).columns < 1.05 * sum(areas) / 8
    assert waits(in_turn(512, 8, 4), areas).columns > 1.15 * sum(areas) / 8
