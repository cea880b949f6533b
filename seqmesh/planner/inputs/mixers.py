"""Layers that carry a state along the sequence, in place of attention or beside it: sizes and FLOPs.

    delta rule    S <- (I - beta k k^T) diag(decay) S + beta k v^T,  o = S^T q    Qwen3-Next, OLMo, Kimi
    scan          S <- decay S + dt x B^T,                           o = S C      Mamba-2
    convolution   each channel over a few tokens                                  LFM2

All project their tokens in, convolve them shortly, mix them and project them out. FLOPs of a token and head:
a delta rule reads its state with k, adds k v^T and reads it with q, 2 k v each; a scan adds x B^T and reads
it with C, 2 p s each. Kernels take chunks of C tokens, with more products inside of a chunk:

    delta rule    6 k v + C (6 k + 4 v)        Yang et al. 2024, arXiv 2406.06484 and 2412.06464
    scan          4 p s + C (2 p + 2 s)        Dao & Gu 2024, arXiv 2405.21060; scores for each head

Where a state enters a piece of a document, the kernel first runs without it (engine/recurrent/rules.py): a
delta rule with k columns of values more, for the piece's transition; a scan sums up what it adds.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from seqmesh.planner.inputs.tables import FROM_ZERO


class Matrix(NamedTuple):
    """What a product multiplies a token with."""

    rows: int
    """Numbers of a token that go in."""
    columns: int
    """Numbers that come out."""


class MixedState(NamedTuple):
    """What the layers carry from piece to piece."""

    heads: int
    """0: nothing."""
    numbers: int
    """Of one head."""
    transition: int
    """Of the transition of one head."""


@dataclass(frozen=True, kw_only=True)
class DeltaMixer:
    """Gated delta rules; with `gate_rank` Kimi's, with a decay for each channel."""

    layers: int
    """Of the model that are such."""
    heads: int
    """Of values and states, h."""
    key_heads: int
    """Of queries and of keys."""
    key_dim: int
    """k."""
    value_dim: int
    """v."""
    width: int = field(metadata=FROM_ZERO)
    """Tokens before its own that the convolution sees."""
    gate_rank: int = field(default=0, metadata=FROM_ZERO)
    """Numbers between the two products of decays, and of gates; 0: one product, a decay for each head."""

    kind = "delta"
    """In a table of a model."""
    chunk = 64
    """Tokens that kernels take at once, C: of transformers and of flash-linear-attention."""
    gates = 1
    """Of what the kernel gives."""

    @property
    def inner(self) -> int:
        """Numbers of a token's output."""
        return self.heads * self.value_dim

    @property
    def channels(self) -> int:
        """Numbers of a token that are convolved: queries, keys, values."""
        return 2 * self.key_heads * self.key_dim + self.inner

    @property
    def state(self) -> MixedState:
        """A matrix (k, v) for each head, and a transition (k, k)."""
        return MixedState(self.heads, self.key_dim * self.value_dim, self.key_dim**2)

    def matrices(self, hidden: int) -> tuple[Matrix, ...]:
        """Of a layer, the output's last."""
        out = Matrix(self.inner, hidden)
        if not self.gate_rank:  # q, k, v, the output's gate; beta and decay
            return Matrix(hidden, self.channels + self.inner + 2 * self.heads), out
        narrow = Matrix(hidden, 2 * self.gate_rank)
        decays = Matrix(self.gate_rank, self.heads * self.key_dim)
        return (
            Matrix(hidden, self.channels + self.heads),
            narrow,
            decays,
            Matrix(self.gate_rank, self.inner),
            out,
        )

    @property
    def state_flops(self) -> int:
        """FLOPs of a token with the states, forward."""
        return 6 * self.heads * self.state.numbers

    def kernel_flops(self, columns: int = 0) -> int:
        """FLOPs of a token in the kernel, forward, with so many more columns of values."""
        k, v = self.key_dim, self.value_dim + columns
        return self.heads * (6 * k * v + self.chunk * (6 * k + 4 * v))

    @property
    def scout_flops(self) -> int:
        """The same where the kernel runs for a piece's final state and transition."""
        return self.kernel_flops(columns=self.key_dim)

    @property
    def kept(self) -> int:
        """Numbers of a token that autograd keeps: convolved, before and after; output, gate, product."""
        return 2 * self.channels + 3 * self.inner + 2 * self.heads

    @property
    def reads(self) -> int:
        """Numbers that are kept of a token that a state reached: what it read of it."""
        return self.heads * self.key_dim


@dataclass(frozen=True, kw_only=True)
class ScanMixer:
    """Mamba-2."""

    layers: int
    """Of the model that are such."""
    heads: int
    """h."""
    head_dim: int
    """p."""
    groups: int
    """Of heads that share B and C."""
    state_dim: int
    """Numbers of B and of C, s."""
    width: int = field(metadata=FROM_ZERO)
    """Tokens before its own that the convolution sees."""
    chunk: int
    """Tokens that the kernel takes at once, C."""

    kind = "scan"
    gates = 1
    """Of what the kernel gives."""

    @property
    def inner(self) -> int:
        """Numbers of a token's output."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Numbers of a token that are convolved: x, B, C."""
        return self.inner + 2 * self.groups * self.state_dim

    @property
    def state(self) -> MixedState:
        """A matrix (p, s) for each head, and one decay."""
        return MixedState(self.heads, self.head_dim * self.state_dim, 1)

    def matrices(self, hidden: int) -> tuple[Matrix, ...]:
        """Of a layer: the gate, x, B, C and dt; the output."""
        return Matrix(hidden, self.inner + self.channels + self.heads), Matrix(self.inner, hidden)

    @property
    def state_flops(self) -> int:
        """FLOPs of a token with the states, forward."""
        return 4 * self.heads * self.state.numbers

    def kernel_flops(self) -> int:
        """FLOPs of a token in the kernel, forward."""
        return self.state_flops + 2 * self.chunk * self.heads * (self.head_dim + self.state_dim)

    @property
    def scout_flops(self) -> int:
        """FLOPs of a token for what a piece adds to its state."""
        return 2 * self.heads * self.state.numbers

    @property
    def kept(self) -> int:
        """Numbers of a token that autograd keeps: convolved, before and after; output, gate, product."""
        return 2 * self.channels + 3 * self.inner + self.heads

    @property
    def reads(self) -> int:
        """Numbers that are kept of a token that a state reached: the decay up to it."""
        return 2 * self.heads  # fp32, in numbers of bf16


@dataclass(frozen=True, kw_only=True)
class ConvolutionMixer:
    """Gates before and behind a short convolution, and no state."""

    layers: int
    """Of the model that are such."""
    channels: int
    """Numbers of a token that are convolved: all."""
    width: int = field(metadata=FROM_ZERO)
    """Tokens before its own that the convolution sees."""

    kind = "convolution"
    chunk = 1
    gates = 2
    """Before and behind the convolution."""
    state = MixedState(0, 0, 0)
    state_flops = scout_flops = reads = 0

    @property
    def inner(self) -> int:
        """Numbers of a token's output."""
        return self.channels

    @property
    def kept(self) -> int:
        """Numbers of a token that autograd keeps: three of the product in; convolved, in and out; out."""
        return 6 * self.channels

    def matrices(self, hidden: int) -> tuple[Matrix, ...]:
        """Of a layer: both gates and what is convolved; the output."""
        return Matrix(hidden, 3 * self.channels), Matrix(self.channels, hidden)

    def kernel_flops(self) -> int:
        """0: the convolution alone mixes tokens, and its weights are counted as matrices are."""
        return 0


Mixer = DeltaMixer | ScanMixer | ConvolutionMixer


def mixer_parameters(mixer: Mixer, hidden: int) -> int:
    """Elements of a layer's matrices and of its convolution; without norms, decays and biases."""
    products = sum(matrix.rows * matrix.columns for matrix in mixer.matrices(hidden))
    return products + mixer.channels * (mixer.width + 1)
