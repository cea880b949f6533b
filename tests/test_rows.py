"""Where partial results go, by brute force: every row gets every part of its own, and is final or adds up."""

import random
from collections.abc import Iterator

import pytest
import torch

from seqmesh.engine.results import RowSums, RunningAttention
from seqmesh.engine.rows import RowPlan, row_plan

pytestmark = pytest.mark.fast


def random_parts(draw: random.Random, rows: int) -> list[tuple[tuple[int, int], ...]]:
    """A few parts of a few runs, that may overlap, also within a part."""
    parts = []
    for _ in range(draw.randrange(5)):
        starts = [draw.randrange(rows) for _ in range(draw.randrange(1, 4))]
        parts.append(tuple((start, draw.randrange(start + 1, rows + 1)) for start in starts))
    return parts


@pytest.mark.parametrize("seed", range(300))
def test_a_plan_says_of_every_row_which_part_comes_first_and_which_is_alone(seed: int) -> None:
    draw = random.Random(seed)
    rows = draw.randrange(1, 20)
    parts = random_parts(draw, rows)
    plan = row_plan(rows, parts)
    touches = [0] * rows
    for runs in parts:
        for start, stop in runs:
            for row in range(start, stop):
                touches[row] += 1
    places = {
        row: place for target, place in plan.shared for row, place in zip(*spread(target, place), strict=True)
    }
    assert sorted(places) == [row for row in range(rows) if touches[row] > 1]
    assert sorted(places.values()) == list(range(plan.shared_rows))
    assert [r for s in plan.untouched for r in range(s.start, s.stop)] == [
        row for row in range(rows) if not touches[row]
    ]
    seen: set[int] = set()
    for runs, puts in zip(parts, plan.puts, strict=True):
        packed = [row for start, stop in runs for row in range(start, stop)]
        arrived = []
        for put in puts:
            for source, row in zip(*spread(put.source, put.target), strict=True):
                arrived.append(source)
                assert packed[source] == row
                assert put.is_only == (touches[row] == 1)
                assert put.is_first == (row not in seen)
                seen.add(row)
            if not put.is_only:
                for row, place in zip(*spread(put.target, put.place), strict=True):
                    assert places[row] == place
        assert arrived == list(range(len(packed)))
    assert plan.is_one_part == (parts == [((0, rows),)])


def spread(*slices: slice) -> list[range]:
    """Slices of one length as ranges."""
    lengths = {s.stop - s.start for s in slices}
    assert len(lengths) == 1
    return [range(s.start, s.stop) for s in slices]


def test_parts_that_follow_one_another_are_few_puts() -> None:
    """Many documents that lie side by side are one copy."""
    plan = row_plan(100, [tuple((i, i + 1) for i in range(60))])
    assert [put.target for put in plan.puts[0]] == [slice(0, 60)]
    assert plan.untouched == (slice(60, 100),)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(40))
def test_sums_by_row_are_the_sums(seed: int, dtype: torch.dtype) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows = draw.randrange(1, 20)
    parts = random_parts(draw, rows)
    like = [torch.empty(rows, 2, 3, 4, dtype=dtype), torch.empty(rows, 2, 2, 5, dtype=dtype)]
    plan = row_plan(rows, parts)
    want = [torch.zeros(x.shape, dtype=torch.float64) for x in like]
    sums = RowSums(plan, like)
    for number, runs in enumerate(parts):
        length = sum(stop - start for start, stop in runs)
        # Whole numbers: their sums are exact in every dtype.
        came = [torch.randint(-9, 9, (2, x.shape[2], length, x.shape[3])).to(dtype) for x in like]
        flat = torch.cat([x.permute(2, 0, 1, 3).flatten(2) for x in came], -1)
        before = [x.clone() for x in (*came, flat)]
        if plan.is_one_part or draw.random() < 0.5:
            sums.add(number, *came)
        else:
            sums.add_flat(number, flat)
        assert all(torch.equal(a, b) for a, b in zip(before, (*came, flat), strict=True))
        for into, x in zip(want, came, strict=True):
            row = 0
            for start, stop in runs:
                into[start:stop] += x.permute(2, 0, 1, 3)[row : row + stop - start].double()
                row += stop - start
    if draw.random() < 0.5:
        found = sums.finish()
    else:
        flat = sums.finish_flat()
        assert flat.is_contiguous()
        found = [x.unflatten(-1, y.shape[2:]) for x, y in zip(flat.split([12, 10], -1), like, strict=True)]
    for got, expected in zip(found, want, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got.double(), expected)


def whole(rows: int) -> RowPlan:
    return row_plan(rows, [((0, rows),), ((0, rows),)])


def test_empty_rows_merge_without_nan_and_the_fuller_side_wins_exactly() -> None:
    q = torch.zeros(4, 1, 1, 2, dtype=torch.float64)
    first_lse = torch.tensor([-torch.inf, -torch.inf, 0.5, 1000.0], dtype=torch.float64)
    second_lse = torch.tensor([-torch.inf, 0.25, -torch.inf, -1000.0], dtype=torch.float64)
    running = RunningAttention(whole(4), q, 2)
    running.add(
        0,
        torch.full((1, 1, 4, 2), 3.0, dtype=torch.float64) * (first_lse > -99)[:, None],
        first_lse[None, None],
    )
    running.add(
        1,
        torch.full((1, 1, 4, 2), 5.0, dtype=torch.float64) * (second_lse > -9e9)[:, None],
        second_lse[None, None],
    )
    out, lse = running.finish(None)
    assert out[:, 0, 0, 0].tolist() == [0.0, 5.0, 3.0, 3.0]
    assert lse[0, 0].tolist() == [-torch.inf, 0.25, 0.5, 1000.0]


def test_a_single_part_of_every_row_is_taken_as_it_is() -> None:
    """Nothing is copied then: the sums hand over the tensors that they were given."""
    plan = row_plan(5, [((0, 5),)])
    assert plan.is_one_part
    assert not row_plan(5, [((0, 4),)]).is_one_part
    assert not row_plan(5, [((0, 5),), ((0, 1),)]).is_one_part
    assert not row_plan(5, [((0, 2), (3, 5), (2, 3))]).is_one_part
    gradient = torch.randn(2, 3, 5, 4)
    sums = RowSums(plan, [torch.empty(5, 2, 3, 4)])
    sums.add(0, gradient)
    assert sums.finish()[0].data_ptr() == gradient.data_ptr()


@pytest.fixture
def _uninitialised_is_nan() -> Iterator[None]:
    """Memory that nobody wrote is NaN while deterministic algorithms are asked for: a forgotten row shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_uninitialised_is_nan")
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(25))
def test_merged_rows_are_the_weighted_means_of_their_parts(
    seed: int, dtype: torch.dtype, with_sinks: bool
) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows, b, h, e = draw.randrange(1, 16), 2, 3, 4
    parts = random_parts(draw, rows)
    running = RunningAttention(row_plan(rows, parts), torch.empty(rows, b, h, 8, dtype=dtype), e)
    denominator = torch.zeros(b, h, rows, dtype=torch.float64)
    numerator = torch.zeros(b, h, rows, e, dtype=torch.float64)
    for number, runs in enumerate(parts):
        length = sum(stop - start for start, stop in runs)
        out = torch.randn(b, h, length, e, dtype=torch.float64).to(dtype)
        lse = torch.randn(b, h, length, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
        running.add(number, out, lse)
        packed = [row for start, stop in runs for row in range(start, stop)]
        for place, row in enumerate(packed):
            weight = lse[:, :, place].double().exp()
            denominator[:, :, row] += weight
            numerator[:, :, row] += weight.unsqueeze(-1) * out[:, :, place].double()
    sinks = torch.randn(h, dtype=torch.float64) if with_sinks else None
    total = denominator if sinks is None else denominator + sinks.exp()[None, :, None]
    got, got_lse = running.finish(sinks)
    assert got.dtype == dtype
    want = torch.where(denominator.unsqueeze(-1) > 0, numerator / total.unsqueeze(-1), 0.0)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got.permute(1, 2, 0, 3).double(), want, rtol=tolerance, atol=tolerance)
    lse_tolerance = max(1e-14, min(tolerance, 1e-6))
    torch.testing.assert_close(got_lse.double(), total.log(), rtol=lse_tolerance, atol=lse_tolerance)
