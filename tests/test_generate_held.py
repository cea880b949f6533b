"""Who holds which token of a cache, what new tokens see of it, and what moves: pure, against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqmesh import layouts, masks
from seqmesh.generate.held import Spans, dealt, filled, pieces, since, spans_of, tokens_of, zigzagged
from seqmesh.generate.moving import RowSizes, bytes_of_keys, bytes_of_queries, moves_queries
from seqmesh.generate.sight import Sight, as_stored
from seqmesh.layouts import Layout, Span

pytestmark = pytest.mark.fast

COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=6)
KINDS = st.one_of(
    st.just(Sight()),
    st.integers(1, 9).map(lambda window: Sight(window=window)),
    st.integers(1, 9).map(lambda chunk: Sight(chunk=chunk)),
)


def tokens(spans: Spans) -> list[int]:
    return [token for span in spans for token in span.tokens]


@given(COUNTS, st.integers(0, 40))
def test_tokens_go_one_by_one_where_fewest_are(counts: list[int], new: int) -> None:
    after = list(counts)
    for _ in range(new):
        after[after.index(min(after))] += 1
    given_out = filled(counts, new)
    assert sum(given_out) == new
    assert min(given_out) >= 0
    assert sorted(a + b for a, b in zip(counts, given_out, strict=True)) == sorted(after)


@given(COUNTS, st.integers(0, 30), st.integers(0, 40))
def test_new_tokens_are_dealt_once_each(counts: list[int], past: int, new: int) -> None:
    for deal in (dealt, zigzagged):
        spans = deal(counts, past, new)
        assert [tokens_of(of_rank) for of_rank in spans] == filled(counts, new)
        assert sorted(t for of_rank in spans for t in tokens(of_rank)) == list(range(past, past + new))
    assert all(len(of_rank) <= 1 for of_rank in dealt(counts, past, new))


def test_a_prompt_is_folded_over_the_ranks() -> None:
    assert [tokens(spans) for spans in zigzagged([0, 0, 0], 4, 8)] == [[4, 5, 11], [6, 7, 10], [8, 9]]


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 4))
def test_pieces_of_a_layout_are_its_tokens_cut_evenly(s: int, ring: int, ulysses: int) -> None:
    for layout in (layouts.zigzag(s, ring), layouts.striped(s, ring)):
        found = pieces(layout, ulysses)
        for ring_rank in range(ring):
            whole = list(layout.positions(ring_rank))
            cut = layouts.split_evenly(len(whole), ulysses)
            for u in range(ulysses):
                assert tokens(found[ring_rank * ulysses + u]) == whole[cut[u] : cut[u + 1]]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=6), st.integers(0, 40))
def test_tokens_since_one(runs: list[tuple[int, int]], first: int) -> None:
    spans = spans_of((start, start + count) for start, count in runs)
    assert tokens(spans) == [t for start, count in runs for t in range(start, start + count)]
    assert tokens(since(spans, first)) == [token for token in tokens(spans) if token >= first]


def sees(kind: Sight, query: int, key: int, begin: int = 0) -> bool:
    """Chunks are counted from the first real token, `begin`."""
    if key > query:
        return False
    if kind.window is not None:
        return query - key < kind.window
    if kind.chunk is None:
        return True
    return key >= begin and (query - begin) // kind.chunk == (key - begin) // kind.chunk


@given(KINDS, st.integers(0, 20), st.integers(1, 12), st.data())
def test_what_new_tokens_see(kind: Sight, past: int, new: int, data: st.DataObject) -> None:
    total = past + new
    edges = sorted(data.draw(st.lists(st.integers(0, total), max_size=4, unique=True)))
    real = tuple(zip(edges[::2], edges[1::2], strict=False)) if data.draw(st.booleans()) else None
    begin = real[0][0] if real else 0
    first = data.draw(st.integers(0, kind.first_seen(past, real)))
    mask = kind.mask(past, new, first, real).dense()
    for query in range(past, total):
        for key in range(first, total):
            is_real = real is None or any(start <= key < stop for start, stop in real)
            assert mask[query - past, key - first] == (is_real and sees(kind, query, key, begin))
    # nothing before the first is seen by these, or by any later
    first = kind.first_seen(past, real)
    for query in range(past, total + 9):
        assert not any(sees(kind, query, key, begin) for key in range(begin, first))
    assert past < begin or sees(kind, past, max(first, begin), begin)


@given(KINDS, st.integers(0, 20), st.integers(1, 12), st.randoms())
def test_a_mask_as_tokens_lie(kind: Sight, past: int, new: int, random: "np.random.Generator") -> None:
    total = past + new
    mask = kind.mask(past, new, 0, None)
    queries, keys = list(range(new)), list(range(total))
    random.shuffle(queries)
    random.shuffle(keys)
    keys = keys[: total // 2]
    lies = as_stored(
        mask,
        [Span(start, 1) for start in queries],
        spans_of((start, start + 1) for start in keys),
    )
    np.testing.assert_array_equal(lies.dense(), mask.dense()[np.ix_(queries, keys)])


def test_keys_that_all_queries_see_are_one_band_however_they_lie() -> None:
    mask = Sight().mask(1000, 1, 0, None)
    assert len(as_stored(mask, [Span(0, 1)], [Span(start, 1) for start in range(0, 1000, 4)]).bands) == 1


SIZES = RowSizes(heads=8, kv_heads=2, key_dim=16, value_dim=24, itemsize=2, lse_itemsize=4)


def test_bytes_of_a_row() -> None:
    assert SIZES.key == 2 * (16 + 24) * 2
    assert SIZES.query == 8 * 16 * 2
    assert SIZES.part == 8 * (24 * 2 + 4)


@pytest.mark.parametrize("past", [4, 40, 400])
@pytest.mark.parametrize("new", [6, 60])
@pytest.mark.parametrize("kind", [Sight(), Sight(window=16)])
def test_the_cheaper_of_queries_and_keys_moves(kind: Sight, past: int, new: int) -> None:
    ranks = 3
    held = dealt([0] * ranks, 0, past)
    asked = zigzagged([tokens_of(spans) for spans in held], past, new)
    queries = Layout(new, tuple(tuple(Span(s.start - past, s.count) for s in spans) for spans in asked))
    keys = Layout(past + new, tuple((*a, *b) for a, b in zip(held, asked, strict=True)))
    mask = kind.mask(past, new, 0, None)
    # brute force: every key that a rank's queries see and that it does not hold; every query everywhere
    dense = mask.dense()
    moved = 0
    for rank in range(ranks):
        seen = dense[tokens(queries.ranks[rank])].any(0).nonzero()[0].tolist()
        moved += len(set(seen) - set(tokens(keys.ranks[rank])))
    by_keys = 2 * moved * SIZES.key
    by_queries = 2 * new * (ranks - 1) * (SIZES.query + SIZES.part)
    assert bytes_of_keys([mask, mask], queries, keys, SIZES) == by_keys
    assert bytes_of_queries(2, queries, SIZES) == by_queries
    assert moves_queries([mask, mask], queries, keys, SIZES) == (by_queries < by_keys)


def test_a_long_cache_lets_queries_move_and_a_window_does_not() -> None:
    def moves(kind: Sight, past: int) -> bool:
        held = dealt([0] * 4, 0, past)
        asked = zigzagged([tokens_of(spans) for spans in held], past, 64)
        queries = Layout(64, tuple(tuple(Span(s.start - past, s.count) for s in spans) for spans in asked))
        keys = Layout(past + 64, tuple((*a, *b) for a, b in zip(held, asked, strict=True)))
        return moves_queries([kind.mask(past, 64, 0, None)], queries, keys, SIZES)

    assert moves(Sight(), 4096)
    assert not moves(Sight(), 64)
    assert not moves(Sight(window=32), 4096)


def test_masks_of_the_whole_are_the_families() -> None:
    assert Sight().mask(0, 9, 0, None) == masks.causal(9)
    assert Sight(window=3).mask(0, 9, 0, None) == masks.sliding_window(9, 3)
    assert Sight(chunk=4).mask(0, 9, 0, None) == masks.chunked(9, 4)
