"""[data]: the text and how it is packed."""

from dataclasses import dataclass
from typing import Any, ClassVar

from seqmesh.train.config.rules import STRICT, at_least, require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text and how it is packed (train/data/)."""

    path: str = "stdlib"
    """A file or a folder of files of one kind: text, JSON lines (.jsonl), .parquet, or what a `datasets`
    data set saved; or "stdlib": the source of this Python's standard library."""
    field: str = "text"
    """The column with the text, where there are columns."""
    tokenizer: str = ""
    """Folder of a Hugging Face tokenizer; empty: tokens are bytes."""
    cache: str = ""
    """Folder where tokens that had to be made are kept, for later runs; empty: seqmesh/tokens in the user's
    cache folder. Bytes of text files are used in place."""
    seq_len: int = 8192
    """Tokens of a packed sequence."""
    sequences: int = 1
    """Packed sequences in a step, over all ranks."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    def __post_init__(self) -> None:
        at_least("data", self, seq_len=16, sequences=1)
        for name in ("path", "tokenizer", "cache"):
            path = getattr(self, name)
            require(
                "\0" not in path,
                f"data.{name}={path!r} has a NUL character, which no path may have; remove it",
            )
        require(
            self.path != "",
            'data.path="" is empty; give a text file, a folder of text files, or "stdlib"',
        )
        require(
            self.field != "",
            'data.field="" is empty; name the column with the text, such as "text"',
        )

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.seq_len * self.sequences
