"""Layouts: every token exactly once, near-equal shares, and what their names say, for any length."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqmesh import layouts
from seqmesh.layouts import Layout, Span, split_evenly

pytestmark = pytest.mark.fast


BUILDERS = [layouts.contiguous, layouts.zigzag, layouts.striped]


@given(st.sampled_from(BUILDERS), st.integers(0, 70), st.integers(1, 20))
def test_every_token_has_one_owner_and_shares_differ_by_at_most_one_token(build, s: int, ring: int) -> None:
    layout = build(s, ring)
    assert sorted(p for rank in range(ring) for p in layout.positions(rank)) == list(range(s))
    assert max(layout.counts) - min(layout.counts) <= 1
    assert layout.counts == tuple(len(list(layout.positions(rank))) for rank in range(ring))


@pytest.mark.parametrize("ring", range(1, 9))
def test_zigzag_pairs_chunk_r_with_chunk_2r_minus_1_minus_r(ring: int) -> None:
    layout, c = layouts.zigzag(6 * ring, ring), 3
    for r in range(ring):
        first, last = list(range(r * c, (r + 1) * c)), list(range((2 * ring - 1 - r) * c, (2 * ring - r) * c))
        assert list(layout.positions(r)) == first + last


def test_striped_deals_tokens_round_robin() -> None:
    assert [list(layouts.striped(7, 3).positions(r)) for r in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


@given(st.integers(0, 100), st.integers(1, 20))
def test_even_splits_differ_by_at_most_one(total: int, parts: int) -> None:
    cut = split_evenly(total, parts)
    sizes = [b - a for a, b in pairwise(cut)]
    assert sum(sizes) == total
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1


def test_spans_of_any_stride_in_any_order_may_share_a_sequence() -> None:
    layout = Layout(9, ((Span(5, 2), Span(0, 2)), (Span(7, 2), Span(3, 2)), (Span(2, 1),)))
    assert [list(layout.positions(rank)) for rank in range(3)] == [[5, 6, 0, 1], [7, 8, 3, 4], [2]]
    mixed = Layout(9, ((Span(1, 2), Span(4, 2, 2)), (Span(0, 1), Span(3, 3, 2), Span(8, 1))))
    assert mixed.counts == (4, 5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Layout(4, ((Span(0, 2),), (Span(3, 1),))), r"leaves 1 tokens \(the first is 2\) to no rank"),
        (lambda: Layout(4, ((Span(0, 3),), (Span(2, 2),))), "holds 1 tokens twice"),
        (lambda: Layout(4, ((Span(0, 5),),)), "leaves the sequence of 4 tokens"),
        (lambda: Layout(4, ((Span(0, 3, 2),),)), "leaves the sequence of 4 tokens"),
        (lambda: Layout(8, ((Span(0, 8, 0),),)), "use count >= 0, stride >= 1"),
        (lambda: Layout(0, ()), "at least one rank"),
        (lambda: layouts.zigzag(4, 0), "use s >= 0 and ring >= 1"),
    ],
)
def test_bad_layouts_are_refused_with_the_rule(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
