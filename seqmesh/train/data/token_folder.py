"""Tokens of a source that were made once and are kept in a folder, for all ranks and later runs.

    tokens.bin     the stored tokens of all documents, end to end, as wide as the vocabulary needs
    stops.bin      (documents,) int64: where each ends
    index.json     fingerprint, sizes, and where the text came from; written last

The folder's name is a key of all that its contents depend on: the files by path, size and time, the column,
the tokenizer. One process makes it, aside and under a lock, and renames it; others that want it wait for the
lock. What was killed on the way is made anew.

This is the indexed dataset of Megatron-LM without its document index.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from seqmesh.train.data.corpus import Contents, Document, FileSlice
from seqmesh.train.data.tokens import TokenIds
from seqmesh.train.fingerprint import Fingerprint

TOKENS = "tokens.bin"
_STOPS = "stops.bin"
_INDEX = "index.json"


@dataclass(frozen=True, kw_only=True)
class _Index:
    """What index.json says."""

    source: str
    documents: int
    tokens: int
    fingerprint: str


class KeptDocuments(Sequence[Document]):
    """Documents of a token folder."""

    def __init__(self, tokens: Path, stops: NDArray[np.int64], width: int) -> None:
        self._tokens = tokens
        self._stops = stops
        self._width = width

    def __len__(self) -> int:
        return len(self._stops)

    @overload
    def __getitem__(self, number: int) -> Document: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Document]: ...

    def __getitem__(self, number: int | slice) -> Document | Sequence[Document]:
        assert isinstance(number, int)
        start = int(self._stops[number - 1]) if number else 0
        count = int(self._stops[number]) - start
        return FileSlice(path=self._tokens, start=start, count=count, width=self._width)


def kept(
    home: Path, key: str, vocabulary: TokenIds, source: str, documents: Iterable[bytes], seed: str
) -> tuple[KeptDocuments, Contents]:
    """The folder of a key, made from documents if it is not there.

    Args:
        home: of all such folders.
        key: the folder's name.
        vocabulary: of the tokens.
        source: where they come from.
        documents: stored tokens of each document; read only if the folder is to be made. Empty ones are left
            out.
        seed: fingerprint of the tokenizer, a part of the fingerprint of the text.

    Raises:
        ValueError: a folder that cannot be written or is damaged, or what reading the documents raises.
    """
    folder = home / key
    try:
        with _locked(home, key):
            if not folder.is_dir():
                _make(folder, vocabulary, source, documents, seed)
    except OSError as error:
        raise ValueError(
            f"cannot keep tokens in {str(folder)!r}: {error.strerror}; name another folder with data.cache"
        ) from None
    return _open(folder, vocabulary)


@contextmanager
def _locked(home: Path, key: str) -> Iterator[None]:
    """One process at a time; the lock of one that dies is free."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(folder: Path, vocabulary: TokenIds, source: str, documents: Iterable[bytes], seed: str) -> None:
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir()
    try:
        with (unfinished / TOKENS).open("wb") as tokens, (unfinished / _STOPS).open("wb") as stops:
            index = _write(tokens, stops, vocabulary, source, documents, seed)
            for file in (tokens, stops):
                file.flush()
                os.fsync(file.fileno())
        (unfinished / _INDEX).write_text(json.dumps(asdict(index), indent=1) + "\n", encoding="utf-8")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(
    tokens: BinaryIO,
    stops: BinaryIO,
    vocabulary: TokenIds,
    source: str,
    documents: Iterable[bytes],
    seed: str,
) -> _Index:
    marks = Fingerprint()
    if seed:
        marks.part(seed.encode())
    width = vocabulary.width
    count = 0
    stop = 0
    for document in documents:
        if document:
            marks.part(document)
            tokens.write(document)
            count += 1
            stop += len(document) // width
            stops.write(stop.to_bytes(8, "little"))
    return _Index(source=source, documents=count, tokens=stop, fingerprint=marks.hexdigest())


def _open(folder: Path, vocabulary: TokenIds) -> tuple[KeptDocuments, Contents]:
    width = vocabulary.width
    try:
        index = _Index(**json.loads((folder / _INDEX).read_text(encoding="utf-8")))
        sizes = ((folder / TOKENS).stat().st_size, (folder / _STOPS).stat().st_size)
        is_whole = sizes == (index.tokens * width, index.documents * 8)
        stops = np.fromfile(folder / _STOPS, "<i8") if is_whole else np.empty(0, np.int64)
    except (OSError, ValueError, TypeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{str(folder)!r} does not hold what was written there; remove it to make it anew")
    lengths = np.diff(stops, prepend=0)
    return (
        KeptDocuments(folder / TOKENS, stops, width),
        Contents(lengths=lengths, fingerprint=index.fingerprint),
    )
