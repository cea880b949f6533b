"""Masks from what other code describes them by: cumulative offsets, position ids, padding.

    tokens              a a a a b b c c c
    cu_seqlens          0       4   6     9         flash-attn: where documents begin, and the end
    position_ids        0 1 2 3 0 1 0 1 2           Hugging Face: positions restart at each document
    attention_mask      0 0 1 1 1 1 1 1 1           Hugging Face: 0 is padding, here of two tokens on the left
    key_mask            1 1 0 1 1 1 0 0 1           encoders, diffusers: which tokens are seen, by all alike

All of them may be lists, NumPy arrays or tensors of whole numbers; they are read once, on the host. They say
less than a mask does, so what they leave open is refused rather than guessed.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import index
from typing import Any, Protocol

from seqmesh.masks.band import Band
from seqmesh.masks.mask import Mask, whole


class Array(Protocol):
    """A NumPy array or a tensor."""

    def tolist(self) -> Any:
        """Its numbers, as lists of lists."""


def from_cu_seqlens(
    cu_seqlens: Iterable[int] | Array, causal: bool = True, window: int | None = None
) -> Mask:
    """Packed documents, from the cumulative offsets that flash-attn's varlen functions take.

    Args:
        cu_seqlens: 0, then the end of each document: [0, 4, 6, 9] are documents of 4, 2 and 3 tokens.
        causal: within a document, token i sees tokens up to i (default) or the whole document.
        window: each token sees only tokens that are less than this many away, itself included:
            flash-attn's window_size=(window - 1, 0), or (window - 1, window - 1) if not causal.

    Raises:
        ValueError: offsets that are no list of whole numbers, do not begin with 0, or fall; window < 1.
    """
    offsets = _numbers(cu_seqlens, "cu_seqlens")
    if not offsets or offsets[0] != 0:
        got = f"begins with {offsets[0]}" if offsets else "is empty"
        raise ValueError(
            f"cu_seqlens {got}, but the first document begins at token 0; pass [0, end, end, ...]"
        )
    lo = 0 if causal else None
    hi = None
    if window is not None:
        hi = whole(window) - 1
        if hi < 0:
            raise ValueError(f"window={window}: a token sees at least itself; use window >= 1")
        lo = 0 if causal else -hi
    bands = []
    for at, (start, stop) in enumerate(pairwise(offsets)):
        if stop < start:
            raise ValueError(
                f"cu_seqlens falls from {start} to {stop} after document {at};"
                " pass offsets that add up (or the lengths to masks.documents)"
            )
        bands.append(Band(start, stop, start, stop, lo, hi))
    return Mask(offsets[-1], offsets[-1], tuple(bands))


def from_position_ids(position_ids: Iterable[int] | Array) -> Mask:
    """Packed causal documents, from positions that restart at 0 with each of them.

    Args:
        position_ids: s positions, or (b, s) of b equal rows.

    Raises:
        ValueError: a position that is neither 0 nor one more than the one before it: it may be a gap in a
            document, or the rest of a document whose beginning lies elsewhere. Rows that differ.
    """
    positions = _one_row(position_ids, "position_ids", "from_position_ids")
    starts = []
    for at, position in enumerate(positions):
        if position == 0:
            starts.append(at)
        elif at == 0 or position != positions[at - 1] + 1:
            after = f"after {positions[at - 1]}" if at else "at the beginning"
            raise ValueError(
                f"position_ids has {position} {after} (token {at}): it neither restarts at 0 nor goes on by"
                " 1, so where documents begin is open; say it by masks.from_cu_seqlens"
            )
    return from_cu_seqlens([0, *starts[1:], len(positions)])


def from_padding(attention_mask: Iterable[int] | Array, causal: bool = True) -> Mask:
    """One document between padding: real tokens see real tokens, padding sees nothing and nobody sees it.

    The output of a padding token is 0.

    Args:
        attention_mask: 1 for the real tokens, 0 for padding on the left or right: s numbers or truth values,
            or (b, s) of b equal rows.
        causal: a real token sees those up to itself (default), or all of them.

    Raises:
        ValueError: other numbers, padding between real tokens, or rows that differ.
    """
    real = _one_row(attention_mask, "attention_mask", "from_padding")
    _check_zeros_and_ones(
        real,
        "attention_mask",
        "1 is a real token and 0 is padding; pass those, or document offsets to masks.from_cu_seqlens",
    )
    count = sum(real)
    start = real.index(1) if count else 0
    stop = start + count
    if sum(real[start:stop]) != count:
        hole = real.index(0, start)
        raise ValueError(
            f"attention_mask has padding at token {hole} between real tokens, so positions would skip it;"
            " pad on the left or on the right"
        )
    return Mask(len(real), len(real), (Band(start, stop, start, stop, 0 if causal else None),))


def from_key_mask(key_mask: Iterable[int] | Array) -> Mask:
    """Every token sees the tokens whose number is 1: the key-padding mask of encoders, holes allowed.

    Padding tokens see what the others see, as with a mask that is broadcast over queries.

    Args:
        key_mask: 1 or True for tokens that are seen, 0 or False for the others: s of them.

    Raises:
        ValueError: other numbers, or more than one row.
    """
    seen = _numbers(key_mask, "key_mask")
    _check_zeros_and_ones(seen, "key_mask", "1 is a token that is seen and 0 one that is not; pass those")
    s = len(seen)
    edges = [at for at in range(s + 1) if (at > 0 and seen[at - 1] == 1) != (at < s and seen[at] == 1)]
    bands = [Band(0, s, start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    return Mask(s, s, tuple(bands))


def _check_zeros_and_ones(numbers: list[int], what: str, rule: str) -> None:
    for at, number in enumerate(numbers):
        if number not in (0, 1):
            raise ValueError(f"{what} has {number} at token {at}, but {rule}")


def _one_row(given: Iterable[int] | Array, what: str, function: str) -> list[int]:
    """The one row that s numbers or (b, s) of equal rows stand for.

    Attention shares its mask among the sequences of a batch, so rows that differ have no mask in common.
    """
    rows = _plain(given, what)
    if not rows or not isinstance(rows[0], Sequence):
        return _numbers(rows, what)
    row = _numbers(rows[0], what)
    for at, other in enumerate(rows):
        if _numbers(other, what) != row:
            raise ValueError(
                f"{what} has {len(rows)} rows, and row {at} differs from row 0, but one mask is for all rows"
                f" of a batch; use masks.rows(map(masks.{function}, {what})) and lay the rows end to end"
            )
    return row


def _numbers(given: object, what: str) -> list[int]:
    """Whole numbers in one dimension."""
    numbers = _plain(given, what)
    try:
        return list(map(index, numbers))
    except TypeError:
        raise ValueError(
            f"{what} is not one row of whole numbers: {str(numbers)[:60]};"
            " pass a list, or a 1-D integer array"
        ) from None


def _plain(given: Any, what: str) -> list[Any]:
    """A list of whatever the outermost dimension holds, of which arrays have become lists."""
    plain = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(plain, Iterable) or isinstance(plain, str | bytes):
        raise ValueError(f"{what} is {plain!r}; pass a list, or an integer array")
    if plain is not given:  # an array: numbers all the way down
        return list(plain)
    return [item.tolist() if hasattr(item, "tolist") else item for item in plain]
