"""The configuration of a training run: a frozen dataclass for each section of a recipe.

The defaults are the default recipe (recipes/stdlib.toml spells them out; a test keeps the two equal). Types
are checked by recipe.py, ranges and combinations here, so a `Config` that exists can be run.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

_STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}
"""How pydantic reads a section: no unknown key, no conversion between types.

An int is a float, nothing else is anything else.
"""

LONGEST_TIMEOUT_S = 1e6
"""12 days: beyond some 1e9 seconds the C++ clocks of PyTorch overflow, and a rank would give up at once."""


def _require(rule: bool, message: str) -> None:
    if not rule:
        raise ValueError(message)


def _at_least(section: str, config: object, **least: float) -> None:
    for name, bound in least.items():
        value = getattr(config, name)
        # Python's integers have no end, PyTorch's have 64 bits.
        if isinstance(value, int):
            _require(
                bound <= value < 2**63,
                f"{section}.{name}={value}: use a value of at least {bound} and below 2^63",
            )
        else:
            _require(
                math.isfinite(value) and value >= bound,
                f"{section}.{name}={value}: use a finite value of at least {bound}",
            )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the sequence is spread. ulysses x ring ranks share every sequence."""

    ulysses: int = 2
    """Ranks that swap sequence shards for head shards; at most the number of query heads."""
    ring: int = 2
    """Ranks that exchange K/V rows."""
    layout: Literal["auto", "contiguous", "zigzag", "striped", "balanced"] = "auto"
    """Which tokens each ring rank holds; auto looks at every batch's documents."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        _at_least("mesh", self, ulysses=1, ring=1)

    @property
    def world(self) -> int:
        """Ranks of the run."""
        return self.ulysses * self.ring


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
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
    tie_embeddings: bool = False
    """Whether input and output embeddings are one matrix."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        _at_least("model", self, hidden=1, layers=1, heads=1, kv_heads=1, intermediate=1, rope_theta=1)
        _require(
            self.heads % self.kv_heads == 0,
            f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads};"
            f" use a divisor of {self.heads}",
        )
        _require(
            self.hidden % self.heads == 0 and self.head_dim % 2 == 0,
            f"model.hidden={self.hidden} over model.heads={self.heads} is not an even head dim,"
            f" which rotary embeddings need; use a multiple of {2 * self.heads}",
        )

    @property
    def head_dim(self) -> int:
        """Elements of one head."""
        return self.hidden // self.heads


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text and how it is packed (data.py)."""

    path: str = "stdlib"
    """A text file, a folder of text files, or "stdlib": the source of this Python's standard library."""
    seq_len: int = 8192
    """Tokens (bytes) of a packed sequence."""
    sequences: int = 1
    """Packed sequences in a step."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        _at_least("data", self, seq_len=16, sequences=1)
        _require(
            "\0" not in self.path,
            f"data.path={self.path!r} has a NUL character, which no path may have; remove it",
        )
        _require(
            self.path != "",
            'data.path="" is empty; give a text file, a folder of text files, or "stdlib"',
        )

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.seq_len * self.sequences


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation: AdamW, linear warm-up, cosine decay."""

    steps: int = 64
    """Optimiser steps."""
    minutes: float = 0.0
    """Stop after this many minutes even if steps are left; 0 for no limit."""
    lr: float = 3e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """The last learning rate over the peak one."""
    warmup: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """On matrices; vectors and norms have none."""
    clip: float = 1.0
    """Largest gradient norm."""
    seed: int = 0
    """Of the weights and of the order of documents; 0 <= seed < 2^63."""
    compare_steps: int = 3
    """First steps that are repeated on one rank afterwards, to compare loss and gradient norm; 0: none."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        _at_least(
            "train",
            self,
            steps=1,
            minutes=0,
            lr=0,
            min_lr_ratio=0,
            warmup=0,
            weight_decay=0,
            seed=0,
            compare_steps=0,
        )
        _require(
            math.isfinite(self.clip) and self.clip > 0,
            f"train.clip={self.clip}: use a positive gradient norm",
        )
        _require(self.min_lr_ratio <= 1, f"train.min_lr_ratio={self.min_lr_ratio}: use a ratio of at most 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where and how the run happens."""

    folder: str = ""
    """Folder for the results, new or empty; default: runs/ and the time of the start."""
    timeout_s: float = 120.0
    """Seconds after which a rank that waits for another gives up; at most 1e6."""
    threads: int = 1
    """CPU threads of each rank."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        _at_least("run", self, timeout_s=1, threads=1)
        _require(
            self.timeout_s <= LONGEST_TIMEOUT_S,
            f"run.timeout_s={self.timeout_s}: use at most {LONGEST_TIMEOUT_S:.0f} seconds",
        )
        _require(
            "\0" not in self.folder,
            f"run.folder={self.folder!r} has a NUL character, which no path may have; remove it",
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        idle = self.mesh.ulysses - self.model.heads
        _require(
            idle <= 0,
            f"mesh.ulysses={self.mesh.ulysses} with model.heads={self.model.heads} query heads"
            f" leaves {idle} ranks without a head;"
            f" use mesh.ulysses <= {self.model.heads} and put the rest on mesh.ring",
        )
