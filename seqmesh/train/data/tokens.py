"""Token ids and how they are stored: bytes by default.

A byte token is byte + 3, end of document is 1, as in ByT5 (Xue et al. 2022), whose tokenizer is exact but
slow in Python. So a text file is a file of tokens already, and is read where it lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EOS_ID = 1
BYTE_OFFSET = 3
"""Ids 0, 1 and 2 are padding, end of document and unknown, as in ByT5."""
VOCAB_SIZE = BYTE_OFFSET + 256


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """The token ids of a text."""

    size: int
    """Ids are below it."""
    end: int
    """Ends every document."""
    padding: int | None = None
    """Never in a text; its embedding gets no gradient."""
    offset: int = 0
    """Of an id over the number that is stored for it."""
    width: int = 1
    """Bytes of a stored token, little-endian: 1, 2 or 4."""
    unit: str = "token"
    """What a token is, in reports."""

    def store(self, ids: Sequence[int]) -> bytes:
        """Tokens as they are stored."""
        return (np.array(ids, np.int64) - self.offset).astype(f"<u{self.width}").tobytes()

    def ids(self, stored: bytes) -> Tensor:
        """(n,) int64 of stored tokens."""
        return torch.from_numpy(np.frombuffer(stored, f"<u{self.width}").astype(np.int64)) + self.offset


def narrowest(size: int) -> int:
    """Bytes of a token of which there are so many."""
    return 1 if size <= 2**8 else 2 if size <= 2**16 else 4


BYTES = TokenIds(size=VOCAB_SIZE, end=EOS_ID, padding=0, offset=BYTE_OFFSET, unit="byte")
"""What is stored are the bytes themselves."""


def encode(document: bytes) -> Tensor:
    """Byte tokens of a document without its end: (len,) int64.

    Equals ByT5Tokenizer on text that spells out no special token.
    """
    return BYTES.ids(document)


def decode(tokens: Tensor) -> str:
    """Text of (n,) byte tokens, without special tokens.

    A character cut in half becomes the replacement character.
    """
    text = bytes(token - BYTE_OFFSET for token in tokens.tolist() if BYTE_OFFSET <= token < VOCAB_SIZE)
    return text.decode("utf-8", errors="replace")
