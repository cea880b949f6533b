"""A text as documents of tokens: what all of packing, evening and training knows of it.

Corpus.lengths       tokens of every document: what all ranks know and plan with
Corpus.documents     the tokens themselves: bytes in memory, or slices of files that are read on use
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqmesh.train.data.tokens import BYTES, TokenIds
from seqmesh.train.fingerprint import fingerprint


class Document(Protocol):
    """The tokens of a document without its end, as its vocabulary stores them. `bytes` are one."""

    def __len__(self) -> int:
        """Stored tokens."""
        ...

    def __getitem__(self, tokens: slice, /) -> bytes:
        """A contiguous part, cut at the end as Python's slices are."""
        ...


class Piece(NamedTuple):
    """Tokens [start, stop) of a document, its end included: what one packed sequence holds of it."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Contents:
    """What reading all documents once has told of them."""

    lengths: NDArray[np.int64]
    """(documents,) stored tokens of each, its end not counted."""
    fingerprint: str
    """Equal for equal tokens alone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Documents of one source, in its order, none of them empty."""

    source: str
    """Where the text came from, for reports."""
    documents: Sequence[Document]
    vocabulary: TokenIds = BYTES
    contents: Contents | None = None
    """Where it is known before; default: found on use, by reading every document."""

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(documents,) tokens of each: those that are stored, and its end."""
        if self.contents is not None:
            return self.contents.lengths + 1
        return np.array([len(document) + 1 for document in self.documents], np.int64)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal tokens alone, whatever they were read from."""
        if self.contents is not None:
            return self.contents.fingerprint
        return fingerprint(document[:] for document in self.documents)

    def ids(self, piece: Piece) -> Tensor:
        """(stop - start,) int64 token ids. Reads nothing else."""
        document = self.documents[piece.document]
        tokens = self.vocabulary.ids(document[piece.start : piece.stop])
        if piece.stop <= len(document):
            return tokens
        # A document's last token, its end, is not stored.
        return torch.cat((tokens, torch.tensor([self.vocabulary.end])))


@dataclass(frozen=True, kw_only=True)
class FileSlice:
    """A document that lies in a file: opened, read and closed on use.

    No file stays open or mapped: memory does not grow with what was read, nor open files with the documents.
    """

    path: Path
    start: int
    """First token."""
    count: int
    """Tokens."""
    width: int
    """Bytes of a token."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, tokens: slice, /) -> bytes:
        start, stop, step = tokens.indices(self.count)
        assert step == 1
        wanted = max(0, stop - start) * self.width
        with self.path.open("rb") as file:
            file.seek((self.start + start) * self.width)
            found = file.read(wanted)
        if len(found) < wanted:
            raise ValueError(
                f"{str(self.path)!r} has become shorter since the run began; leave the text as it is, and"
                " start again"
            )
        return found
