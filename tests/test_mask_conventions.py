"""Masks from offsets, positions and padding, and a mask for each row: against the definition."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wrong_input import refused

from seqmesh import masks
from seqmesh.masks import Band, Mask

pytestmark = pytest.mark.fast

LENGTHS = st.lists(st.integers(0, 7), max_size=5)
CONTAINERS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "NumPy": lambda numbers: np.array(numbers, dtype=np.int32),
    "tensor": lambda numbers: torch.tensor(numbers, dtype=torch.int32),
    "list of tensors": lambda numbers: [torch.tensor(number) for number in numbers],
}
every_container = pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)


@given(LENGTHS, st.booleans(), st.none() | st.integers(1, 9))
def test_cumulative_offsets_are_the_documents_between_them(
    lengths: list[int], causal: bool, window: int | None
) -> None:
    offsets = [0, *np.cumsum(lengths, dtype=int).tolist()]
    document = np.repeat(np.arange(len(lengths)), lengths)
    i, j = np.arange(len(document))[:, None], np.arange(len(document))[None, :]
    expected = document[:, None] == document[None, :]
    if causal:
        expected &= i >= j
    if window is not None:
        expected &= abs(i - j) < window
    np.testing.assert_array_equal(masks.from_cu_seqlens(offsets, causal, window).dense(), expected)


@given(st.lists(st.integers(1, 7), max_size=5))
def test_positions_that_restart_are_documents(lengths: list[int]) -> None:
    positions = [place for length in lengths for place in range(length)]
    expected = [
        [j <= i and positions[i] - positions[j] == i - j for j in range(len(positions))]
        for i in range(len(positions))
    ]
    dense = masks.from_position_ids(positions).dense()
    np.testing.assert_array_equal(dense, np.array(expected, dtype=bool).reshape(dense.shape))


@given(st.integers(0, 4), st.integers(0, 7), st.integers(0, 4), st.booleans())
def test_padding_sees_nothing_and_nobody_sees_it(left: int, real: int, right: int, causal: bool) -> None:
    row = [0] * left + [1] * real + [0] * right
    is_real = np.array(row, dtype=bool)
    expected = is_real[:, None] & is_real[None, :]
    if causal:
        expected &= np.tri(len(row), dtype=bool)
    np.testing.assert_array_equal(masks.from_padding(row, causal).dense(), expected)


@given(st.lists(st.booleans(), max_size=12))
def test_a_key_mask_hides_the_same_keys_from_every_query_holes_and_all(seen: list[bool]) -> None:
    expected = np.tile(np.array(seen, dtype=bool), (len(seen), 1)).reshape(len(seen), len(seen))
    mask = masks.from_key_mask(seen)
    np.testing.assert_array_equal(mask.dense(), expected)
    # As few bands as there are runs of seen keys.
    assert len(mask.bands) == sum(1 for at, one in enumerate(seen) if one and not (at and seen[at - 1]))


@every_container
def test_lists_arrays_and_tensors_say_the_same(container: Callable[[list[int]], Any]) -> None:
    assert masks.from_cu_seqlens(container([0, 4, 6, 9])) == masks.documents([4, 2, 3])
    assert masks.from_position_ids(container([0, 1, 0, 0, 1, 2])) == masks.documents([2, 1, 3])
    assert masks.from_padding(container([0, 1, 1])) == Mask(3, 3, (Band(1, 3, 1, 3, 0),))
    assert masks.from_key_mask(container([1, 0, 1])) == Mask(3, 3, (Band(0, 3, 0, 1), Band(0, 3, 2, 3)))


def test_a_batch_of_equal_rows_has_the_mask_of_one() -> None:
    for batch in (1, 3):
        positions = torch.tensor([[0, 1, 2, 0, 1]] * batch)
        assert masks.from_position_ids(positions) == masks.documents([3, 2])
        padding = torch.tensor([[False, True, True]] * batch)
        assert masks.from_padding(padding) == masks.from_padding([0, 1, 1])
        assert masks.from_padding(list(padding)) == masks.from_padding([0, 1, 1])


def test_no_tokens_are_a_mask_of_none() -> None:
    assert masks.from_cu_seqlens([0]) == masks.from_position_ids([]) == masks.from_padding([])
    assert masks.rows([]) == Mask(0, 0, ())


@pytest.mark.parametrize(
    ("what", "build"),
    [
        ("cu_seqlens begins with 4, but the first", lambda: masks.from_cu_seqlens([4, 2])),
        ("cu_seqlens is empty", lambda: masks.from_cu_seqlens([])),
        (
            "cu_seqlens falls from 6 to 5 after document 1; pass offsets",
            lambda: masks.from_cu_seqlens([0, 6, 5]),
        ),
        ("not one row of whole numbers: [[0, 3]]", lambda: masks.from_cu_seqlens(torch.tensor([[0, 3]]))),
        ("not one row of whole numbers: [0.0, 3.0]", lambda: masks.from_cu_seqlens(torch.tensor([0.0, 3]))),
        ("cu_seqlens is 7; pass a list", lambda: masks.from_cu_seqlens(torch.tensor(7))),
        ("cu_seqlens is '03'", lambda: masks.from_cu_seqlens("03")),
        ("window=0: a token sees at least itself", lambda: masks.from_cu_seqlens([0, 3], window=0)),
        ("2.5 is not a whole number", lambda: masks.from_cu_seqlens([0, 3], window=2.5)),
        (
            "position_ids has 5 after 1 (token 2): it neither",
            lambda: masks.from_position_ids([0, 1, 5, 6]),
        ),
        ("position_ids has 1 after 1 (token 2)", lambda: masks.from_position_ids([0, 1, 1])),
        ("position_ids has 3 at the beginning (token 0)", lambda: masks.from_position_ids([3, 4])),
        ("position_ids has -1 at the beginning", lambda: masks.from_position_ids([-1, 0, 1])),
        (
            "position_ids has 2 rows, and row 1 differs from row 0",
            lambda: masks.from_position_ids([[0, 1, 2], [0, 1, 0]]),
        ),
        ("not one row of whole numbers", lambda: masks.from_position_ids([[[0, 1], [0, 1]]])),
        ("attention_mask has 2 at token 1", lambda: masks.from_padding([1, 2, 2])),
        ("attention_mask has padding at token 2 between real", lambda: masks.from_padding([0, 1, 0, 1])),
        (
            "use masks.rows(map(masks.from_padding, attention_mask))",
            lambda: masks.from_padding(torch.tensor([[0, 1], [1, 1]])),
        ),
        ("not one row of whole numbers: [0.0", lambda: masks.from_padding([0.0, float("-inf")])),
        ("key_mask has 2 at token 1, but 1 is a token that is seen", lambda: masks.from_key_mask([1, 2])),
        ("not one row of whole numbers", lambda: masks.from_key_mask([[1, 0]])),
        ("row 1 is 3, not a mask; pass one Mask for each", lambda: masks.rows([masks.causal(2), 3])),
    ],
)
def test_what_is_no_such_row_is_refused_with_the_rule_and_the_remedy(
    what: str, build: Callable[[], Mask]
) -> None:
    refused(what, build)


@st.composite
def any_row(draw: st.DrawFn) -> Mask:
    """A mask of its own length for one row of a batch, rectangular ones among them."""
    s = draw(st.integers(0, 7))
    return draw(
        st.sampled_from(
            [
                masks.causal(s),
                masks.full(s),
                masks.cross(s, draw(st.integers(0, 5))),
                masks.sliding_window(s, 2, sink_tokens=1),
                masks.prefix_lm(s, s // 2),
                Mask(s, s, ()),
            ]
        )
    )


@given(st.lists(any_row(), max_size=4))
def test_each_row_sees_by_its_own_mask_and_no_other_row(row_masks: list[Mask]) -> None:
    mask = masks.rows(row_masks)
    expected = np.zeros((mask.q_len, mask.k_len), dtype=bool)
    q = k = 0
    for row in row_masks:
        expected[q : q + row.q_len, k : k + row.k_len] = row.dense()
        q += row.q_len
        k += row.k_len
    assert (q, k) == (mask.q_len, mask.k_len)
    np.testing.assert_array_equal(mask.dense(), expected)


def test_the_rows_of_a_padded_batch_are_what_the_refusal_says() -> None:
    padding = torch.tensor([[0, 0, 1], [1, 1, 1]])
    expected = Mask(6, 6, (Band(2, 3, 2, 3), Band(3, 6, 3, 6, 0)))
    assert masks.rows(map(masks.from_padding, padding)) == expected
