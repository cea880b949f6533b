"""Text and image tokens as one joint sequence: every rank holds near-equally many of both.

Image and video transformers let text and image tokens attend to each other. A rank's local sequence must have
the model's own order, so each rank holds one piece of the text and one of the image:

    3 text tokens t, 10 image tokens i, ring 2 x ulysses 2, text first

    joint sequence   t0 t1 t2 i0 i1 i2 i3 i4 i5 i6 i7 i8 i9
    rank 0           t0 i0 i1 i2                                     4 rows
    rank 1           t1 i3 i4                                        3 rows
    rank 2           i5 i6 i7                                        3 rows
    rank 3           t2 i8 i9                                        3 rows

Nothing is repeated and nothing is padded. A schedule cuts a ring rank's rows evenly over its ulysses ranks
(`split_evenly`). Here rows and image tokens are both cut by that rule, first over the ring and then over
ulysses; text is the difference of the two, and so near-equal as well. Therefore the image tokens alone have a
layout of their own, `image_layout`, in which each rank holds the very same image tokens.

Legend: R ring degree, U ulysses degree.
"""

from dataclasses import dataclass
from itertools import pairwise

from seqmesh.layouts.layout import Layout, Span, check_degrees, split_evenly


@dataclass(frozen=True, kw_only=True)
class JointPiece:
    """What one rank holds: places in the text, and places in the image."""

    text: range
    image: range

    @property
    def rows(self) -> int:
        """Tokens of both."""
        return len(self.text) + len(self.image)


@dataclass(frozen=True, kw_only=True)
class JointLayout:
    """Who holds which text and image tokens. Made by `text_and_image`."""

    text: int
    """Text tokens of the whole sequence; 0 for a sequence of image tokens alone."""
    image: int
    text_first: bool
    """Whether text comes before the image, on every rank as in the whole sequence."""
    pieces: tuple[JointPiece, ...]
    """By rank of the mesh, ring_rank * U + ulysses_rank."""
    layout: Layout
    """Of the joint sequence."""
    image_layout: Layout
    """Of the image tokens alone: the same tokens on the same ranks."""


def text_and_image(text: int, image: int, ring: int, ulysses: int, *, text_first: bool) -> JointLayout:
    """The joint layout of `text` and `image` tokens over ring x ulysses ranks.

    Rows of any two ranks differ by at most one, and so do the image tokens of any two. Text tokens of two
    ranks differ by at most one inside a ring rank, and by at most two in all.

    Raises:
        ValueError: a negative number of tokens, or a degree below 1.
    """
    if text < 0 or image < 0 or ulysses < 1:
        raise ValueError(
            f"{text} text and {image} image tokens, ulysses={ulysses}: numbers of tokens are at least 0 and"
            " degrees at least 1; pass those"
        )
    check_degrees(text + image, ring)
    rows = _evenly_over_both(text + image, ring, ulysses)
    images = _evenly_over_both(image, ring, ulysses)
    texts = [of_rank - of_image for of_rank, of_image in zip(rows, images, strict=True)]
    pieces = tuple(
        JointPiece(text=of_text, image=of_image)
        for of_text, of_image in zip(_consecutive(texts), _consecutive(images), strict=True)
    )
    return JointLayout(
        text=text,
        image=image,
        text_first=text_first,
        pieces=pieces,
        layout=_joint(text, image, pieces, ulysses, text_first),
        image_layout=_images_alone(image, pieces, ulysses),
    )


def _evenly_over_both(total: int, ring: int, ulysses: int) -> list[int]:
    """Tokens of every rank, as a schedule cuts them: evenly over the ring, then each over ulysses."""
    counts = []
    for start, stop in pairwise(split_evenly(total, ring)):
        cut = split_evenly(stop - start, ulysses)
        counts += [after - before for before, after in pairwise(cut)]
    return counts


def _consecutive(counts: list[int]) -> list[range]:
    """Pieces of these lengths, one after the other."""
    pieces = []
    start = 0
    for count in counts:
        pieces.append(range(start, start + count))
        start += count
    return pieces


def _joint(text: int, image: int, pieces: tuple[JointPiece, ...], ulysses: int, text_first: bool) -> Layout:
    text_at, image_at = (0, text) if text_first else (image, 0)
    ranks = []
    for first in range(0, len(pieces), ulysses):
        spans: list[Span] = []
        for piece in pieces[first : first + ulysses]:
            both = [_span(piece.text, text_at), _span(piece.image, image_at)]
            spans += both if text_first else both[::-1]
        ranks.append(tuple(spans))
    return Layout(text + image, tuple(ranks), "joint", "text and image tokens, near-equal on every rank")


def _images_alone(image: int, pieces: tuple[JointPiece, ...], ulysses: int) -> Layout:
    ranks = []
    for first in range(0, len(pieces), ulysses):
        own = [piece.image for piece in pieces[first : first + ulysses]]
        ranks.append((Span(own[0].start, own[-1].stop - own[0].start),))
    return Layout(image, tuple(ranks), "image", "the image tokens of a joint layout")


def _span(piece: range, offset: int) -> Span:
    return Span(offset + piece.start, len(piece))
