"""The schedule against brute force: every pair exactly once, exactly the needed rows.

And the paper's traffic, and our own.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmesh import layouts, masks
from seqmesh.layouts import Layout, Span
from seqmesh.masks import Band, Mask
from seqmesh.schedule import RingSchedule, Stages, coalesce, ring_schedule

pytestmark = pytest.mark.fast


STATIC_LAYOUTS = {"contiguous": layouts.contiguous, "zigzag": layouts.zigzag, "striped": layouts.striped}


def all_ranks(
    mask: Mask, q_layout: Layout, kv_layout: Layout, stages: Stages = None, latency_rows: int = 512
) -> list[RingSchedule]:
    return [
        ring_schedule(mask, q_layout, kv_layout, rank, stages, latency_rows=latency_rows)
        for rank in range(q_layout.ring)
    ]


def covered(mask: Mask, q_layout: Layout, kv_layout: Layout, schedules: list[RingSchedule]) -> np.ndarray:
    """How often all ranks compute each global pair, replayed through the rows that really travel."""
    count = np.zeros((mask.q_len, mask.k_len), dtype=np.int64)
    for schedule in schedules:
        q_positions = np.fromiter(q_layout.positions(schedule.ring_rank), dtype=np.int64)
        for n, stage in enumerate(schedule.stages):
            if n == 0:
                buffer = list(kv_layout.positions(schedule.ring_rank))
            else:
                buffer = []
                for peer, runs in stage.receives:
                    stored = list(kv_layout.positions(peer))
                    buffer += [stored[row] for start, stop in runs for row in range(start, stop)]
            keys = np.array(buffer, dtype=np.int64)
            for block in stage.blocks:
                local = Mask(len(q_positions), len(keys), (block,)).dense()
                rows, cols = np.nonzero(local)
                np.add.at(count, (q_positions[rows], keys[cols]), 1)
    return count


def needed_rows(mask: Mask, q_layout: Layout, kv_layout: Layout, receiver: int, sender: int) -> list[int]:
    """Brute force: the sender's storage rows that some query of the receiver may see."""
    dense = mask.dense()
    q = list(q_layout.positions(receiver))
    return [row for row, j in enumerate(kv_layout.positions(sender)) if dense[q, j].any()]


def check_exact(
    mask: Mask, q_layout: Layout, kv_layout: Layout, stages: Stages, latency_rows: int = 512
) -> None:
    """Every pair once, exactly the needed rows, and senders and receivers that agree."""
    schedules = all_ranks(mask, q_layout, kv_layout, stages, latency_rows)
    counted = covered(mask, q_layout, kv_layout, schedules)
    np.testing.assert_array_equal(counted, mask.dense().astype(np.int64))
    assert sum(schedule.area for schedule in schedules) == mask.area
    check_rows(mask, q_layout, kv_layout, schedules)
    check_peers(schedules)


def check_rows(mask: Mask, q_layout: Layout, kv_layout: Layout, schedules: list[RingSchedule]) -> None:
    """What is received is what is sent, once, and what some query needs."""
    sent, received = {}, {}
    for schedule in schedules:
        me = schedule.ring_rank
        for stage in schedule.stages:
            for peer, runs in stage.receives:
                assert (me, peer) not in received
                received[me, peer] = runs
            for peer, runs in stage.sends:
                sent[peer, me] = runs
    assert sent == received
    for receiver in range(q_layout.ring):
        for sender in set(range(q_layout.ring)) - {receiver}:
            runs = received.get((receiver, sender), ())
            rows = [row for start, stop in runs for row in range(start, stop)]
            assert rows == needed_rows(mask, q_layout, kv_layout, receiver, sender)


def check_peers(schedules: list[RingSchedule]) -> None:
    """Each exchange is entered by all, and what a sends to b at a stage, b receives from a."""
    assert len({tuple(stage.hops for stage in schedule.stages) for schedule in schedules}) == 1
    for stage in range(len(schedules[0].stages)):
        pairs_sent, pairs_received = set(), set()
        for schedule in schedules:
            me = schedule.ring_rank
            pairs_sent |= {(me, peer) for peer, _ in schedule.stages[stage].sends}
            pairs_received |= {(peer, me) for peer, _ in schedule.stages[stage].receives}
        assert pairs_sent == pairs_received
        ring = len(schedules)
        assert {(target - source) % ring for source, target in pairs_sent} == set(
            schedules[0].stages[stage].hops
        )


@st.composite
def random_masks(draw: st.DrawFn) -> Mask:
    """Random documents, windows, prefixes and their intersections over up to 40 tokens."""
    lengths = draw(st.lists(st.integers(0, 15), min_size=1, max_size=5))
    s = sum(lengths)
    choices = [
        masks.documents(lengths, causal=draw(st.booleans())),
        masks.causal(s),
        masks.full(s),
        masks.sliding_window(s, draw(st.integers(1, 12)), draw(st.integers(0, 4))),
        masks.prefix_lm(s, draw(st.integers(0, s))),
        masks.chunked(s, draw(st.integers(1, 9))),
    ]
    mask = draw(st.sampled_from(choices))
    return mask & draw(st.sampled_from(choices)) if draw(st.booleans()) else mask


@st.composite
def random_layouts(draw: st.DrawFn, mask: Mask, s: int, ring: int) -> Layout:
    """The named layouts of s tokens, or any partition into strided and consecutive spans."""
    name = draw(st.sampled_from([*STATIC_LAYOUTS, "balanced", "random"]))
    if name in STATIC_LAYOUTS:
        return STATIC_LAYOUTS[name](s, ring)
    if name == "balanced":
        own = mask if mask.q_len == mask.k_len else masks.causal(s)
        return layouts.balanced(own, ring, pairs_per_row=draw(st.sampled_from([0.0, 1.0, 1000.0])))
    cuts = sorted(draw(st.lists(st.integers(0, s), max_size=4)))
    spans: list[list[Span]] = [[] for _ in range(ring)]
    for start, stop in zip([0, *cuts], [*cuts, s], strict=True):
        stride = draw(st.integers(1, 3))
        for lane in range(stride):
            owner = draw(st.integers(0, ring - 1))
            spans[owner].append(Span(start + lane, len(range(start + lane, stop, stride)), stride))
    return Layout(s, tuple(tuple(draw(st.permutations(own))) for own in spans))


@given(st.data(), random_masks(), st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_blocks_of_all_ranks_cover_the_mask_once_with_exactly_the_needed_rows(
    data: st.DataObject, mask: Mask, ring: int
) -> None:
    layout = data.draw(random_layouts(mask, mask.q_len, ring))
    stages = data.draw(st.none() | st.just("auto") | st.integers(1, max(1, ring - 1)))
    check_exact(mask, layout, layout, stages, latency_rows=data.draw(st.integers(0, 20)))


@given(st.data(), st.integers(0, 20), st.integers(0, 20), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_cross_attention_with_its_own_key_layout_is_covered_once(
    data: st.DataObject, q_len: int, k_len: int, ring: int
) -> None:
    lo = data.draw(st.none() | st.integers(-9, 9))
    mask = Mask(q_len, k_len, (Band(0, q_len, 0, k_len, lo),))
    q_layout = data.draw(random_layouts(mask, q_len, ring))
    kv_layout = data.draw(random_layouts(mask, k_len, ring))
    check_exact(mask, q_layout, kv_layout, None)


@pytest.mark.parametrize("ring", range(2, 17))
def test_causal_zigzag_moves_exactly_three_quarters_of_a_rotating_ring(ring: int) -> None:
    s = 4 * ring
    schedules = all_ranks(masks.causal(s), layouts.zigzag(s, ring), layouts.zigzag(s, ring))
    rotating = ring * (ring - 1) * (s // ring)
    assert 4 * sum(schedule.rows_received for schedule in schedules) == 3 * rotating


@pytest.mark.parametrize("ring", [2, 4, 8])
@pytest.mark.parametrize("s", [64, 128])
def test_causal_zigzag_is_one_causal_block_then_one_full_block_per_hop(ring: int, s: int) -> None:
    layout = layouts.zigzag(s, ring)
    for schedule in all_ranks(masks.causal(s), layout, layout):
        first, *hops = schedule.stages
        assert first.blocks == (Band(0, s // ring, 0, s // ring, lo=0),)
        assert all(
            len(hop.blocks) == 1 and hop.blocks[0].lo is None and hop.blocks[0].hi is None for hop in hops
        )
        assert len(hops) == ring - 1


@pytest.mark.parametrize("transposed", [False, True], ids=["side by side", "one above the other"])
def test_blocks_that_touch_become_one_whatever_lies_between_them(transposed: bool) -> None:
    """Two rows of three blocks each are two blocks; read column by column, no neighbours touch.

    And transposed.
    """
    blocks = []
    for q in (0, 5):
        for k in (0, 1, 2):
            sides = (k, k + 1, q, q + 1) if transposed else (q, q + 1, k, k + 1)
            blocks.append(Band(*sides))
    rows = {Band(0, 1, 0, 3), Band(5, 6, 0, 3)}
    columns = {Band(0, 3, 0, 1), Band(0, 3, 5, 6)}
    for order in (blocks, blocks[::-1]):
        assert set(coalesce(order)) == (columns if transposed else rows)


def test_zigzag_gives_every_rank_equal_causal_work() -> None:
    layout = layouts.zigzag(96, 6)
    assert len({schedule.area for schedule in all_ranks(masks.causal(96), layout, layout)}) == 1


def test_a_4k_window_over_64k_moves_under_an_eighth_of_a_rotating_ring() -> None:
    s, ring = 65536, 8
    layout = layouts.contiguous(s, ring)
    schedules = all_ranks(masks.sliding_window(s, 4096), layout, layout)
    assert sum(schedule.rows_received for schedule in schedules) < s * (ring - 1) / 8


def test_packed_documents_move_a_few_percent_of_a_rotating_ring() -> None:
    s, ring = 65536, 16
    mask = masks.documents([1024] * 64)
    layout = layouts.balanced(mask, ring)
    assert sum(schedule.rows_received for schedule in all_ranks(mask, layout, layout)) < 0.05 * s * (ring - 1)


def test_one_stage_is_an_all_gather_with_the_same_rows() -> None:
    layout = layouts.zigzag(64, 4)
    ring = all_ranks(masks.causal(64), layout, layout)
    gather = all_ranks(masks.causal(64), layout, layout, stages=1)
    assert [len(schedule.stages) for schedule in gather] == [2] * 4
    assert [s.rows_received for s in gather] == [s.rows_received for s in ring]


def test_one_rank_of_a_million_tokens_is_scheduled_without_touching_the_other_documents() -> None:
    """Output-sensitive: the number of blocks, not the clock (speed is a benchmark)."""
    mask = masks.documents([1048] * 1000)
    layout = layouts.zigzag(mask.q_len, 64)
    schedule = ring_schedule(mask, layout, layout, 17)
    assert sum(len(stage.blocks) for stage in schedule.stages) < 100


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: ring_schedule(masks.causal(8), layouts.zigzag(9, 2), layouts.zigzag(9, 2), 0),
            "query layout holds 9 tokens",
        ),
        (
            lambda: ring_schedule(masks.causal(8), layouts.zigzag(8, 2), layouts.zigzag(8, 4), 0),
            "use one ring degree",
        ),
        (
            lambda: ring_schedule(masks.causal(8), layouts.zigzag(8, 2), layouts.zigzag(8, 2), 2),
            "ring_rank=2",
        ),
        (
            lambda: ring_schedule(masks.causal(8), layouts.zigzag(8, 2), layouts.zigzag(8, 2), 0, 2),
            "stages=2",
        ),
        (
            lambda: ring_schedule(masks.causal(8), layouts.zigzag(8, 4), layouts.zigzag(8, 4), 0, 0),
            "stages=0 for ring=4; use 1",
        ),
        (
            lambda: ring_schedule(masks.causal(8), layouts.zigzag(8, 2), layouts.zigzag(8, 2), 0, "all"),
            "stages='all' for ring=2; use 1",
        ),
        (
            lambda: ring_schedule(
                masks.causal(8), layouts.zigzag(8, 2), layouts.zigzag(8, 2), 0, "auto", latency_rows=-1
            ),
            "latency_rows=-1",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
