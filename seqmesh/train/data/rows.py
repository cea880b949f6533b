"""Sources whose documents are rows of a table: JSON lines, parquet, a folder of `datasets.save_to_disk`.

Each is read row after row, once: its tokens are then kept (token_folder.py). A row's document is the text of
one column, `data.field`.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqmesh.train.data.text_files import unreadable

_BATCH_ROWS = 64
"""Rows that are in memory at once."""
_INSTALL = "install it with: pip install 'seqmesh[data]'"


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """Files with a JSON object on every line, maybe compressed with gzip."""

    name: str
    files: Sequence[Path]
    field: str

    def texts(self) -> Iterator[str]:
        """The documents.

        Raises:
            ValueError: a file that cannot be read, or the first line that is no object with such a text.
        """
        for path in self.files:
            for number, line in enumerate(_lines(path), start=1):
                if line.strip():
                    yield _text_of(_parsed(line, path, number), self.field, f"line {number} of {str(path)!r}")


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{str(path)!r} is not what gzip wrote ({error}); compress it again, or give it without .gz"
        ) from None
    except OSError as error:
        raise unreadable(error, path) from None


def _parsed(line: bytes, path: Path, number: int) -> dict[str, Any]:
    where = f"line {number} of {str(path)!r}"
    remedy = 'write one object on each line, such as {"text": "..."}'
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); {remedy}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {type(row).__name__}, no object; {remedy}")
    return row


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise ValueError(_no_column(where, field, row))
    text = _checked(row[field], field, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is no character.
        raise ValueError(
            f"{where}: {field!r} has {text[error.start]!a}, half a character; write the whole one, or U+FFFD"
        ) from None
    return text


def _checked(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {field!r} is {type(value).__name__}, training needs text; leave the row out, or name"
            " another column with data.field"
        )
    return value


def _no_column(where: str, field: str, columns: Iterable[str]) -> str:
    known = ", ".join(columns) or "none"
    return f"{where} has no column {field!r}, its columns: {known}; name one with data.field"


@dataclass(frozen=True, kw_only=True)
class Parquet:
    """Parquet files."""

    name: str
    files: Sequence[Path]
    field: str

    def texts(self) -> Iterator[str]:
        """The documents.

        Raises:
            ValueError: no pyarrow, a file that is no parquet, or one without such a column of text.
        """
        for path in self.files:
            for number, value in enumerate(_column(path, self.field), start=1):
                yield _checked(value, self.field, f"row {number} of {str(path)!r}")


def _column(path: Path, field: str) -> Iterator[object]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{str(path)!r} needs pyarrow, which is not here; {_INSTALL}") from None
    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise ValueError(_no_column(repr(str(path)), field, columns))
            for batch in file.iter_batches(_BATCH_ROWS, columns=[field]):
                yield from batch.column(0).to_pylist()
    except ArrowException as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{str(path)!r} is not parquet ({reason}); write it again, or point data.path elsewhere"
        ) from None
    except OSError as error:
        if error.strerror is None:  # Arrow's, of a damaged page
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{str(path)!r} is damaged ({reason}); write it again") from None
        raise unreadable(error, path) from None


@dataclass(frozen=True, kw_only=True)
class SavedDataset:
    """A folder of `datasets.Dataset.save_to_disk`."""

    name: str
    files: Sequence[Path]
    """All that lie in it, by which it is known again."""
    field: str

    def texts(self) -> Iterator[str]:
        """The documents.

        Raises:
            ValueError: no `datasets`, a folder that it cannot load, or no such column of text.
        """
        rows = self._load()
        if self.field not in rows.column_names:
            raise ValueError(_no_column(repr(self.name), self.field, rows.column_names))
        number = 0
        for batch in rows.select_columns([self.field]).iter(_BATCH_ROWS):
            for value in batch[self.field]:
                number += 1
                yield _checked(value, self.field, f"row {number} of {self.name!r}")

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise ValueError(f"{self.name!r} needs datasets, which is not here; {_INSTALL}") from None
        try:
            return datasets.load_from_disk(self.name)
        # Whatever is wrong in its files, each reader below has exceptions of its own.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{self.name!r} cannot be loaded by datasets ({reason}); save it again with save_to_disk"
            ) from None
