"""balanced and auto layouts: against brute-forced dense masks on small cases.

And the load of long-tailed documents at 1M tokens.
"""

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmesh import layouts, masks
from seqmesh.layouts import Layout, load
from seqmesh.layouts.demand import Demand
from seqmesh.layouts.segments import nearest, segments
from seqmesh.masks import Band, Mask

pytestmark = pytest.mark.fast


SEEDS = range(4)
MEGA = 2**20


def log_normal_lengths(mu: float, sigma: float, s: int, seed: int) -> list[int]:
    rng, lengths = random.Random(seed), []
    while s:
        lengths.append(min(s, max(16, int(rng.lognormvariate(mu, sigma)))))
        s -= lengths[-1]
    return lengths


def brute_load(mask: Mask, layout: Layout) -> tuple[list[int], list[int]]:
    dense, areas, rows = mask.dense(), [], []
    for rank in range(layout.ring):
        held = np.array(list(layout.positions(rank)), dtype=int)
        seen = dense[held].any(0)
        areas.append(int(dense[held].sum()))
        rows.append(int(seen.sum() - seen[held].sum()))
    return areas, rows


def busiest(mask: Mask, layout: Layout) -> tuple[float, int]:
    """The busiest rank's area in parts of the mean, and the most rows that a rank receives."""
    return max(load.areas(mask, layout)) * layout.ring / mask.area, max(load.rows_received(mask, layout))


@st.composite
def any_mask(draw: st.DrawFn) -> Mask:
    """Up to four disjoint bands anywhere; bands that would overlap an earlier one are left out."""
    s = draw(st.integers(0, 40))
    at, bound = st.integers(0, s), st.none() | st.integers(-s, s)
    mask = Mask(s, s, ())
    for _ in range(draw(st.integers(0, 4))):
        q, k = sorted((draw(at), draw(at))), sorted((draw(at), draw(at)))
        try:
            mask = Mask(s, s, (*mask.bands, Band(*q, *k, draw(bound), draw(bound))))
        except ValueError:
            continue
    return mask


MASKS = {
    "causal": masks.causal(960),
    "causal of odd length": masks.causal(997),
    "full": masks.full(512),
    "window": masks.sliding_window(1024, 64),
    "window with sinks": masks.sliding_window(1024, 64, sink_tokens=4),
    "prefix-LM": masks.prefix_lm(1000, 300),
    "documents": masks.documents([400, 16, 16, 130, 60, 17, 250, 35, 100]),
    "full documents": masks.documents([400, 16, 16, 130, 60, 17, 250, 35, 100], causal=False),
    "documents and window": masks.documents([400, 16, 130, 60, 17, 250, 135])
    & masks.sliding_window(1008, 50),
    "one long document": masks.documents([800] + [8] * 100),
    "two long documents": masks.documents([900, 100]),
    "tiny documents": masks.chunked(1000, 7),
    "anti-causal": Mask(600, 600, (Band(0, 600, 0, 600, None, 0),)),
    "tokens without a pair": Mask(600, 600, (Band(100, 200, 100, 200, 0), Band(300, 500, 250, 400))),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@settings(deadline=None, max_examples=300)
@given(any_mask(), st.integers(1, 50), st.sampled_from([0.0, 1.0, 1000.0]))
def test_any_mask_gets_near_equal_shards_and_the_same_ones_again(
    mask: Mask, ring: int, pairs_per_row: float
) -> None:
    for choose in (layouts.balanced, layouts.auto):
        layout = choose(mask, ring, pairs_per_row=pairs_per_row)
        assert max(layout.counts) - min(layout.counts) <= 1
        assert sum(layout.counts) == mask.q_len
        again = choose(Mask(mask.q_len, mask.k_len, mask.bands[::-1]), ring, pairs_per_row=pairs_per_row)
        assert (layout, layout.name, layout.reason) == (again, again.name, again.reason)


@settings(deadline=None)
@given(any_mask(), st.integers(1, 8))
def test_load_matches_the_dense_mask(mask: Mask, ring: int) -> None:
    for layout in (
        layouts.contiguous(mask.q_len, ring),
        layouts.striped(mask.q_len, ring),
        layouts.balanced(mask, ring),
    ):
        assert (load.areas(mask, layout), load.rows_received(mask, layout)) == brute_load(mask, layout)


@settings(deadline=None)
@given(any_mask())
def test_segments_cover_the_tokens_know_their_area_and_never_turn(mask: Mask) -> None:
    area_of_rows, at = mask.dense().sum(1), 0
    for segment in segments(Demand.of(mask, 1, None, None)):
        rows = [segment.area_between(place, place + 1) for place in range(segment.tokens)]
        assert rows == list(area_of_rows[at : at + segment.tokens])
        assert segment.start == at
        assert segment.area == sum(rows)
        assert rows in (sorted(rows), sorted(rows, reverse=True))
        at += segment.tokens
    assert at == mask.q_len


@given(st.lists(st.integers(0, 100), min_size=1), st.booleans(), st.floats(-5, 105))
def test_nearest_finds_the_closest_value_of_a_monotone_function(
    values: list[int], falling: bool, target: float
) -> None:
    values.sort(reverse=falling)
    found = values[nearest(values.__getitem__, 0, len(values) - 1, target)]
    assert abs(found - target) == min(abs(value - target) for value in values)


@every_mask
@pytest.mark.parametrize("ring", [2, 3, 4, 8])
@pytest.mark.parametrize("pairs_per_row", [0.0, 10.0, 1000.0])
def test_balanced_costs_no_more_than_contiguous_or_zigzag(
    mask: Mask, ring: int, pairs_per_row: float
) -> None:
    def cost(layout: Layout) -> float:
        return max(area + pairs_per_row * rows for area, rows in zip(*brute_load(mask, layout), strict=True))

    fixed = (layouts.contiguous(mask.q_len, ring), layouts.zigzag(mask.q_len, ring))
    cheapest = min(map(cost, fixed))
    # Contiguous is taken at once within half a percent of the mean area and one percent of the rows of
    # perfection.
    enough = 1.005 * mask.area / ring + pairs_per_row * 0.01 * mask.q_len / ring
    assert cost(layouts.balanced(mask, ring, pairs_per_row=pairs_per_row)) <= max(cheapest, enough)


@every_mask
@pytest.mark.parametrize("ring", [2, 3, 4, 8])
def test_area_is_equal_when_rows_are_free(mask: Mask, ring: int) -> None:
    areas, _ = brute_load(mask, layouts.balanced(mask, ring, pairs_per_row=0.0))
    # Half a percent is traded for whole documents, and a rank cannot hold part of a row.
    assert max(areas) <= 1.015 * mask.area / ring + mask.dense().sum(1).max()


@pytest.mark.parametrize("ring", [4, 8])
@pytest.mark.parametrize("s", [65536, 65536 - 37])
def test_causal_comes_out_as_good_as_zigzag(s: int, ring: int) -> None:
    mask, zigzag = masks.causal(s), layouts.zigzag(s, ring)
    balanced = layouts.balanced(mask, ring)
    assert max(load.areas(mask, balanced)) <= max(load.areas(mask, zigzag))
    assert max(load.rows_received(mask, balanced)) <= max(load.rows_received(mask, zigzag))


@pytest.mark.parametrize("mu_sigma", [(7, 1.3), (8, 1.5)])
@pytest.mark.parametrize("seed", SEEDS)
def test_long_tailed_documents_are_balanced_and_receive_no_more_than_zigzag(
    mu_sigma: tuple[float, float], seed: int
) -> None:
    mask = masks.documents(log_normal_lengths(*mu_sigma, MEGA, seed))
    balanced, zigzag = layouts.balanced(mask, 64), layouts.zigzag(MEGA, 64)
    area, rows = busiest(mask, balanced)
    zigzag_area, zigzag_rows = busiest(mask, zigzag)
    assert area <= 1.01
    assert zigzag_area > 2
    assert rows <= zigzag_rows
    assert set(balanced.counts) == {MEGA // 64}


@pytest.mark.parametrize("ring", [4, 8])
@pytest.mark.parametrize(
    "kind", [masks.documents, lambda d: masks.documents(d, causal=False)], ids=["causal", "full"]
)
def test_documents_of_64k_tokens_are_balanced(kind: object, ring: int) -> None:
    for seed in SEEDS:
        mask = kind(log_normal_lengths(7, 1.3, 65536, seed))  # type: ignore[operator]
        assert busiest(mask, layouts.balanced(mask, ring))[0] <= 1.05


def test_whole_documents_are_not_cut_where_they_fit() -> None:
    mask = masks.documents([64] * 64)
    assert max(load.rows_received(mask, layouts.balanced(mask, 8))) == 0


def test_the_longest_document_shares_its_head_with_the_ranks_of_its_tail() -> None:
    """The rank of the last row receives the document less what it holds: it must hold more than its share."""
    mask = masks.documents([32768] + [64] * 512)
    layout = layouts.balanced(mask, 8)
    area, rows = busiest(mask, layout)
    assert area <= 1.01
    assert rows <= max(load.rows_received(mask, layouts.zigzag(65536, 8)))
    last = next(
        spans
        for spans in layout.ranks
        if any(span.start <= 32767 < span.start + span.count for span in spans)
    )
    assert last[0].start == 0


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (masks.causal(65536), "zigzag"),
        (masks.full(65536), "contiguous"),
        (masks.sliding_window(65536, 4096), "contiguous"),
        (masks.documents([64] * 1024), "contiguous"),
        (masks.prefix_lm(65536, 16384), "balanced"),
        (masks.documents(log_normal_lengths(7, 1.3, 65536, 0)), "balanced"),
        (Mask(64, 64, ()), "contiguous"),
        (masks.causal(0), "contiguous"),
    ],
    ids=["causal", "full", "window", "tiny documents", "prefix-LM", "documents", "no pair", "no token"],
)
def test_auto_takes_the_simplest_layout_that_is_as_good(mask: Mask, name: str) -> None:
    assert layouts.auto(mask, 8).name == name


def test_auto_says_what_it_compared() -> None:
    mask = masks.documents([32768] + [64] * 512)
    assert layouts.auto(mask, 8).reason == (
        "zigzag would leave the busiest rank 1.87x the mean area and 28672 rows received;"
        " balanced 1.00x and at most 26115 rows received"
    )
    assert "zigzag is as good, 1.00x" in layouts.auto(masks.causal(4096), 4).reason


def test_more_ranks_than_tokens_leaves_ranks_empty() -> None:
    assert layouts.balanced(masks.documents([2, 3]), 9).counts == (1,) * 5 + (0,) * 4


@pytest.mark.parametrize("name", ["balanced", "auto"])
def test_keys_are_not_laid_out_by_a_name_that_balances_queries(name: str) -> None:
    assert layouts.named(name, masks.cross(4, 6), 4, 2).s == 4
    with pytest.raises(ValueError, match=r"of 6 tokens lays out queries, of which the mask has 4; lay out"):
        layouts.named(name, masks.cross(4, 6), 6, 2)


@pytest.mark.parametrize("pairs_per_row", [-1.0, float("inf"), float("nan")])
def test_a_price_that_is_no_price_is_refused(pairs_per_row: float) -> None:
    with pytest.raises(ValueError, match="finite pairs_per_row >= 0"):
        layouts.balanced(masks.causal(8), 2, pairs_per_row=pairs_per_row)


def test_a_layout_of_a_million_tokens_is_cheap() -> None:
    """It is made once per batch: about 20 ms here; the bound leaves room for a slow and busy machine."""
    mask = masks.documents([1049] * 900 + [50] * 1000 + [MEGA - 900 * 1049 - 50000])
    seconds = []
    for _ in range(3):
        start = time.process_time()
        layouts.balanced(mask, 64)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.2
