"""Masks as text: what a program would write means the same, and nothing else is run."""

import pytest

from seqmesh import masks
from seqmesh.masks import Band, Mask
from seqmesh.notation import families, family_of, mask_of

pytestmark = pytest.mark.fast

TEXTS = {
    "causal(5)": masks.causal(5),
    "full(s=4)": masks.full(4),
    "sliding_window(9, 4, sink_tokens=2)": masks.sliding_window(9, 4, 2),
    "documents([5, 0, 3], causal=False)": masks.documents([5, 0, 3], causal=False),
    " documents([4, 3]) & sliding_window(7, 2) ": masks.documents([4, 3]) & masks.sliding_window(7, 2),
    "causal(8) & chunked(8, 3) & sliding_window(8, 2)": (
        masks.causal(8) & masks.chunked(8, 3) & masks.sliding_window(8, 2)
    ),
    "cross(2, 3)": masks.cross(2, 3),
    "Mask(40, 40, [Band(0, 40, 0, 40, lo=-6, hi=-1)])": Mask(40, 40, (Band(0, 40, 0, 40, -6, -1),)),
}


@pytest.mark.parametrize(("text", "mask"), TEXTS.items(), ids=TEXTS)
def test_a_text_is_the_mask_that_a_program_would_make(text: str, mask: Mask) -> None:
    assert mask_of(text) == mask
    assert mask_of(repr(mask)) == mask


def test_every_family_of_masks_is_known() -> None:
    assert {"causal", "chunked", "cross", "documents", "full", "prefix_lm", "sliding_window"} <= set(
        families()
    )
    assert "annotations" not in families()


def test_a_table_calls_a_mask_by_its_families() -> None:
    assert family_of("documents([4, 3]) & sliding_window(7, 2)") == "documents & sliding_window"
    assert family_of("Mask(4, 4, [Band(0, 4, 0, 4)])") == "Mask"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as a mask; write a family"),
        ("causal(", "cannot be read as a mask"),
        ("causal", "'causal' has no place in a mask"),
        ("7", "'7' is a int, not a mask"),
        ("causual(7)", "'causual' is no family of masks; write a family .*causal, chunked"),
        ("causal(7) | full(7)", "has no place in a mask"),
        ("causal(7) & 3", "joins what is no mask by &"),
        ("causal(7) & full(8)", "both must cover the same queries"),
        ("causal(7, 8)", r"too many positional arguments; the family is causal\(s: int\)"),
        ("causal(size=7)", r"the family is causal\(s: int\)"),
        ("causal(7.5)", "'7.5' has no place in a mask"),
        ("causal('7')", "has no place in a mask"),
        ("documents(5)", r"the family is documents\("),
        ("documents([3, -1])", "document length -1 is negative"),
        ("documents(*[3])", "has no place in a mask"),
        ("causal(**{})", r"unpacks with \*\*"),
        ("documents([3] * 9)", "has no place in a mask"),
        ("Mask(4, 4, [3])", "the family is Mask"),
        ("__import__('os').system('true')", "has no place in a mask"),
        ("causal(7).bands", "has no place in a mask"),
        ("index(7)", "'index' is no family of masks"),
        ("(" * 500 + "1" + ")" * 500, "cannot be read as a mask"),
        ("causal(" + "1" * 20_000 + ")", "use 20,000 at most"),
    ],
)
def test_anything_else_is_refused_with_the_remedy(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        mask_of(text)
    assert "\n" not in str(refused.value)
