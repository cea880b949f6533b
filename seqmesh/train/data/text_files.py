"""Text files, one document each: found in sorted order, checked to be text, and used where they lie.

With byte tokens nothing is copied: the bytes of a file are its tokens. One pass checks them and takes their
fingerprint, a chunk at a time, so a file may be larger than memory.
"""

import codecs
import os
import platform
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqmesh.train.data.corpus import Contents, Corpus, FileSlice
from seqmesh.train.fingerprint import Fingerprint

STDLIB = "stdlib"
"""Name of the default source."""
_STDLIB_SKIPS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
"""Folders that are not part of the default text: installed packages and tests.

Tests hold deliberately broken files.
"""
_CHUNK_BYTES = 1 << 24
_REMEDY = "remove it, convert it to UTF-8, or point data.path elsewhere"


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Files of text."""

    name: str
    """Where they are, for reports."""
    files: Sequence[Path]

    def texts(self) -> Iterator[str]:
        """The text of each that has some.

        Raises:
            ValueError: one that is unreadable, or not UTF-8 text.
        """
        for path in self.files:
            text = "".join(_checked_text(path))
            if text:
                yield text

    def bytes_in_place(self) -> Corpus:
        """Those that have text, as byte tokens that stay where they are.

        Raises:
            ValueError: one that is unreadable, or not UTF-8 text.
        """
        marks = Fingerprint()
        found: list[FileSlice] = []
        for path in self.files:
            size = _size_of(path)
            if size:
                _add_all(path, size, marks)
                found.append(FileSlice(path=path, start=0, count=size, width=1))
        contents = Contents(
            lengths=np.array([len(document) for document in found], np.int64), fingerprint=marks.hexdigest()
        )
        return Corpus(source=self.name, documents=found, contents=contents)


def _add_all(path: Path, size: int, marks: Fingerprint) -> None:
    """A file's bytes, checked to be text."""
    marks.begin(size)
    left = size
    for text in _checked_text(path):
        data = text.encode()
        marks.add(data)
        left -= len(data)
    if left:
        raise ValueError(f"{str(path)!r} changed while it was read; start again when it is complete")


def stdlib() -> TextFiles:
    """The .py files of this Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in files_below(root, _STDLIB_SKIPS) if path.suffix == ".py"]
    return TextFiles(name=f"standard library of Python {platform.python_version()}", files=paths)


def unreadable(error: OSError, path: str | Path) -> ValueError:
    """What to say of a file that cannot be read."""
    return ValueError(
        f"cannot read {str(path)!r}: {error.strerror}; fix its permissions or choose another data.path"
    )


def files_below(root: Path, skipped: frozenset[str]) -> list[Path]:
    """Regular files below `root` in sorted order, without skipped and hidden folders.

    A folder that cannot be read is an error.
    """

    def refuse(error: OSError) -> None:
        raise unreadable(error, error.filename)

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
        raise unreadable(error, path) from None


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(error, path) from None


def _checked_text(path: Path) -> Iterator[str]:
    """A file's text in chunks, checked.

    Byte tokens would accept anything, and a model trained on an archive learns nothing.
    """
    try:
        with path.open("rb") as file:
            yield from _decoded(path, iter(lambda: file.read(_CHUNK_BYTES), b""))
    except OSError as error:
        raise unreadable(error, path) from None


def _decoded(path: Path, chunks: Iterator[bytes]) -> Iterator[str]:
    start = 0  # of `data` in the file
    data = b""
    for chunk in chunks:
        data += chunk
        if b"\0" in data:
            raise ValueError(
                f"{str(path)!r} is binary (byte {start + data.index(0)} is NUL), training needs text;"
                f" {_REMEDY}"
            )
        text, used = _decode(path, start, data, is_last=False)
        yield text
        # A character that the chunk cuts waits for the next one.
        data = data[used:]
        start += used
    yield _decode(path, start, data, is_last=True)[0]


def _decode(path: Path, start: int, data: bytes, *, is_last: bool) -> tuple[str, int]:
    """The text, and how many bytes it is."""
    try:
        return codecs.utf_8_decode(data, "strict", is_last)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8 text"
            f" (byte {start + error.start} is 0x{data[error.start]:02x}); {_REMEDY}"
        ) from None
