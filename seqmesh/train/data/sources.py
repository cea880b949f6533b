"""What a path names, and the corpus that it makes.

    "stdlib", text files                         with bytes: read where they lie    (text_files.py)
    JSON lines, parquet, `datasets`   (rows.py)  --  tokenizer  -->  kept tokens    (token_folder.py)
    text files with a tokenizer                  --  tokenizer  -->

A folder holds files of one kind, by their names.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from seqmesh.train.data.corpus import Corpus
from seqmesh.train.data.rows import JsonLines, Parquet, SavedDataset
from seqmesh.train.data.text_files import STDLIB, TextFiles, files_below, stdlib, unreadable
from seqmesh.train.data.token_folder import kept
from seqmesh.train.data.tokenizer import Tokenizer, tokenizer_of
from seqmesh.train.fingerprint import fingerprint
from seqmesh.train.paths import expanded

FIELD = "text"
"""The default column."""
_FORMAT = "1"
"""Of token folders: another one makes other keys."""
_BATCH_CHARACTERS = 1 << 20
"""Text that goes through the tokenizer at once: enough for all cores, little beside memory."""
_JSON_LINES = "JSON lines"
_PARQUET = "parquet"
_SAVED_DATASET = ("state.json", "dataset_info.json")
_SAVED_SPLITS = "dataset_dict.json"


class Source(Protocol):
    """Documents as text, read one after the other."""

    @property
    def name(self) -> str:
        """Where they are, for reports."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """All that is read."""
        ...

    def texts(self) -> Iterator[str]:
        """Every document, in an order that files and rows have."""
        ...


def read(path: str, *, field: str = FIELD, tokenizer: str = "", cache: str = "") -> Corpus:
    """The documents of a source, as tokens that lie on disk.

    Args:
        path: "stdlib", or a file or folder: text, JSON lines, parquet, or what `datasets` saved. In a folder,
            hidden files and __pycache__ are left out.
        field: the column with the text, where there are columns.
        tokenizer: the folder of a Hugging Face tokenizer; empty: bytes.
        cache: where tokens are kept that had to be made; empty: seqmesh/tokens in the user's cache folder.

    Raises:
        ValueError: in one line: what is missing, unreadable, empty or of another kind, or an argument that
            such a source has no use for.
    """
    encoder = tokenizer_of(tokenizer)
    source = stdlib() if path == STDLIB else _named(path, field)
    if isinstance(source, TextFiles):
        _refuse(field != FIELD, f"data.field={field!r}", f"{path!r} is text, without columns")
        if not tokenizer:
            _refuse(cache != "", f"data.cache={cache!r}", f"{path!r} is text, whose bytes are used in place")
            return _with_text(source.bytes_in_place(), source)
    documents, contents = kept(
        _cache_home(cache),
        _key(source, field, encoder),
        encoder.vocabulary,
        source.name,
        _encoded(source.texts(), encoder),
        encoder.fingerprint,
    )
    corpus = Corpus(source=source.name, documents=documents, vocabulary=encoder.vocabulary, contents=contents)
    return _with_text(corpus, source)


def _refuse(mistake: bool, setting: str, reason: str) -> None:
    if mistake:
        raise ValueError(f"{setting}, but {reason}; leave it out")


def _with_text(corpus: Corpus, source: Source) -> Corpus:
    if not corpus.documents:
        raise ValueError(
            f"data path {source.name!r} has no text: {len(source.files)} files, all empty;"
            " point data.path at a file or folder with text"
        )
    return corpus


def _cache_home(cache: str) -> Path:
    if cache:
        return expanded(cache, "data.cache=", "data.cache")
    home = os.environ.get("XDG_CACHE_HOME") or expanded("~/.cache", "", "data.cache")
    return Path(home) / "seqmesh" / "tokens"


def _key(source: Source, field: str, tokenizer: Tokenizer) -> str:
    """All that the tokens depend on; files by what changes when they do, without reading them."""
    parts = [_FORMAT, field, tokenizer.fingerprint]
    for path in source.files:
        found = path.stat()
        parts += [str(path.absolute()), str(found.st_size), str(found.st_mtime_ns)]
    return fingerprint(part.encode() for part in parts)[:32]


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[bytes]:
    """Tokens of each text, a batch of texts at a time."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= _BATCH_CHARACTERS:
            yield from tokenizer.encode(batch)
            batch = []
            held = 0
    if batch:
        yield from tokenizer.encode(batch)


def _named(source: str, field: str) -> Source:
    """What a path names: a file, or a folder of files of one kind."""
    path = expanded(source, "data path ", "data.path")
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"data path {source!r} does not exist; pass a text file, a folder of text files, JSON lines,"
            f" parquet, or {STDLIB!r}"
        ) from None
    except OSError as error:
        raise unreadable(error, source) from None
    if stat.S_ISREG(mode):
        return _of_one_kind(source, [path], field)
    if not stat.S_ISDIR(mode):
        raise ValueError(
            f"data path {source!r} is neither file nor folder, and the text is read more than once; save it"
            " to a file"
        )
    return _of_folder(source, path, field)


def _of_folder(source: str, path: Path, field: str) -> Source:
    paths = [file for file in files_below(path, frozenset({"__pycache__"})) if not file.name.startswith(".")]
    if not paths:
        raise ValueError(
            f"data path {str(path)!r} is a folder without files; point data.path at text, or use {STDLIB!r}"
        )
    if (path / _SAVED_SPLITS).exists():
        splits = sorted(child.name for child in path.iterdir() if child.is_dir())
        raise ValueError(
            f"data path {source!r} holds several data sets; point data.path at one of its folders:"
            f" {', '.join(splits)}"
        )
    if all((path / name).exists() for name in _SAVED_DATASET):
        return SavedDataset(name=str(path), files=paths, field=field)
    return _of_one_kind(source, paths, field)


def _of_one_kind(source: str, paths: Sequence[Path], field: str) -> Source:
    kinds = {_kind_of(path): path for path in reversed(paths)}
    if len(kinds) > 1:
        (one, first), (other, second), *_ = kinds.items()
        raise ValueError(
            f"data path {source!r} mixes {one} ({first.name}) and {other} ({second.name}); point data.path at"
            " files of one kind"
        )
    (kind,) = kinds
    if kind == _JSON_LINES:
        return JsonLines(name=source, files=paths, field=field)
    if kind == _PARQUET:
        return Parquet(name=source, files=paths, field=field)
    return TextFiles(name=source, files=paths)


def _kind_of(path: Path) -> str:
    name = path.name.lower()
    if name.endswith((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")):
        return _JSON_LINES
    return _PARQUET if name.endswith(".parquet") else "text"
