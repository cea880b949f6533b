"""Text to training batches: source -> documents -> packed sequences, as bytes all the way to the tensor.

    source      "stdlib" (the Python standard library's .py files), a text file, or a folder of text files
    documents   one per file, in sorted order, shuffled by seed and epoch
    sequences   the documents' tokens end to end, cut every `seq_len` tokens; nothing is padded; shuffled once
                more, so that the parts of a very long document do not follow each other

       document A        B    C                    D
    |a a a a a a a a $|b b $|c c c c c c c c c c c $|d ...        $ = end of document
    |-- sequence 0 --------|-- sequence 1 ---------|-- ...        C is cut: its rest is a document of its own

Every sequence knows its document lengths, so its mask is `masks.documents(lengths)`: documents never attend
to each other. Labels are shifted here, inside each document and before any sharding: a rank's last token has
its label on the next rank, and shifting after sharding would lose it. Position ids restart at each document.

Tokens are bytes: id = byte + 3, end of document = 1, as in ByT5 (Xue et al. 2022), whose tokenizer is exact
but slow in Python.

Trade-off: the whole text is held in memory, which is right for files up to a few GB.
"""

import os
import platform
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, count
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from seqmesh import masks
from seqmesh.parallel.packing import IGNORED_LABEL, PackedTokens
from seqmesh.train.fingerprint import fingerprint

STDLIB = "stdlib"
"""Name of the default source."""
EOS_ID = 1
BYTE_OFFSET = 3
"""Ids 0, 1 and 2 are padding, end of document and unknown, as in ByT5."""
VOCAB_SIZE = BYTE_OFFSET + 256
_STDLIB_SKIPS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
"""Folders that are not part of the default text: installed packages and tests.

Tests hold deliberately broken files.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Documents of one source, in sorted order, none of them empty."""

    source: str
    """Where the text came from, for reports."""
    documents: tuple[bytes, ...]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document: its bytes and the end of document."""
        return tuple(len(document) + 1 for document in self.documents)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(self.lengths)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal documents alone."""
        return fingerprint(self.documents)


class Piece(NamedTuple):
    """Tokens [start, stop) of a document: what one packed sequence holds of it."""

    document: int
    start: int
    stop: int


def read(source: str) -> Corpus:
    """The documents of a source.

    Args:
        source: "stdlib", the path of a text file, or of a folder whose files (hidden ones and __pycache__
            apart) are all text.

    Raises:
        ValueError: the path is missing, unreadable, empty, or not UTF-8 text.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [path for path in _files(root, _STDLIB_SKIPS) if path.suffix == ".py"]
        source = f"standard library of Python {platform.python_version()}"
    else:
        paths = _user_files(source)
    documents = tuple(text for text in map(_read_text, paths) if text)
    if not documents:
        raise ValueError(
            f"data path {source!r} has no text: {len(paths)} files, all empty;"
            " point data.path at a file or folder with text"
        )
    return Corpus(source=source, documents=documents)


def _user_files(source: str) -> list[Path]:
    """The file that a path names, or those of the folder that it names."""
    try:
        path = Path(source).expanduser()
        mode = path.stat().st_mode
    except RuntimeError:  # of expanduser
        raise ValueError(
            f"data path {source!r} names a home folder that does not exist; write data.path in full"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"data path {source!r} does not exist; pass a text file, a folder of text files, or {STDLIB!r}"
        ) from None
    except OSError as error:
        raise _unreadable(error, source) from None
    if not stat.S_ISDIR(mode):
        return [path]
    paths = [file for file in _files(path, frozenset({"__pycache__"})) if not file.name.startswith(".")]
    if not paths:
        raise ValueError(
            f"data path {str(path)!r} is a folder without files; point data.path at text, or use {STDLIB!r}"
        )
    return paths


def _unreadable(error: OSError, path: str | Path) -> ValueError:
    return ValueError(
        f"cannot read {str(path)!r}: {error.strerror}; fix its permissions or choose another data.path"
    )


def _files(root: Path, skipped: frozenset[str]) -> list[Path]:
    """Regular files below `root` in sorted order, without skipped and hidden folders.

    A folder that cannot be read is an error.
    """

    def refuse(error: OSError) -> None:
        raise _unreadable(error, error.filename)

    found: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        # os.walk goes on into what this list holds, in its order: an order of our own, for all file systems.
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if _is_regular(path):
                found.append(path)
    return found


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:  # a dangling link
        return False
    except OSError as error:
        raise _unreadable(error, path) from None


def _read_text(path: Path) -> bytes:
    """A file's bytes, checked to be text.

    Byte tokens would accept anything, and a model trained on an archive learns nothing.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise _unreadable(error, path) from None
    remedy = "remove it, convert it to UTF-8, or point data.path elsewhere"
    if b"\0" in text:
        raise ValueError(
            f"{str(path)!r} is binary (byte {text.index(0)} is NUL), training needs text; {remedy}"
        )
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8 text (byte {error.start} is 0x{text[error.start]:02x}); {remedy}"
        ) from None
    return text


def encode(document: bytes) -> Tensor:
    """Tokens of a document without its end: (len,) int64.

    Equals ByT5Tokenizer on text that spells out no special token.
    """
    if not document:
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(bytearray(document), dtype=torch.uint8).to(torch.int64) + BYTE_OFFSET


def decode(tokens: Tensor) -> str:
    """Text of (n,) tokens, without special tokens.

    A character cut in half becomes the replacement character.
    """
    text = bytes(token - BYTE_OFFSET for token in tokens.tolist() if BYTE_OFFSET <= token < VOCAB_SIZE)
    return text.decode("utf-8", errors="replace")


def pack(lengths: tuple[int, ...], seq_len: int, seed: int, epoch: int) -> Iterator[tuple[Piece, ...]]:
    """The sequences of one epoch as pieces of documents; the order depends on nothing but the arguments.

    The last tokens of the epoch that do not fill a sequence are left out; another epoch's order leaves out
    others.

    Args:
        lengths: tokens of each document.
        seq_len: tokens of each sequence.
        seed: shuffles the documents, together with `epoch`.
        epoch: 0, 1, ...
    """
    order = list(range(len(lengths)))
    Random(f"{seed}/{epoch}").shuffle(order)
    pieces: list[Piece] = []
    room = seq_len
    for document in order:
        start = 0
        length = lengths[document]
        while length - start >= room:
            pieces.append(Piece(document, start, start + room))
            yield tuple(pieces)
            start += room
            pieces = []
            room = seq_len
        if start < length:
            pieces.append(Piece(document, start, length))
            room -= length - start


def micro_batches(
    corpus: Corpus, *, seq_len: int, sequences: int, seed: int, skip: int = 0
) -> Iterator[tuple[Piece, ...]]:
    """Micro-batches without end, epoch after epoch, as pieces of documents: the same on every rank.

    A piece is a document of its own. `assemble` makes tokens of those that a rank computes.

    Args:
        corpus: the documents.
        seq_len: tokens of each packed sequence, at least 3 (so that every sequence has a label).
        sequences: packed sequences in a micro-batch, laid end to end: documents keep sequences apart just as
            they keep themselves apart.
        seed: shuffles the documents.
        skip: packed sequences at the beginning that are left out: those that a run has consumed already. An
            epoch that is left out whole costs nothing.

    Raises:
        ValueError: seq_len or sequences out of range, or less text than one sequence.
    """
    if seq_len < 3 or sequences < 1:
        raise ValueError(
            f"seq_len={seq_len}, sequences={sequences}: use seq_len >= 3 and at least one sequence"
        )
    if corpus.tokens < seq_len:
        raise ValueError(
            f"{corpus.source!r} has {corpus.tokens} tokens, too few for one sequence of {seq_len};"
            f" use more text or data.seq_len <= {corpus.tokens}"
        )
    return _endless(corpus, seq_len, sequences, seed, skip)


def _endless(
    corpus: Corpus, seq_len: int, sequences: int, seed: int, skip: int
) -> Iterator[tuple[Piece, ...]]:
    skipped_epochs, skipped = divmod(skip, corpus.tokens // seq_len)  # every epoch has as many sequences
    pieces: list[Piece] = []
    held = 0  # sequences in `pieces`; a micro-batch may begin in one epoch and end in the next
    for epoch in count(skipped_epochs):
        packed = list(pack(corpus.lengths, seq_len, seed, epoch))
        Random(f"{seed}/{epoch}/sequences").shuffle(packed)
        for sequence in packed[skipped if epoch == skipped_epochs else 0 :]:
            pieces += sequence
            held += 1
            if held == sequences:
                yield tuple(pieces)
                pieces = []
                held = 0


def assemble(corpus: Corpus, pieces: Sequence[Piece]) -> PackedTokens:
    """The tokens of a micro-batch in one row, the same on every rank that shares it."""
    lengths = [piece.stop - piece.start for piece in pieces]
    ids = torch.cat([_piece_tokens(corpus, piece) for piece in pieces])
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[:-1] = ids[1:]
    # The last token of each document: shifting gave it the first token of the next one.
    labels[torch.tensor(list(accumulate(lengths))) - 1] = IGNORED_LABEL
    positions = torch.cat([torch.arange(length) for length in lengths])
    return PackedTokens(
        input_ids=ids[None],
        shift_labels=labels[None],
        position_ids=positions[None],
        mask=masks.documents(lengths),
    )


def _piece_tokens(corpus: Corpus, piece: Piece) -> Tensor:
    document = corpus.documents[piece.document]
    tokens = encode(document[piece.start : piece.stop])
    if piece.stop <= len(document):
        return tokens
    # A document's last token, its end, is no byte of it.
    return torch.cat((tokens, torch.tensor([EOS_ID])))
