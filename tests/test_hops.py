"""Which hops exchanges are made of: against the transfers of all ranks, found by brute force."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import needed_rows, random_layouts, random_masks

from seqmesh import layouts, masks
from seqmesh.layouts import Layout
from seqmesh.masks import Mask
from seqmesh.schedule import exchanges, ring_schedule
from seqmesh.schedule.hops import largest_transfers

pytestmark = pytest.mark.fast

MEGA = 2**20


def brute_transfers(mask: Mask, q_layout: Layout, kv_layout: Layout) -> list[int]:
    """Rows of the largest transfer at each hop, from the dense mask."""
    ring = q_layout.ring
    most = [0] * ring
    for receiver in range(ring):
        for hop in range(1, ring):
            rows = needed_rows(mask, q_layout, kv_layout, receiver, (receiver - hop) % ring)
            most[hop] = max(most[hop], len(rows))
    return most


def is_striped(layout: Layout) -> bool:
    return layout == layouts.striped(layout.s, layout.ring)


@given(st.data(), random_masks(), st.integers(1, 6), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_largest_transfers_are_those_of_all_ranks(
    data: st.DataObject, mask: Mask, ring: int, enough: int
) -> None:
    q_layout = data.draw(random_layouts(mask, mask.q_len, ring))
    kv_layout = data.draw(st.just(q_layout) | random_layouts(mask, mask.k_len, ring))
    expected = brute_transfers(mask, q_layout, kv_layout)
    found = largest_transfers(mask, q_layout, kv_layout, enough)
    assert [rows > 0 for rows in found] == [rows > 0 for rows in expected]
    if is_striped(q_layout) and is_striped(kv_layout):  # taken to be whole shards
        assert all(rows in (0, min(enough, max(kv_layout.counts))) for rows in found)
    else:
        assert list(found) == [min(enough, rows) for rows in expected]


@given(st.data(), random_masks(), st.integers(2, 7), st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_exchanges_take_the_used_hops_in_order_and_merge_only_small_ones(
    data: st.DataObject, mask: Mask, ring: int, latency_rows: int
) -> None:
    layout = data.draw(random_layouts(mask, mask.q_len, ring))
    rows = largest_transfers(mask, layout, layout, 1000)
    used = [hop for hop in range(ring) if rows[hop]]
    assert exchanges(mask, layout, layout) == tuple((hop,) for hop in used)
    for count in range(1, ring):
        spread = exchanges(mask, layout, layout, count)
        assert len(spread) == min(count, len(used))
        assert [hop for hops in spread for hop in hops] == used
        assert not spread or max(map(len, spread)) - min(map(len, spread)) <= 1
    merged = exchanges(mask, layout, layout, "auto", latency_rows)
    assert [hop for hops in merged for hop in hops] == used
    sizes = [sum(rows[hop] for hop in hops) for hops in merged]
    for hops, size in zip(merged, sizes, strict=True):
        assert len(hops) == 1 or size <= latency_rows
    for size, after in zip(sizes, merged[1:], strict=False):  # as long as the next one would still fit
        assert size + rows[after[0]] > latency_rows


def test_a_window_over_a_million_tokens_makes_one_exchange() -> None:
    layout = layouts.contiguous(MEGA, 64)
    mask = masks.sliding_window(MEGA, 4096)
    assert exchanges(mask, layout, layout) == ((1,),)
    assert len(ring_schedule(mask, layout, layout, 17).stages) == 2


def test_the_first_tokens_that_stay_visible_travel_in_one_exchange_with_auto() -> None:
    """Four rows from rank 0 to everyone: 63 exchanges, of which 62 are all latency."""
    layout = layouts.contiguous(MEGA, 64)
    mask = masks.sliding_window(MEGA, 4096, sink_tokens=4)
    assert len(exchanges(mask, layout, layout)) == 63
    assert exchanges(mask, layout, layout, "auto") == ((1,), tuple(range(2, 64)))


def test_documents_that_nobody_shares_make_no_exchange() -> None:
    layout = layouts.contiguous(64, 4)
    schedule = ring_schedule(masks.documents([16] * 4), layout, layout, 1)
    assert len(schedule.stages) == 1
    assert exchanges(masks.documents([16] * 4), layout, layout, "auto") == ()


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
def test_a_causal_mask_settles_it_after_a_look_at_few_ranks(name: str) -> None:
    """All 1,023 hops are used; to look at all ranks would take a million steps."""
    mask, layout = masks.causal(10 * MEGA), layouts.named(name, masks.causal(0), 10 * MEGA, 1024)
    start = time.process_time()
    assert len(exchanges(mask, layout, layout, "auto")) == 1023
    assert time.process_time() - start < 0.1  # about 3 ms here
