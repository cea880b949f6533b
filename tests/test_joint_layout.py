"""Text and image tokens as one sequence: by brute force, over all small degrees and lengths."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqmesh.layouts import JointLayout, Span, split_evenly, text_and_image

pytestmark = pytest.mark.fast

DEGREES = st.integers(1, 5)
TOKENS = st.integers(0, 60)


def held(joint: JointLayout, ulysses: int, *, image_alone: bool = False) -> list[list[int]]:
    """Global positions that each rank holds, as a Schedule cuts the layout's storage order."""
    layout = joint.image_layout if image_alone else joint.layout
    found = []
    for ring_rank in range(layout.ring):
        stored = list(layout.positions(ring_rank))
        found += [stored[start:stop] for start, stop in pairwise(split_evenly(len(stored), ulysses))]
    return found


def spread(counts: list[int]) -> int:
    return max(counts) - min(counts)


@given(TOKENS, TOKENS, DEGREES, DEGREES, st.booleans())
def test_a_schedule_cuts_the_layout_into_exactly_the_pieces(
    text: int, image: int, ring: int, ulysses: int, text_first: bool
) -> None:
    joint = text_and_image(text, image, ring, ulysses, text_first=text_first)
    assert (joint.text, joint.image, joint.text_first) == (text, image, text_first)
    assert len(joint.pieces) == ring * ulysses
    text_at, image_at = (0, text) if text_first else (image, 0)
    for tokens, alone, piece in zip(
        held(joint, ulysses), held(joint, ulysses, image_alone=True), joint.pieces, strict=True
    ):
        own_text = [text_at + token for token in piece.text]
        own_image = [image_at + token for token in piece.image]
        assert tokens == (own_text + own_image if text_first else own_image + own_text)
        assert alone == list(piece.image)
        assert piece.rows == len(tokens)


@given(TOKENS, TOKENS, DEGREES, DEGREES, st.booleans())
def test_pieces_follow_each_other_and_leave_no_token_out(
    text: int, image: int, ring: int, ulysses: int, text_first: bool
) -> None:
    pieces = text_and_image(text, image, ring, ulysses, text_first=text_first).pieces
    assert [token for piece in pieces for token in piece.text] == list(range(text))
    assert [token for piece in pieces for token in piece.image] == list(range(image))


@given(TOKENS, TOKENS, DEGREES, DEGREES)
def test_every_rank_holds_near_equally_many_rows_and_tokens_of_both(
    text: int, image: int, ring: int, ulysses: int
) -> None:
    pieces = text_and_image(text, image, ring, ulysses, text_first=True).pieces
    assert spread([piece.rows for piece in pieces]) <= 1
    assert spread([len(piece.image) for piece in pieces]) <= 1
    assert spread([len(piece.text) for piece in pieces]) <= 2
    for first in range(0, len(pieces), ulysses):
        assert spread([len(piece.text) for piece in pieces[first : first + ulysses]]) <= 1


@given(st.integers(1, 4), DEGREES, DEGREES, TOKENS)
def test_as_many_text_tokens_as_ranks_give_every_rank_one(
    times: int, ring: int, ulysses: int, image: int
) -> None:
    pieces = text_and_image(times * ring * ulysses, image, ring, ulysses, text_first=False).pieces
    assert min(len(piece.text) for piece in pieces) >= 1


def test_the_worked_example_of_the_docstring() -> None:
    joint = text_and_image(3, 10, 2, 2, text_first=True)
    assert [(len(piece.text), len(piece.image)) for piece in joint.pieces] == [(1, 3), (1, 2), (0, 3), (1, 2)]
    assert joint.layout.ranks[0] == (Span(0, 1), Span(3, 3), Span(1, 1), Span(6, 2))
    assert joint.image_layout.ranks == ((Span(0, 5),), (Span(5, 5),))


@pytest.mark.parametrize("degrees", [(4, 1), (2, 2), (1, 4)])
def test_flux_at_1008_by_1008_divides_among_four_ranks(degrees: tuple[int, int]) -> None:
    # 63 x 63 patches of 16 x 16 pixels beside 512 text tokens: 4481 rows, a prime number of them.
    pieces = text_and_image(512, 63 * 63, *degrees, text_first=True).pieces
    assert sorted(piece.rows for piece in pieces) == [1120, 1120, 1120, 1121]
    assert sorted(len(piece.text) for piece in pieces) == [128] * 4
    assert sorted(len(piece.image) for piece in pieces) == [992, 992, 992, 993]


@pytest.mark.parametrize(
    ("text", "image", "ring", "ulysses"), [(-1, 5, 1, 1), (5, -1, 1, 1), (5, 5, 0, 1), (5, 5, 1, 0)]
)
def test_impossible_numbers_are_refused(text: int, image: int, ring: int, ulysses: int) -> None:
    with pytest.raises(ValueError, match=r"at least|use s >= 0"):
        text_and_image(text, image, ring, ulysses, text_first=True)
