"""The shape of a dense decoder: what the planner must know of a model."""

from dataclasses import dataclass

from seqmesh.planner.inputs.tables import LARGEST_COUNT


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A dense decoder whose layers are all alike.

    Counts leave out biases, per-head norms and learned positions: at most 0.2% of a preset.

    Raises:
        ValueError: a field out of range, or key/value heads that do not divide the heads.
    """

    name: str
    """As in [model.NAME], or the folder of the config.json."""
    layers: int
    """Decoder layers."""
    hidden: int
    """Width of the residual stream, h."""
    heads: int
    """Query heads, a."""
    kv_heads: int
    """Key/value heads; divides `heads`."""
    head_dim: int
    """Elements of one head, d; `heads * head_dim` need not be `hidden`."""
    intermediate: int
    """Width of the feed-forward network, f."""
    vocabulary: int
    """Rows of the embedding, V."""
    gated: bool = True
    """Whether the feed-forward network has a gate (SwiGLU, GeGLU): three matrices, else two."""
    tied_embeddings: bool = False
    """Whether the output head is the embedding's matrix."""
    sliding_window: int | None = None
    """Keys that a query of any layer sees, itself among them; None: all before it."""
    source: str = ""
    """Where the numbers come from."""

    def __post_init__(self) -> None:
        counts = ["layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary"]
        if self.sliding_window is not None:
            counts.append("sliding_window")
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_COUNT:
                raise ValueError(
                    f"model {self.name!r}: {name}={value!r} is not a whole number"
                    f" from 1 to {LARGEST_COUNT}; give one"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model {self.name!r}: {self.kv_heads} key/value heads do not divide {self.heads} heads;"
                f" use a divisor of {self.heads}"
            )

    @property
    def layer_matmul_parameters(self) -> int:
        """Elements of one layer's matrices: q, k, v, output, and the feed-forward network's three or two."""
        attention = self.hidden * (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return attention + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        """Elements of one layer: its matrices and two norms."""
        return self.layer_matmul_parameters + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Elements of the embedding, and of the output head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Elements of the model: layers, embedding, output head unless it is the embedding, last norm."""
        ends = (1 if self.tied_embeddings else 2) * self.embedding_parameters
        return self.layers * self.layer_parameters + ends + self.hidden

    @property
    def matmul_parameters(self) -> int:
        """Elements that every token is multiplied with.

        Layers and output head (also where it is tied), not the embedding.
        """
        return self.layers * self.layer_matmul_parameters + self.embedding_parameters
