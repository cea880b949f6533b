"""The sizes of a model that must fit the mesh, whether a recipe names them or the config.json of a folder."""

from dataclasses import dataclass

_IN_CONFIG_JSON = {
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "layers": "num_hidden_layers",
    "tie_embeddings": "tie_word_embeddings",
}


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """Of a decoder."""

    layers: int
    heads: int
    kv_heads: int
    tie_embeddings: bool
    """Whether input and output embeddings are one matrix."""
    experts: int = 0
    """Of a layer that has some; 0 if none has."""
    folder: str = ""
    """Whose config.json says so; empty if the recipe does."""

    def named(self, size: str) -> str:
        """A size with its value, as whoever wrote it calls it."""
        value = getattr(self, size)
        if not self.folder:
            return f"model.{size}={value}"
        return f"{_IN_CONFIG_JSON[size]}={value} of model.folder={self.folder!r}"
