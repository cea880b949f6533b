"""[data]: the text and how it is packed."""

from dataclasses import dataclass
from typing import Any, ClassVar

from seqmesh.train.config.rules import STRICT, at_least, require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text and how it is packed (data.py)."""

    path: str = "stdlib"
    """A text file, a folder of text files, or "stdlib": the source of this Python's standard library."""
    seq_len: int = 8192
    """Tokens (bytes) of a packed sequence."""
    sequences: int = 1
    """Packed sequences in a step, over all ranks."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    def __post_init__(self) -> None:
        at_least("data", self, seq_len=16, sequences=1)
        require(
            "\0" not in self.path,
            f"data.path={self.path!r} has a NUL character, which no path may have; remove it",
        )
        require(
            self.path != "",
            'data.path="" is empty; give a text file, a folder of text files, or "stdlib"',
        )

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.seq_len * self.sequences
