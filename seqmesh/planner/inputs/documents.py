"""Lengths of the documents that fill a sequence, from `--documents`.

lognormal:7,1.3     drawn, with one seed: the same lengths every time
fixed:8192          all alike
4096,1024           repeated as needed; or a file of numbers
"""

import math
import random
from collections.abc import Iterable, Iterator
from itertools import cycle, repeat
from pathlib import Path

from seqmesh.planner.inputs.units import parse_tokens

MOST_DOCUMENTS = 20_000
"""Of a sequence: more take too long to lay out."""
MOST_DRAWN = 1_000_000
"""Of a step."""

_MOST_DIGITS = 18
"""Digits of a length that are read: more would be a slip, and int() of very many is slow."""


def parse_documents(text: str, seq_len: int, *, sequences: int = 1, seed: int = 0) -> tuple[int, ...]:
    """Lengths that fill the sequences of a step; the last document is cut where the last sequence ends.

    Raises:
        ValueError: another form, a length below 1, or more than MOST_DOCUMENTS documents in a
            sequence, or MOST_DRAWN in all.
    """
    tokens = seq_len * sequences
    most = min(MOST_DRAWN, MOST_DOCUMENTS * sequences)
    kind, colon, rest = text.partition(":")
    if colon and kind == "lognormal":
        mu, sigma = _two_numbers(text, rest)
        return fill(tokens, _lognormal(mu, sigma, seed), text, most)
    if colon and kind == "fixed":
        return fill(tokens, repeat(parse_tokens(rest)), text, most)
    return fill(tokens, cycle(_lengths(text)), text, most)


def _lognormal(mu: float, sigma: float, seed: int) -> Iterator[int]:
    draw = random.Random(seed)
    while True:
        logarithm = min(draw.gauss(mu, sigma), 50.0)  # exp of much more would overflow
        yield max(1, round(math.exp(logarithm)))


def _two_numbers(text: str, rest: str) -> tuple[float, float]:
    try:
        mu, sigma = (float(part) for part in rest.split(","))
    except ValueError:
        raise ValueError(
            f"--documents {text!r}: lognormal takes two numbers; write for example lognormal:7,1.3"
        ) from None
    if not (math.isfinite(mu) and math.isfinite(sigma) and sigma >= 0 and abs(mu) < 50):
        raise ValueError(
            f"--documents {text!r}: μ and σ of log-lengths must be finite and σ >= 0;"
            " write for example lognormal:7,1.3"
        )
    return mu, sigma


def _lengths(text: str) -> list[int]:
    """The numbers in `text`, or in the file that it names."""
    source = text
    if Path(text).is_file():
        try:
            source = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--documents {text!r} cannot be read as text: {error}; give a file of numbers"
            ) from None
    parts = source.replace(",", " ").split()
    if not parts or not all(_is_length(part) for part in parts):
        forms = "lognormal:MU,SIGMA, fixed:LENGTH, lengths such as 4096,1024, or a file of lengths"
        raise ValueError(f"--documents {text!r} is none of: {forms}; write one of these")
    return [int(part[:_MOST_DIGITS]) for part in parts]


def _is_length(part: str) -> bool:
    return part.isascii() and part.isdigit() and int(part[:_MOST_DIGITS]) > 0


def fill(tokens: int, lengths: Iterable[int], text: str, most: int = MOST_DOCUMENTS) -> tuple[int, ...]:
    """Documents of these lengths, in order, until they hold so many tokens; the last is cut.

    Raises:
        ValueError: that takes more than `most`; `text` is how the user gave them.
    """
    documents: list[int] = []
    left = tokens
    for length in lengths:
        documents.append(min(length, left))
        left -= documents[-1]
        if not left:
            return tuple(documents)
        if len(documents) > most:
            break
    raise ValueError(f"--documents {text!r} gives more than {most} documents; use longer ones")
