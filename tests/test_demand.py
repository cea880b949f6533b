"""Layouts for several masks, and for queries whose keys lie elsewhere: against dense masks, and at length."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, assemble, attend, compare, dense
from ranks import Ranks
from test_balance import MEGA, any_mask, log_normal_lengths
from wrong_input import refused

from seqmesh import layouts, masks
from seqmesh.layouts import Layout, load
from seqmesh.layouts.demand import Demand
from seqmesh.layouts.segments import segments
from seqmesh.masks import Band, Mask
from seqmesh.schedule import ring_schedule

pytestmark = pytest.mark.fast


@st.composite
def several(draw: st.DrawFn) -> tuple[list[Mask], list[int]]:
    """Up to three masks of one shape, with weights."""
    first = draw(any_mask())
    s = first.q_len
    others = [
        masks.causal(s),
        masks.full(s),
        masks.sliding_window(s, draw(st.integers(1, 9))),
        masks.chunked(s, draw(st.integers(1, 9))),
        first & masks.sliding_window(s, 3),
    ]
    found = [first, *draw(st.lists(st.sampled_from(others), max_size=2))]
    return found, draw(st.lists(st.integers(1, 5), min_size=len(found), max_size=len(found)))


@st.composite
def rectangular(draw: st.DrawFn) -> Mask:
    """Up to four disjoint bands between 0 to 30 queries and 0 to 30 keys."""
    q_len, k_len = draw(st.integers(0, 30)), draw(st.integers(0, 30))
    bound = st.none() | st.integers(-30, 30)
    mask = Mask(q_len, k_len, ())
    for _ in range(draw(st.integers(0, 4))):
        q = sorted(draw(st.tuples(st.integers(0, q_len), st.integers(0, q_len))))
        k = sorted(draw(st.tuples(st.integers(0, k_len), st.integers(0, k_len))))
        try:
            mask = Mask(q_len, k_len, (*mask.bands, Band(*q, *k, draw(bound), draw(bound))))
        except ValueError:
            continue
    return mask


def brute_cost(given: list[Mask], weights: list[int], layout: Layout, keys: Layout, price: float) -> float:
    """Of each layer the busiest rank's pairs + price x rows received, all layers added up."""
    total = 0.0
    for mask, weight in zip(given, weights, strict=True):
        dense = mask.dense()
        costs = []
        for rank in range(layout.ring):
            seen = dense[np.array(list(layout.positions(rank)), dtype=int)]
            held = np.array(list(keys.positions(rank)), dtype=int)
            rows = seen.any(0).sum() - seen[:, held].any(0).sum()
            costs.append(seen.sum() + price * rows)
        total += weight * max(costs)
    return total


@settings(deadline=None, max_examples=200)
@given(several(), st.integers(1, 9), st.sampled_from([0.0, 1.0, 1000.0]))
def test_several_masks_get_equal_shards_that_cost_no_more_than_contiguous_or_zigzag(
    drawn: tuple[list[Mask], list[int]], ring: int, price: float
) -> None:
    given_masks, weights = drawn
    s = given_masks[0].q_len
    layout = layouts.balanced(given_masks, ring, weights=weights, pairs_per_row=price)
    assert max(layout.counts) - min(layout.counts) <= 1
    assert sum(layout.counts) == s
    area = sum(weight * mask.area for mask, weight in zip(given_masks, weights, strict=True))
    # Contiguous is taken at once within half a percent of the mean area and one percent of all rows.
    enough = 1.005 * area / ring + price * 0.01 * sum(weights) * s / ring
    fixed = [make(s, ring) for make in (layouts.contiguous, layouts.zigzag)]
    cheapest = min(brute_cost(given_masks, weights, one, one, price) for one in fixed)
    cost = brute_cost(given_masks, weights, layout, layout, price)
    assert cost <= max(cheapest, enough) * (1 + 1e-12)
    auto = layouts.auto(given_masks, ring, weights=weights, pairs_per_row=price)
    assert brute_cost(given_masks, weights, auto, auto, price) <= 1.02 * cost * (1 + 1e-12)


@settings(deadline=None)
@given(several())
def test_segments_of_several_masks_know_their_summed_area_and_never_turn(
    drawn: tuple[list[Mask], list[int]],
) -> None:
    given_masks, weights = drawn
    summed = sum(weight * mask.dense().sum(1) for mask, weight in zip(given_masks, weights, strict=True))
    demand = Demand.of(given_masks, 1, weights, None)
    assert demand.area == np.sum(summed)
    at = 0
    for segment in segments(demand):
        rows = [segment.area_between(place, place + 1) for place in range(segment.tokens)]
        assert rows == list(summed[at : at + segment.tokens])
        assert segment.area == sum(rows)
        assert rows in (sorted(rows), sorted(rows, reverse=True))
        at += segment.tokens
    assert at == demand.q_len


def test_equal_masks_are_laid_out_as_one() -> None:
    mask = masks.documents([400, 16, 16, 130, 60, 17, 250, 35, 100])
    assert layouts.balanced([mask, mask], 4, weights=[2, 3]) == layouts.balanced(mask, 4)
    assert layouts.balanced([mask], 4, weights=[7]) == layouts.balanced(mask, 4)


def test_the_heaviest_mask_is_the_one_whose_layers_have_most_pairs() -> None:
    causal, window = masks.causal(100), masks.sliding_window(100, 2)  # 5,050 and 199 pairs
    assert Demand.of([window, causal], 2, None, None).weights == (1, 1)
    for weights, heaviest in (([1, 1], causal), ([25, 1], causal), ([26, 1], window)):
        assert Demand.of([window, causal], 2, weights, None).heaviest == heaviest


FULL = masks.causal(MEGA)
SECOND = {
    "window": masks.sliding_window(MEGA, 4096),
    "chunked": masks.chunked(MEGA, 8192),
}


@pytest.mark.parametrize("weights", [(1, 3), (1, 5)])
@pytest.mark.parametrize("name", SECOND)
def test_full_and_local_layers_are_balanced_together_and_each_by_itself(
    name: str, weights: tuple[int, int]
) -> None:
    both = [FULL, SECOND[name]]
    layout = layouts.balanced(both, 64, weights=weights)
    areas = np.array([load.areas(mask, layout) for mask in both])
    summed = np.array(weights) @ areas
    assert summed.max() / summed.mean() <= 1.005
    assert (areas.max(1) / areas.mean(1)).max() <= 1.01


def test_what_counts_is_the_busiest_rank_of_every_layer_not_of_the_sum() -> None:
    """Equal sums are possible here, and cost a tenth more: the layers' busiest ranks are different ones."""
    documents = masks.documents(log_normal_lengths(8, 1.5, MEGA, 0))
    both = [documents, documents & masks.sliding_window(MEGA, 4096)]
    layout = layouts.balanced(both, 64, weights=[1, 5])

    def waited_for(layout: Layout) -> float:
        return sum(weight * max(load.areas(mask, layout)) for mask, weight in zip(both, (1, 5), strict=True))

    assert layout == layouts.balanced(documents, 64)
    assert "layer by layer" in layout.reason
    assert waited_for(layout) < 0.6 * waited_for(layouts.zigzag(MEGA, 64))


@settings(deadline=None, max_examples=200)
@given(rectangular(), st.integers(1, 6), st.sampled_from([0.0, 1.0, 1000.0]))
def test_queries_are_balanced_by_the_area_of_their_keys(mask: Mask, ring: int, price: float) -> None:
    keys = layouts.contiguous(mask.k_len, ring)
    layout = layouts.balanced(mask, ring, kv_layout=keys, pairs_per_row=price)
    assert sum(layout.counts) == layout.s == mask.q_len
    assert max(layout.counts) - min(layout.counts) <= 1
    fixed = [make(mask.q_len, ring) for make in (layouts.contiguous, layouts.zigzag)]
    cheapest = min(brute_cost([mask], [1], one, keys, price) for one in fixed)
    enough = 1.005 * mask.area / ring + price * 0.01 * mask.q_len / ring
    assert brute_cost([mask], [1], layout, keys, price) <= max(cheapest, enough) * (1 + 1e-12)
    if mask.q_len != mask.k_len:
        assert layouts.balanced(mask, ring, pairs_per_row=price) == layout


@settings(deadline=None)
@given(rectangular(), st.integers(1, 6))
def test_rows_received_of_keys_elsewhere_are_those_of_the_schedule(mask: Mask, ring: int) -> None:
    layout, keys = layouts.zigzag(mask.q_len, ring), layouts.zigzag(mask.k_len, ring)
    schedules = [ring_schedule(mask, layout, keys, rank) for rank in range(ring)]
    assert load.rows_received(mask, layout, keys) == [one.rows_received for one in schedules]
    demand = Demand.of(mask, ring, [2], keys)
    assert [demand.rows_of(layout, rank) for rank in range(ring)] == [
        [2 * s.rows_received] for s in schedules
    ]


def test_long_tailed_pairs_of_documents_are_balanced_for_cross_attention() -> None:
    """Each document's queries see all keys of another document, of lengths drawn apart."""
    lengths = zip(log_normal_lengths(7, 1.3, 2**18, 0), log_normal_lengths(7, 1.3, 2**18, 1), strict=False)
    mask = masks.rows(masks.cross(q, k) for q, k in lengths)
    assert mask.q_len != mask.k_len
    areas = {}
    for layout in (
        layouts.balanced(mask, 16),
        layouts.contiguous(mask.q_len, 16),
        layouts.zigzag(mask.q_len, 16),
    ):
        found = load.areas(mask, layout)
        areas[layout.name] = max(found) * 16 / sum(found)
    assert areas["balanced"] <= 1.01
    assert min(areas["contiguous"], areas["zigzag"]) > 1.5


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 4), (2, 2)])
def test_attention_of_balanced_queries_to_contiguous_keys_is_exact(
    ranks: Ranks, ulysses: int, ring: int
) -> None:
    mask = masks.rows([masks.cross(9, 2), masks.cross(3, 20), masks.cross(1, 1), masks.cross(8, 11)])
    layout = layouts.balanced(mask, ring)
    assert layout.name == "balanced"
    case = Case(mask=mask, ulysses=ulysses, ring=ring, layout=layout)  # keys contiguous
    compare(case, assemble(case, [parts[0] for parts in ranks.run(4, attend, [case])]), dense(case))


@pytest.mark.parametrize(
    ("what", "build"),
    [
        ("masks of (queries, keys) [(4, 4), (5, 5)]", lambda: balanced([masks.causal(4), masks.causal(5)])),
        ("masks of (queries, keys) []", lambda: balanced([])),
        ("weights=[1] of 2 masks", lambda: balanced([masks.causal(4)] * 2, weights=[1])),
        ("weights=[1, 0] of 2 masks", lambda: balanced([masks.causal(4)] * 2, weights=[1, 0])),
        ("weights=[0.5] of 1 masks", lambda: balanced(masks.causal(4), weights=[0.5])),
        (
            "kv_layout holds 5 keys over ring=2, but the mask has 4",
            lambda: balanced(masks.causal(4), kv_layout=layouts.contiguous(5, 2)),
        ),
        (
            "kv_layout holds 4 keys over ring=3, but the mask has 4 and ring=2",
            lambda: balanced(masks.causal(4), kv_layout=layouts.contiguous(4, 3)),
        ),
    ],
)
def test_what_is_no_demand_is_refused_with_the_rule_and_the_remedy(what: str, build: Any) -> None:
    refused(what, build)


def balanced(mask: Any, **more: Any) -> Layout:
    return layouts.balanced(mask, 2, **more)
