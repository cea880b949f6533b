"""The shape of a decoder: what the planner must know of a model.

attention        q, k, v, output; or latent: q and k, v through narrow products (DeepSeek-V3)
mixers           layers that carry a state along the sequence: inputs/mixers.py
feed-forward     one network; or experts, of which a token passes some (mixtures)
what it sees     all layers everything, or a window; or some of them everything (Gemma 3, gpt-oss)
"""

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import NamedTuple

from seqmesh.planner.inputs.mixers import Matrix, Mixer, mixer_parameters
from seqmesh.planner.inputs.tables import FROM_ZERO, LARGEST_COUNT, is_count


class FeedForward(NamedTuple):
    """The feed-forward networks of so many layers."""

    layers: int
    width: int
    """Of what every token passes, f; of a mixture its shared experts, or 0."""
    experts: int = 0
    """Networks of which a router chooses."""
    active: int = 0
    """Of them, those that a token passes."""
    expert_width: int = 0
    """Of one of them."""
    scores: int = 0
    """Numbers of a token that the router makes: one for each of them, and a gate of what is shared."""


@dataclass(frozen=True, kw_only=True)
class MixtureShape:
    """Experts in place of a layer's feed-forward network."""

    experts: int
    """Of a layer, E."""
    active: int
    """Experts that a token is routed to, k."""
    intermediate: int
    """Width of one expert."""
    shared: int = field(default=0, metadata=FROM_ZERO)
    """Width of the experts that every token passes besides."""
    shared_gate: bool = False
    """Whether what those give has a gate: one number a token."""
    dense_layers: int = field(default=0, metadata=FROM_ZERO)
    """Layers with a feed-forward network of the model's `intermediate` all the same."""
    has_router_buffers: bool = False
    """Whether routers have weights that are no parameters, which `seqmesh train` refuses (DeepSeek-V3)."""
    architecture: str = "mixtral"
    """What a recipe without a folder makes of it: mixtral, or qwen3_moe, which has norms of q and k."""


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """Multi-head latent attention: two products in place of one, with few numbers between them."""

    q_rank: int = field(metadata=FROM_ZERO)
    """Numbers between the products of the queries; 0: one product."""
    kv_rank: int
    """The same of keys and values."""
    rotary_dim: int
    """Of a head's q and k, the elements with positions; of k one for all heads, beside `kv_rank`."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder.

    Counts leave out biases, norms beside a layer's two, sinks and learned positions: at most 0.2% of a
    preset.

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
    """Key/value heads; divides `heads`. Of latent attention, as attention sees them: all."""
    head_dim: int
    """Elements of a head of q and k, d; `heads * head_dim` need not be `hidden`."""
    value_dim: int | None = None
    """The same of v and the output, e; None: `head_dim`."""
    intermediate: int
    """Width of the feed-forward network, f."""
    vocabulary: int
    """Rows of the embedding, V."""
    gated: bool = True
    """Whether a feed-forward network has a gate (SwiGLU, GeGLU): three matrices, else two."""
    tied_embeddings: bool = False
    """Whether the output head is the embedding's matrix."""
    sliding_window: int | None = None
    """Keys that a query sees, itself among them; None: all before it."""
    full_layers: int = field(default=0, metadata=FROM_ZERO)
    """Layers that see all keys, where the others have a window."""
    mixture: MixtureShape | None = None
    latent: LatentShape | None = None
    gated_attention: bool = False
    """Whether attention's output has a gate of its size, from the product of the queries."""
    mixer: Mixer | None = None
    attention_layers: int | None = None
    """Layers with attention; None: all."""
    network_layers: int | None = None
    """Layers with a feed-forward network; None: all."""
    source: str = ""
    """Where the numbers come from."""
    folder: str = field(default="", compare=False)
    """Where its config.json lies, if it was read from one."""

    def __post_init__(self) -> None:
        self._check_counts(self, "")
        if self.mixture is not None:
            self._check_counts(self.mixture, "mixture.")
        if self.latent is not None:
            self._check_counts(self.latent, "latent.")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model {self.name!r}: {self.kv_heads} key/value heads do not divide {self.heads} heads;"
                f" use a divisor of {self.heads}"
            )
        self._check_parts()

    def _check_counts(self, part: "ModelShape | MixtureShape | LatentShape", where: str) -> None:
        for leaf in fields(part):
            value = getattr(part, leaf.name)
            if leaf.type not in (int, int | None) or (value is None and leaf.default is None):
                continue
            least = leaf.metadata.get("least", 1)
            if not is_count(value, least):
                raise ValueError(
                    f"model {self.name!r}: {where}{leaf.name}={value!r} is not a whole number"
                    f" from {least} to {LARGEST_COUNT}; give one"
                )

    def _check_parts(self) -> None:
        """Parts of layers, experts and heads that are more than there are."""
        parts = [
            ("full_layers", self.full_layers, "layers", self.layers),
            ("attention_layers", self.attending, "layers", self.layers),
            ("network_layers", self.networks, "layers", self.layers),
        ]
        if self.mixer is not None:
            parts.append(("mixer.layers", self.mixer.layers, "layers", self.layers))
        if self.mixture is not None:
            parts.append(("mixture.active", self.mixture.active, "mixture.experts", self.mixture.experts))
            # One layer at least has experts.
            parts.append(("mixture.dense_layers", self.mixture.dense_layers, "layers - 1", self.networks - 1))
        if self.latent is not None:
            parts.append(("latent.rotary_dim", self.latent.rotary_dim, "head_dim", self.head_dim))
        for part, value, whole, most in parts:
            if value > most:
                raise ValueError(f"model {self.name!r}: {part}={value} of {whole}={most}; use at most {most}")

    @cached_property
    def attending(self) -> int:
        """Layers with attention."""
        return self.layers if self.attention_layers is None else self.attention_layers

    @cached_property
    def networks(self) -> int:
        """Layers with a feed-forward network, or experts."""
        return self.layers if self.network_layers is None else self.network_layers

    @cached_property
    def norms(self) -> int:
        """Of all layers: one before attention, a mixer or both side by side, and one before networks."""
        mixing = self.attending + (self.mixer.layers if self.mixer else 0)
        return min(mixing, self.layers) + self.networks

    @cached_property
    def value_head_dim(self) -> int:
        """Elements of a head of v and of the output, e."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @cached_property
    def both_dims(self) -> int:
        """Elements of a head of k and of v, or of q and of the output, together: d + e."""
        return self.head_dim + self.value_head_dim

    @property
    def not_shared_by_tp(self) -> str:
        """What tensor parallelism is not priced with; empty if nothing."""
        if self.mixture is not None:
            return "experts"
        if self.mixer is not None:
            return "layers that carry a state"
        return "latent attention" if self.latent is not None else ""

    @property
    def is_plain(self) -> bool:
        """Whether all layers are alike, with one feed-forward network, and attention without latents."""
        parts = (self.mixture, self.latent, self.mixer)
        return not any(parts) and not self.mixes_windows and not self.gated_attention

    @property
    def mixes_windows(self) -> bool:
        """Whether some layers have a window, and some see everything."""
        return self.sliding_window is not None and 0 < self.full_layers < self.layers

    @property
    def is_said_by_keys(self) -> bool:
        """Whether a recipe of `seqmesh train` can name its layers by keys: else it takes a folder."""
        m = self.mixture
        has_more = m is not None and (m.shared > 0 or m.dense_layers > 0)
        others = (self.latent, self.mixer, self.gated_attention, self.mixes_windows)
        return not any(others) and not has_more

    @property
    def untrainable(self) -> str:
        """Why `seqmesh train` refuses it, whatever the mesh; empty if it does not."""
        if self.mixture is not None and self.mixture.has_router_buffers:
            return "its routers have weights that are buffers, which checkpoints do not hold"
        return ""

    @cached_property
    def attention_matrices(self) -> tuple[Matrix, ...]:
        """Of a layer's attention, the output's last; q, k and v are one where nothing is between."""
        e = self.value_head_dim
        output = Matrix(self.heads * e, self.hidden)
        z = self.latent
        if z is None:
            gate = self.heads * e if self.gated_attention else 0
            q_and_k = (self.heads + self.kv_heads) * self.head_dim
            return Matrix(self.hidden, q_and_k + self.kv_heads * e + gate), output
        unrotated = self.head_dim - z.rotary_dim
        queries = self.heads * self.head_dim
        narrow = (Matrix(self.hidden, z.q_rank), Matrix(z.q_rank, queries))
        return (
            *(narrow if z.q_rank else (Matrix(self.hidden, queries),)),
            Matrix(self.hidden, z.kv_rank + z.rotary_dim),
            Matrix(z.kv_rank, self.heads * (unrotated + e)),
            output,
        )

    @cached_property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        """The kinds of layers by their feed-forward networks, the largest first."""
        m = self.mixture
        if m is None:
            return (FeedForward(self.networks, self.intermediate),)
        scores = m.experts + m.shared_gate
        layers = self.networks - m.dense_layers
        sparse = FeedForward(layers, m.shared, m.experts, m.active, m.intermediate, scores)
        return (sparse, FeedForward(m.dense_layers, self.intermediate)) if m.dense_layers else (sparse,)

    def _feed_forward(self, of: FeedForward, experts: int) -> int:
        """Elements of the matrices of a layer with so many of its experts, and of its router."""
        width = of.width + experts * of.expert_width
        return (3 if self.gated else 2) * self.hidden * width + self.hidden * of.scores

    @property
    def _attention_parameters(self) -> int:
        return sum(matrix.rows * matrix.columns for matrix in self.attention_matrices)

    @cached_property
    def _mixer_parameters(self) -> int:
        return mixer_parameters(self.mixer, self.hidden) if self.mixer else 0

    @property
    def layer_matmul_parameters(self) -> int:
        """Elements of one layer's matrices, all its experts among them; of the largest kind of layers."""
        of = self.feed_forwards[0]
        network = self._feed_forward(of, of.experts)
        if self.norms == self.layers:  # a layer is attention, a mixer or a network
            return max(self._attention_parameters, self._mixer_parameters, network)
        if self.mixer and self.mixer.layers + self.attending > self.layers:  # some are both
            return self._attention_parameters + self._mixer_parameters + network
        return max(self._attention_parameters, self._mixer_parameters) + network

    @cached_property
    def layer_parameters(self) -> int:
        """Elements of one layer: its matrices and its norms."""
        return self.layer_matmul_parameters + -(-self.norms // self.layers) * self.hidden

    @cached_property
    def layer_expert_parameters(self) -> int:
        """Of these, those of experts that a router chooses of."""
        of = self.feed_forwards[0]
        return self._feed_forward(of, of.experts) - self._feed_forward(of, 0)

    @cached_property
    def expert_parameters(self) -> int:
        """The same of all layers."""
        return self.feed_forwards[0].layers * self.layer_expert_parameters

    @cached_property
    def body_parameters(self) -> int:
        """Elements of all layers."""
        networks = (of.layers * self._feed_forward(of, of.experts) for of in self.feed_forwards)
        return self._mixing_parameters + self.norms * self.hidden + sum(networks)

    @cached_property
    def _mixing_parameters(self) -> int:
        """Elements of the matrices of attention and mixers, of all layers."""
        mixers = self.mixer.layers * self._mixer_parameters if self.mixer else 0
        return self.attending * self._attention_parameters + mixers

    @cached_property
    def embedding_parameters(self) -> int:
        """Elements of the embedding, and of the output head."""
        return self.vocabulary * self.hidden

    @cached_property
    def parameters(self) -> int:
        """Elements of the model: layers, embedding, output head unless it is the embedding, last norm."""
        ends = (1 if self.tied_embeddings else 2) * self.embedding_parameters
        return self.body_parameters + ends + self.hidden

    @property
    def active_parameters(self) -> int:
        """The same without the experts that a token is not routed to."""
        of = self.feed_forwards[0]
        idle = self._feed_forward(of, of.experts) - self._feed_forward(of, of.active)
        return self.parameters - of.layers * idle

    @cached_property
    def matmul_parameters(self) -> int:
        """Elements that every token is multiplied with.

        Layers, of experts those that it is routed to, and output head (also where it is tied), not the
        embedding.
        """
        networks = (of.layers * self._feed_forward(of, of.active) for of in self.feed_forwards)
        return self._mixing_parameters + sum(networks) + self.embedding_parameters
