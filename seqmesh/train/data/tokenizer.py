"""Text to tokens: bytes, or the tokenizer of a folder in Hugging Face's format. Nothing is downloaded.

A document is its text's tokens and the tokenizer's end of sequence; nothing is put before it. Text that
spells out a special token stays text: no document can end another one.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoTokenizer, ByT5Tokenizer

from seqmesh.train.data.tokens import BYTES, TokenIds, narrowest
from seqmesh.train.fingerprint import fingerprint


class Tokenizer(Protocol):
    """Makes tokens of texts."""

    @property
    def vocabulary(self) -> TokenIds:
        """Of its tokens."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that make the same tokens; empty for bytes, which there are only once."""
        ...

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Each text's tokens as its vocabulary stores them, without the end."""
        ...

    def save(self, folder: Path) -> None:
        """Write it for transformers."""
        ...


def tokenizer_of(folder: str) -> Tokenizer:
    """The tokenizer of a recipe's `data.tokenizer`; empty: bytes.

    Raises:
        ValueError: no folder, or one without a tokenizer that ends documents.
    """
    return _FolderTokenizer(folder) if folder else _ByteTokenizer()


def copy_in(run: Path) -> Path:
    """Where a run keeps a copy of its folder's tokenizer, for `seqmesh export`."""
    return run / "tokenizer"


class _ByteTokenizer:
    vocabulary = BYTES
    fingerprint = ""

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        return [text.encode() for text in texts]

    def save(self, folder: Path) -> None:
        ByT5Tokenizer(extra_ids=0).save_pretrained(folder)


class _FolderTokenizer:
    def __init__(self, folder: str) -> None:
        self._tokenizer = _load(folder)
        end = self._tokenizer.eos_token_id
        if end is None:
            raise ValueError(
                f"data.tokenizer={folder!r} has no token that ends a document; name one as eos_token in its"
                " tokenizer_config.json"
            )
        # Ids may have gaps: what counts is the highest.
        size = max(self._tokenizer.get_vocab().values()) + 1
        self.vocabulary = TokenIds(size=size, end=end, width=narrowest(size))

    @cached_property
    def fingerprint(self) -> str:
        rules = self._tokenizer.backend_tokenizer.to_str().encode()
        return fingerprint([rules, str(self.vocabulary.end).encode()])

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [self.vocabulary.store(ids) for ids in encoded["input_ids"]]

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)


def _load(folder: str) -> Any:
    path = os.path.expanduser(folder)
    if not os.path.isdir(path):
        raise ValueError(
            f"data.tokenizer={folder!r} is no folder; nothing is downloaded: give the folder of a tokenizer"
            " that save_pretrained wrote, or leave it out for bytes"
        )
    try:
        found = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # Each kind of tokenizer has checks, and exceptions, of its own.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"data.tokenizer={folder!r} holds no tokenizer that transformers can load ({reason}); give the"
            " folder that save_pretrained wrote"
        ) from None
    if not getattr(found, "is_fast", False):
        raise ValueError(
            f"data.tokenizer={folder!r} is a {type(found).__name__}, which runs in Python; give one with a"
            " tokenizer.json, or leave it out for bytes"
        )
    return found
