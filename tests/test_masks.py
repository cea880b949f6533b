"""Masks against the definition, pair by pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqmesh import masks
from seqmesh.masks import Band, Mask

pytestmark = pytest.mark.fast


BOUND = st.one_of(st.none(), st.integers(-14, 14))


@st.composite
def bands(draw: st.DrawFn, size: int = 12) -> Band:
    q, k = (
        sorted(draw(st.tuples(*[st.integers(0, size)] * 2))),
        sorted(draw(st.tuples(*[st.integers(0, size)] * 2))),
    )
    return Band(*q, *k, draw(BOUND), draw(BOUND))


def pairs(band: Band) -> set[tuple[int, int]]:
    return {
        (i, j)
        for i in range(band.q_start, band.q_stop)
        for j in range(band.k_start, band.k_stop)
        if (band.lo is None or band.lo <= i - j) and (band.hi is None or i - j <= band.hi)
    }


@given(bands())
def test_area_trim_and_dense_agree_with_the_definition(band: Band) -> None:
    expected = pairs(band)
    assert band.area == len(expected)
    mask = Mask(12, 12, (band,))
    assert mask.area == len(expected)
    assert set(zip(*(axis.tolist() for axis in np.nonzero(mask.dense())), strict=True)) == expected
    trimmed = band.trim()
    assert (set() if trimmed is None else pairs(trimmed)) == expected
    if trimmed is not None:
        assert {i for i, _ in expected} == set(range(trimmed.q_start, trimmed.q_stop))
        assert {j for _, j in expected} == set(range(trimmed.k_start, trimmed.k_stop))


@given(bands(), bands(), st.integers(-5, 5), st.integers(-5, 5))
def test_bands_are_closed_under_intersection_and_shift(a: Band, b: Band, q: int, k: int) -> None:
    both = a.intersect(b)
    assert (set() if both is None else pairs(both)) == pairs(a) & pairs(b)
    assert pairs(a.shift(q, k)) == {(i + q, j + k) for i, j in pairs(a)}


@given(bands(), bands())
def test_a_mask_refuses_exactly_the_bands_that_share_a_pair(a: Band, b: Band) -> None:
    if pairs(a) & pairs(b):
        with pytest.raises(ValueError, match="count twice"):
            Mask(12, 12, (a, b))
    else:
        assert Mask(12, 12, (a, b)).area == a.area + b.area


@given(st.lists(st.integers(0, 7), max_size=5), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_named_masks_are_what_their_names_say(
    lengths: list[int], window: int, sinks: int, causal: bool
) -> None:
    s = sum(lengths)
    i, j = np.arange(s)[:, None], np.arange(s)[None, :]
    document = np.repeat(np.arange(len(lengths)), lengths)
    same = document[:, None] == document[None, :]
    expected = {
        masks.full(s): np.ones((s, s), bool),
        masks.causal(s): i >= j,
        masks.sliding_window(s, window): (i >= j) & (i - j < window),
        masks.sliding_window(s, window, sinks): (i >= j) & ((i - j < window) | (j < sinks)),
        masks.documents(lengths, causal): same & ((i >= j) if causal else True),
        masks.chunked(s, window): (i >= j) & (i // window == j // window),
        masks.prefix_lm(s, min(s, sinks)): (i >= j) | (j < min(s, sinks)),
        masks.cross(s, 4): np.ones((s, 4), bool),
    }
    for mask, dense in expected.items():
        np.testing.assert_array_equal(mask.dense(), dense)
        assert mask.area == dense.sum()
    both = masks.documents(lengths, causal) & masks.sliding_window(s, window)
    np.testing.assert_array_equal(both.dense(), same & (i >= j) & (i - j < window))
    assert both.rows_area(0, s) == both.area


def test_equal_masks_are_equal_however_they_were_written() -> None:
    assert masks.causal(8) == Mask(8, 8, (Band(0, 8, 0, 8, lo=0, hi=100),)) == masks.full(8) & masks.causal(8)
    assert hash(masks.causal(8)) == hash(masks.prefix_lm(8, 0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mask(4, 4, (Band(0, 5, 0, 4),)), "leaves the mask of 4 queries x 4 keys; clip"),
        (lambda: Mask(-1, 4, ()), "lengths must not be negative"),
        (lambda: masks.causal(4) & masks.causal(5), "cannot intersect a mask of 4 x 4 with one of 5 x 5"),
        (lambda: masks.documents([3.7, 2.9]), "3.7 is not a whole number of tokens"),
        (lambda: masks.sliding_window(8, 2.5), "2.5 is not a whole number"),
        (lambda: masks.chunked(-5, 4), "s=-5"),
        (lambda: masks.documents([3, -1]), "document length -1 is negative"),
        (lambda: masks.sliding_window(4, 0), "use window >= 1"),
        (lambda: masks.chunked(4, 0), "use chunk >= 1"),
        (lambda: masks.prefix_lm(4, 5), "prefix=5 of a sequence of 4"),
    ],
)
def test_bad_masks_are_refused_with_the_rule_and_the_remedy(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
