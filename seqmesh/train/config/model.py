"""[model]: what is trained."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from seqmesh.train.config.rules import STRICT, at_least, require
from seqmesh.train.config.sizes import DecoderSizes


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder of a Hugging Face folder, or one from scratch in the terms of transformers' configurations.

    A folder says everything: the other keys then keep their defaults.
    """

    folder: str = ""
    """Folder with a config.json, and with the weights to start from if it has .safetensors; empty: a model
    from scratch, of the keys below."""

    architecture: str = "llama"
    """Model type in transformers: llama, or a dense decoder with the same fields (mistral, qwen2, ...); with
    `experts`, mixtral or qwen3_moe."""
    hidden: int = 192
    """hidden_size."""
    layers: int = 3
    """num_hidden_layers."""
    heads: int = 4
    """num_attention_heads; divides `hidden` unless `head_dim` is given."""
    kv_heads: int = 2
    """num_key_value_heads; divides `heads`."""
    head_dim: int = 0
    """Elements of a head; 0: hidden / heads."""
    intermediate: int = 512
    """intermediate_size of the gated MLP; of a mixture, that of an expert."""
    experts: int = 0
    """MLPs in each layer, of which a router chooses (num_local_experts, num_experts); 0: one MLP."""
    experts_per_token: int = 0
    """Of these, how many a token is routed to (num_experts_per_tok); with `experts` at least 1."""
    vocabulary: int = 0
    """Token ids of the embeddings; 0: those of the data."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
    tie_embeddings: bool = False
    """Whether input and output embeddings are one matrix."""
    window: int = 0
    """Tokens of the sliding window of all layers, of architectures that have one (mistral, ...); 0: layers
    see whole documents."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    def __post_init__(self) -> None:
        require(
            "\0" not in self.folder,
            f"model.folder={self.folder!r} has a NUL character, which no path may have; remove it",
        )
        if self.folder:
            self._check_folder_says_everything()
        sizes = ("hidden", "layers", "heads", "kv_heads", "intermediate", "rope_theta")
        others = ("vocabulary", "window", "head_dim", "experts", "experts_per_token")
        at_least("model", self, **dict.fromkeys(sizes, 1), **dict.fromkeys(others, 0))
        require(
            self.heads % self.kv_heads == 0,
            f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads};"
            f" use a divisor of {self.heads}",
        )
        self._check_head_dim()
        self._check_experts()

    def _check_head_dim(self) -> None:
        if self.head_dim:
            require(
                self.head_dim % 2 == 0,
                f"model.head_dim={self.head_dim} is odd, and rotary embeddings turn pairs; use an even one",
            )
            return
        require(
            self.hidden % self.heads == 0 and self.elements_of_head % 2 == 0,
            f"model.hidden={self.hidden} over model.heads={self.heads} is not an even head dim,"
            f" which rotary embeddings need; use a multiple of {2 * self.heads}, or model.head_dim",
        )

    def _check_experts(self) -> None:
        chosen = f"model.experts_per_token={self.experts_per_token}"
        require(
            self.experts > 0 or self.experts_per_token == 0,
            f"{chosen} with model.experts=0: there are none to choose of; leave it out, or set model.experts",
        )
        require(
            self.experts == 0 or 1 <= self.experts_per_token <= self.experts,
            f"{chosen} of model.experts={self.experts}: use 1 to {self.experts}",
        )

    def _check_folder_says_everything(self) -> None:
        for key in fields(self):
            value = getattr(self, key.name)
            require(
                key.name == "folder" or value == key.default,
                f"model.{key.name}={value!r} beside model.folder={self.folder!r}, whose config.json says what"
                f" the model is; leave model.{key.name} out, or change config.json",
            )

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return self.folder or self.architecture

    @property
    def sizes(self) -> DecoderSizes:
        """Those that the keys name; a folder's are in its config.json."""
        assert not self.folder
        return DecoderSizes(
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            tie_embeddings=self.tie_embeddings,
            experts=self.experts,
        )

    @property
    def elements_of_head(self) -> int:
        """Head dim."""
        return self.head_dim or self.hidden // self.heads
