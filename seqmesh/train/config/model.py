"""[model]: what is trained."""

from dataclasses import dataclass
from typing import Any, ClassVar

from seqmesh.train.config.rules import STRICT, at_least, require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder from scratch, in the terms of transformers' configurations."""

    architecture: str = "llama"
    """Model type in transformers: llama, or a dense decoder with the same fields (mistral, qwen2, ...)."""
    hidden: int = 192
    """hidden_size."""
    layers: int = 3
    """num_hidden_layers."""
    heads: int = 4
    """num_attention_heads; divides `hidden`."""
    kv_heads: int = 2
    """num_key_value_heads; divides `heads`."""
    intermediate: int = 512
    """intermediate_size of the gated MLP."""
    vocabulary: int = 0
    """Token ids of the embeddings; 0: those of the data."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
    tie_embeddings: bool = False
    """Whether input and output embeddings are one matrix."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    def __post_init__(self) -> None:
        at_least(
            "model", self, hidden=1, layers=1, heads=1, kv_heads=1, intermediate=1, rope_theta=1, vocabulary=0
        )
        require(
            self.heads % self.kv_heads == 0,
            f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads};"
            f" use a divisor of {self.heads}",
        )
        require(
            self.hidden % self.heads == 0 and self.head_dim % 2 == 0,
            f"model.hidden={self.hidden} over model.heads={self.heads} is not an even head dim,"
            f" which rotary embeddings need; use a multiple of {2 * self.heads}",
        )

    @property
    def head_dim(self) -> int:
        """Elements of one head."""
        return self.hidden // self.heads
