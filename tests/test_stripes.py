"""Striped layouts by arithmetic: the same runs and blocks as by search, for every pair of ranks."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmesh import layouts, masks
from seqmesh.bench.schedules import given_count
from seqmesh.masks import Band, Mask
from seqmesh.schedule import coalesce, ring_schedule, stripes
from seqmesh.schedule.peers import SearchedPeers, peers_of
from seqmesh.schedule.stripes import StripedPeers

pytestmark = pytest.mark.fast


@st.composite
def staircases(draw: st.DrawFn) -> tuple[Mask, int]:
    """Bands that follow one another in rows and in keys, of any bounds allowed; and a ring degree."""
    ring = draw(st.integers(1, 7))
    size = st.integers(0, 25)
    gap = st.sampled_from([0, 0, 0, 1, 5])
    q = k = 0
    bands = []
    for _ in range(draw(st.integers(2, 6))):
        q += draw(gap)
        k += draw(gap)
        rows, keys = draw(size), draw(size)
        lo = draw(st.none() | st.integers(-25, 25))
        hi = draw(st.none() | st.integers(-25, 25))
        if lo is not None and hi is not None:
            hi = lo + 2 * ring + abs(hi)
        corner = q - k
        lo = None if lo is None else lo + corner
        hi = None if hi is None else hi + corner
        bands.append(Band(q, q + rows, k, k + keys, lo, hi))
        q += rows
        k += keys
    return Mask(q + draw(gap), k + draw(gap), tuple(bands)), ring


@given(staircases())
@settings(max_examples=400, deadline=None)
def test_runs_and_blocks_are_those_found_by_search(drawn: tuple[Mask, int]) -> None:
    mask, ring = drawn
    q_layout, kv_layout = layouts.striped(mask.q_len, ring), layouts.striped(mask.k_len, ring)
    if not stripes.applies(mask, q_layout, kv_layout):
        assert len(mask.bands) < 2  # empty ones have been dropped
        return
    for rank in range(ring):
        fast = StripedPeers(mask, ring, rank)
        slow = SearchedPeers(mask, q_layout, kv_layout, rank)
        assert list(fast.own()) == slow.own()
        for peer in set(range(ring)) - {rank}:
            assert fast.sent(peer) == slow.sent(peer)
            runs, blocks = slow.received(peer, 100)
            assert fast.received(peer, 100) == (runs, blocks)
            # Nothing is lost by not trying: such blocks are never joined.
            assert coalesce(blocks) == tuple(blocks)


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(60),
        Mask(60, 60, (Band(0, 30, 0, 30, 0), Band(29, 60, 30, 60))),
        Mask(60, 60, (Band(0, 30, 0, 30, 0), Band(30, 60, 29, 60))),
        masks.documents([30, 30]) & masks.sliding_window(60, 8),
    ],
    ids=["one band", "shared rows", "shared keys", "few diagonals"],
)
def test_bands_that_do_not_follow_one_another_or_may_be_joined_are_searched_for(mask: Mask) -> None:
    layout = layouts.striped(60, 4)
    assert not stripes.applies(mask, layout, layout)
    assert isinstance(peers_of(mask, layout, layout, 1), SearchedPeers)


def test_only_stripes_are_taken_for_stripes() -> None:
    mask = masks.documents([30, 30])
    striped = layouts.striped(60, 4)
    assert stripes.applies(mask, striped, striped)
    assert not stripes.applies(mask, layouts.zigzag(60, 4), striped)
    assert not stripes.applies(mask, striped, layouts.contiguous(60, 4))
    assert not stripes.applies(mask, layouts.Layout(60, striped.ranks[::-1]), striped)


def test_windows_of_one_diagonal_are_joined_over_documents() -> None:
    """Each token sees itself and one R before it: in the storage of a stripe, one band for all documents."""
    mask = Mask(64, 64, (Band(0, 32, 0, 32, 0, 0), Band(32, 64, 32, 64, 0, 0)))
    layout = layouts.striped(64, 4)
    own = ring_schedule(mask, layout, layout, 2).stages[0]
    assert own.blocks == (Band(0, 16, 0, 16, 0, 0),)


def test_a_thousand_documents_over_64_stripes_are_cheap() -> None:
    """About 0.1 s here, where a search takes 1.2 s; the bound leaves room for a slow and busy machine."""
    mask = masks.documents(given_count(2**20, 1000, seed=0))
    layout = layouts.striped(2**20, 64)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        schedule = ring_schedule(mask, layout, layout, 17)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.4
    assert sum(len(stage.blocks) for stage in schedule.stages) == 61438
