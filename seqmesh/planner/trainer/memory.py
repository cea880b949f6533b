"""Predict one rank's peak memory in a step of our trainer, from shapes alone. tracing.py measures the same.

    trainer_memory(load_model("llama3-8b"), seq_len=212_992, ulysses=8, ring=2)["total"]        # bytes

The step (train/trainer.py: fp32, weights replicated, nothing recomputed but the loss's softmax) can peak at a
few moments only:

    loss forward, loss backward, output head, last norm      all activations, the first with logits up to five times
    feed-forward, attention of the last layer                all activations, no gradients yet
    feed-forward, attention of the first layer               one layer's activations, nearly all gradients
    embedding, all-reduce, AdamW, checksum                   no activations, all gradients

Between the last layer and the first each layer frees its activations and adds its gradients, always as many:
the sum peaks at an end. Every term counts tensors that autograd saves or the code holds, read off
transformers' Llama, PyTorch 2.13's derivatives and our engine; none is fitted. Assumed: one causal sequence,
zigzag over the ring; rank 0, whose late rows need every other rank's keys.

Legend: n tokens of a rank, N rows of its ring rank, h hidden, q heads x head dim, kv K/V heads x head dim, f
intermediate, V vocabulary, s tokens in all, U ulysses degree, R ring degree, W and K widths of a chunk's
queries and of its keys and values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from seqmesh.layouts import split_evenly, zigzag
from seqmesh.planner.inputs.models import ModelShape
from seqmesh.schedule.heads import default_chunks, split_heads

ELEMENT = 4
"""Bytes of an fp32 number: all sizes below are in such elements."""
LOSS_ROWS = 4096
"""Rows of logits whose softmax exists at a time (loss.py, chunk_rows)."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What lives at one moment of the step, in bytes."""

    name: str
    parameters: int
    optimizer: int
    """AdamW's two states."""
    gradients: int
    """Of weights; in the all-reduce twice, as made and as the flat copy that is summed."""
    activations: int
    """Saved for the backward by layers not yet reached."""
    logits: int = 0
    """The output head's result."""
    logits_transients: int = 0
    """Softmax of a chunk, and gradients of all logits."""
    layer_transients: int = 0
    """Gradients of activations on their way."""
    attention_transients: int = 0
    """Our engine's buffers in one backward: gradients, received and returned rows, the kernel's compact
    copies.
    """
    update_transients: int = 0

    @property
    def total(self) -> int:
        """All together."""
        return sum(value for name, value in vars(self).items() if name != "name")


def trainer_memory(shape: ModelShape, *, seq_len: int, ulysses: int, ring: int) -> dict[str, int]:
    """Bytes on rank 0 at the peak of a step: the fields of `Moment`, and their "total".

    Raises:
        ValueError: a shape that the trainer cannot train.
    """
    peak = max(
        trainer_moments(shape, seq_len=seq_len, ulysses=ulysses, ring=ring), key=lambda moment: moment.total
    )
    return {name: value for name, value in vars(peak).items() if name != "name"} | {"total": peak.total}


def trainer_moments(shape: ModelShape, *, seq_len: int, ulysses: int, ring: int) -> list[Moment]:
    """The moments that can be the peak, in their order.

    Args:
        shape: the model, trained as a Llama.
        seq_len: tokens of the sequence, over all ranks.
        ulysses: ulysses degree.
        ring: ring degree.

    Raises:
        ValueError: a shape that the trainer cannot train.
    """
    check_trainable(shape)
    return list(_Rank(shape, seq_len, ulysses, ring).moments())


def check_trainable(shape: ModelShape) -> None:
    """Raise ValueError if the trainer has no such model: it trains a Llama whose heads fill its width."""
    if shape.heads * shape.head_dim != shape.hidden:
        raise ValueError(
            f"model {shape.name!r} has {shape.heads} heads of {shape.head_dim} for hidden={shape.hidden}, but our trainer's heads fill the"
            f" width; trace a model with head_dim={shape.hidden // shape.heads}"
        )
    for rule, what in (
        (shape.gated, "no gate"),
        (shape.sliding_window is None, f"a sliding window of {shape.sliding_window}"),
    ):
        if not rule:
            raise ValueError(
                f"model {shape.name!r} has {what}, which our trainer's Llama cannot have; trace a gated model without a window"
            )


@dataclass(frozen=True)
class _Rank:
    """Rank 0's sizes, in elements."""

    shape: ModelShape
    seq_len: int
    ulysses: int
    ring: int

    @cached_property
    def rows(self) -> int:
        """N."""
        return zigzag(self.seq_len, self.ring).counts[0]

    @cached_property
    def tokens(self) -> int:
        """n."""
        return split_evenly(self.rows, self.ulysses)[1]

    @cached_property
    def chunks(self) -> list[tuple[int, int]]:
        """W and K of each head chunk of this rank."""
        m = self.shape
        wanted = default_chunks(self.ulysses, self.ring, self.seq_len, m.kv_heads * m.head_dim)
        shares = [chunk[0] for chunk in split_heads(m.heads, m.kv_heads, self.ulysses, wanted)]
        return [(share.q * m.head_dim, 2 * share.kv * m.head_dim) for share in shares]

    def moments(self) -> Iterator[Moment]:
        """All that can be the peak."""
        yield from self._of_loss()
        yield self._last_norm()
        for layer in dict.fromkeys((self.shape.layers - 1, 0)):
            yield self._feed_forward(layer)
            yield self._attention(layer)
        yield from self._of_weights()

    # What the forward saves for the backward.

    @cached_property
    def _saved(self) -> dict[str, int]:
        """By one layer, in the order of its forward."""
        n, h, f = self.tokens, self.shape.hidden, self.shape.intermediate
        return {
            "input norm": self._norm,
            "attention": self._attention_inputs,
            "output": 0
            if self.ulysses == 1
            else n * h,  # the engine's, for the output projection's weight; U = 1: saved above
            "feed-forward norm": self._norm,
            "gate": n * f,  # before silu
            "silu": n * f,  # a factor of the product
            "up": n * f,  # the other
            "product": n * f,  # for the down projection's weight
        }

    @cached_property
    def _norm(self) -> int:
        """Its input x, for the gradient of the mean square; x/rms, for its weight's; x/rms * weight, for the
        matrices after it; 1/rms.
        """
        return self.tokens * (3 * self.shape.hidden + 1)

    @cached_property
    def _attention_inputs(self) -> int:
        """For the engine: rotated q and k, v, out and lse; U = 1: of this rank's n tokens, U > 1: of its
        heads, as they were received.
        """
        m = self.shape
        if self.ulysses == 1:
            return self.tokens * (2 * m.hidden + 2 * m.kv_heads * m.head_dim + m.heads)
        return self.rows * sum(2 * W + K + W // m.head_dim for W, K in self.chunks)

    @cached_property
    def _layer(self) -> int:
        return sum(self._saved.values())

    @cached_property
    def _beside_layers(self) -> int:
        """cos and sin of the rotary embedding; int64: the batch's ids, labels and positions of all s tokens,
        ids and labels of ours.
        """
        return 2 * self.tokens * self.shape.head_dim + 2 * (3 * self.seq_len + 2 * self.tokens)

    @cached_property
    def _all_activations(self) -> int:
        return self._beside_layers + self.shape.layers * self._layer + self._norm

    def _gradients_after(self, layer: int) -> int:
        """Gradients made when the backward arrives at a layer's end: of the output head, the last norm and
        the layers behind it.
        """
        m = self.shape
        return m.embedding_parameters + m.hidden + (m.layers - 1 - layer) * m.layer_parameters

    # Moments.

    def _moment(self, name: str, *, gradients: int = 0, activations: int, **transients: int) -> Moment:
        weights = self.shape.parameters
        sizes = {
            "parameters": weights,
            "optimizer": 2 * weights,
            "gradients": gradients,
            "activations": activations,
            **transients,
        }
        return Moment(name=name, **{kind: ELEMENT * size for kind, size in sizes.items()})

    def _of_loss(self) -> Iterator[Moment]:
        """Chunk by chunk from the last: softmax, its gradient, the logits' gradient; that one, padded with
        zeros to all rows, is added.

        So at most either three of a chunk and the sum so far, or three of all rows: the sum, the padded one,
        the new sum.
        """
        n, V, h, saved = self.tokens, self.shape.vocabulary, self.shape.hidden, self._all_activations
        chunk, chunks = min(n, LOSS_ROWS), -(-n // LOSS_ROWS)
        transients = {1: 3 * n, 2: n + 3 * chunk}.get(chunks, max(3 * n, n + 3 * chunk))
        yield self._moment("loss forward", activations=saved, logits=n * V, logits_transients=chunk * V)
        yield self._moment("loss backward", activations=saved, logits=n * V, logits_transients=transients * V)
        yield self._moment(
            "output head", activations=saved, logits_transients=n * V, layer_transients=n * h, gradients=V * h
        )

    def _last_norm(self) -> Moment:
        """At the square's backward: gradients of x through x/rms, and of the squares; x, 2 x, and their
        product with those.
        """
        n, m = self.tokens, self.shape
        return self._moment(
            "last norm",
            gradients=m.embedding_parameters + m.hidden,
            activations=self._beside_layers + m.layers * self._layer + n * m.hidden,
            layer_transients=5 * n * m.hidden,
        )

    def _feed_forward(self, layer: int) -> Moment:
        """At the product's backward: gradients of the residual stream, of the product (which itself is
        freed), of both factors.
        """
        n, h, f = self.tokens, self.shape.hidden, self.shape.intermediate
        return self._moment(
            f"feed-forward of layer {layer}",
            gradients=self._gradients_after(layer) + f * h,
            activations=self._beside_layers + (layer + 1) * self._layer - self._saved["product"],
            layer_transients=n * h + 3 * n * f,
        )

    def _attention(self, layer: int) -> Moment:
        """In the engine's backward: gradients of the residual stream and of the engine's output, and what the
        engine holds.
        """
        n, h, f = self.tokens, self.shape.hidden, self.shape.intermediate
        return self._moment(
            f"attention of layer {layer}",
            gradients=self._gradients_after(layer) + 3 * f * h + h + h * h,
            activations=self._beside_layers
            + layer * self._layer
            + self._saved["input norm"]
            + self._saved["attention"],
            layer_transients=2 * n * h,
            attention_transients=self._engine(),
        )

    def _engine(self) -> int:
        """Gradients of all heads, and the fullest chunk; the chunk before it has left its dq and dkv in
        variables.
        """
        m, exchanged = self.shape, self.ulysses > 1
        fullest, before = 0, 0
        for W, K in self.chunks:
            received = self.rows * W if exchanged else 0  # the gradient of out, of this rank's heads
            home = (
                3 * self.rows * (W + K) if exchanged else 0
            )  # dq and dkv: as they are, in one buffer, and what arrives
            fullest = max(fullest, received + max(before + max(self._stages(W, K)), home))
            before = self.rows * (W + K)
        return self.tokens * (m.hidden + 2 * m.kv_heads * m.head_dim) + fullest

    def _stages(self, W: int, K: int) -> Iterator[int]:
        """What the ring holds at the end of each stage's kernel.

        Rank 0 receives N rows a stage, for half its queries, and sends N/2.
        """
        N, R = self.rows, self.ring
        compact = (
            3 if self.ulysses == 1 or self.shape.head_dim < W else 1
        )  # q, dout and out; one head received alone is compact
        fetch = 3 * N * K // 2  # rows sent and rows received, for the next stage
        yield (
            (compact + 1) * N * W + 2 * N * K + (fetch if R > 1 else 0)
        )  # compact inputs, dq, compact k and v, dk and dv
        for stage in range(1, R):
            held = (
                N * W + 3 * N * K
            )  # sums of dq and of own dk, dv; this stage's rows; dk and dv of the stage before, in variables
            kernel = (compact + 1) * N * W // 2 + 2 * N * K
            coming = fetch if stage < R - 1 else 0
            going = (
                N * W // 2 + fetch if stage > 1 else 0
            )  # dq of the stage before; its dk and dv, under way, and ours that come back
            yield held + kernel + coming + going

    def _of_weights(self) -> Iterator[Moment]:
        """Without activations but for the batch."""
        m, batch = self.shape, 6 * self.seq_len
        largest = max(m.embedding_parameters, m.hidden * m.intermediate, m.hidden**2)
        tied = (
            2 * m.embedding_parameters if m.tied_embeddings else 0
        )  # the head's gradient, the embedding's, and their sum
        yield self._moment(
            "embedding",
            gradients=m.parameters + tied,
            activations=batch,
            layer_transients=self.tokens * m.hidden,
        )
        if self.ulysses * self.ring > 1:
            yield self._moment("all-reduce", gradients=2 * m.parameters, activations=batch)
        for name, copies in (
            ("AdamW", 2),
            ("checksum", 4),
        ):  # sqrt of a weight's second moment, and that divided; fp64: weight, square
            yield self._moment(
                name, gradients=m.parameters, activations=batch, update_transients=copies * largest
            )
