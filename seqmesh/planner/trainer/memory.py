"""Predict one rank's peak memory in a step of our trainer, from shapes alone. tracing.py measures the same.

    trainer_memory(load_model("llama3-8b"), seq_len=212_992, ulysses=8, ring=2)["total"]        # bytes

The step (train/trainer.py with the default [train]: fp32, zero = 0, nothing recomputed but chunks of logits)
can peak at a few moments only:

    loss forward and backward, last norm                     all activations; a chunk of logits, a few times
    feed-forward, attention of the last layer                all activations, the head's gradient
    feed-forward, attention of the first layer               one layer's activations, nearly all gradients
    embedding, AdamW, checksum                               no activations, all gradients

The all-reduce between them is in place, one gradient at a time, and adds nothing.

Between the last layer and the first each layer frees its activations and adds its gradients, always as many:
the sum peaks at an end. Every term counts tensors that autograd saves or the code holds, read off
transformers' Llama, PyTorch 2.13's derivatives and our engine; none is fitted. Assumed: one causal sequence,
zigzag over the ring; rank 0, whose late rows need every other rank's keys.

Legend: n tokens of a rank, h hidden, f intermediate, V vocabulary. Sizes are in elements of 4 bytes until a
`Moment` is made; int64 numbers count twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.trainer.engine_buffers import EngineBuffers

ELEMENT = 4
"""Bytes of an fp32 number: the element that sizes are counted in."""
LOSS_ROWS = 1024
"""Rows whose logits exist at a time (parallel/loss.py, HeadRule.chunk_rows)."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What lives at one moment of the step, in bytes."""

    name: str
    parameters: int
    optimizer: int
    """AdamW's two states."""
    gradients: int
    """Of weights."""
    activations: int
    """Saved for the backward by layers not yet reached."""
    logits_transients: int = 0
    """A chunk's logits, what is made of them, and its summand of the gradient of the head's weight."""
    layer_transients: int = 0
    """Gradients of activations on their way, and of a tied head, which waits for the embedding's."""
    attention_transients: int = 0
    """Our engine's buffers in one backward.

    Gradients, received and returned rows, the kernel's compact copies.
    """
    update_transients: int = 0
    """Of AdamW or of the checksum, for one weight at a time."""

    @property
    def categories(self) -> dict[str, int]:
        """Bytes by field."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}

    @property
    def total(self) -> int:
        """All together."""
        return sum(self.categories.values())


def trainer_memory(shape: ModelShape, *, seq_len: int, ulysses: int, ring: int) -> dict[str, int]:
    """Bytes on rank 0 at the peak of a step: the fields of `Moment`, and their "total".

    Raises:
        ValueError: a shape that the trainer cannot train.
    """
    moments = trainer_moments(shape, seq_len=seq_len, ulysses=ulysses, ring=ring)
    peak = max(moments, key=lambda moment: moment.total)
    return {**peak.categories, "total": peak.total}


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
            f"model {shape.name!r} has {shape.heads} heads of {shape.head_dim} for hidden={shape.hidden},"
            " but our trainer's heads fill the width;"
            f" trace a model with head_dim={shape.hidden // shape.heads}"
        )
    if not shape.gated:
        raise _not_a_llama(shape, "no gate")
    if shape.sliding_window is not None:
        raise _not_a_llama(shape, f"a sliding window of {shape.sliding_window}")


def _not_a_llama(shape: ModelShape, what: str) -> ValueError:
    return ValueError(
        f"model {shape.name!r} has {what}, which our trainer's Llama cannot have;"
        " trace a gated model without a window"
    )


@dataclass(frozen=True)
class _Rank:
    """Rank 0's sizes, in elements."""

    shape: ModelShape
    seq_len: int
    ulysses: int
    ring: int

    @cached_property
    def engine(self) -> EngineBuffers:
        """Rank 0 as the engine sees it."""
        return EngineBuffers(self.shape, self.seq_len, self.ulysses, self.ring)

    @property
    def tokens(self) -> int:
        """n."""
        return self.engine.tokens

    def moments(self) -> Iterator[Moment]:
        """All that can be the peak."""
        yield from self._of_loss()
        yield self._last_norm()
        # The sum over layers peaks at an end; with one layer the two ends are the same.
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
            "attention": self.engine.saved,
            # The engine's output, for the weight of the output projection; U = 1: saved above.
            "output": 0 if self.ulysses == 1 else n * h,
            "feed-forward norm": self._norm,
            "gate": n * f,  # before silu
            "silu": n * f,  # a factor of the product
            "up": n * f,  # the other
            "product": n * f,  # for the down projection's weight
        }

    @cached_property
    def _norm(self) -> int:
        """What a norm saves.

        Its input x, for the gradient of the mean square; x/rms, for its weight's; x/rms * weight, for the
        matrices after it; 1/rms.
        """
        return self.tokens * (3 * self.shape.hidden + 1)

    @cached_property
    def _layer(self) -> int:
        return sum(self._saved.values())

    @cached_property
    def _beside_layers(self) -> int:
        """What lives through the whole step beside the layers.

        cos and sin of the rotary embedding, and the batch.
        """
        rotary = 2 * self.tokens * self.shape.head_dim
        return rotary + self._batch

    @cached_property
    def _batch(self) -> int:
        """int64 of our tokens: ids, labels, positions; on several ranks also their places in the sequence."""
        numbers = 3 if self.ulysses * self.ring == 1 else 4
        return 2 * numbers * self.tokens

    @cached_property
    def _all_activations(self) -> int:
        return self._beside_layers + self.shape.layers * self._layer + self._norm

    def _gradients_after(self, layer: int) -> int:
        """Gradients made when the backward arrives at a layer's end.

        Of the output head, the last norm and the layers behind it.
        """
        m = self.shape
        return self._head + m.hidden + (m.layers - 1 - layer) * m.layer_parameters

    @property
    def _head(self) -> int:
        """The gradient of the output head."""
        return 0 if self.shape.tied_embeddings else self.shape.embedding_parameters

    @property
    def _tied_head(self) -> int:
        """The same if it is only a summand of a weight's gradient, and not yet that."""
        return self.shape.embedding_parameters if self.shape.tied_embeddings else 0

    # Moments.

    def _moment(self, name: str, *, gradients: int = 0, activations: int, **transients: int) -> Moment:
        """A moment in bytes, from sizes in elements; weights and AdamW's two states are always there."""
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
        """The loss, from the last hidden states to their gradient, with all activations.

        Beside those it keeps the log-sum-exp of every row for its backward, which makes the gradients of the
        head's weight and of all hidden states, adding to the one and filling the other chunk by chunk.
        """
        n, V, h = self.tokens, self.shape.vocabulary, self.shape.hidden
        saved = self._all_activations + n
        chunk = min(n, LOSS_ROWS)
        # Logits, those less the largest of their row, and its exp. The chunk before left its logits only.
        yield self._moment("loss forward", activations=saved, logits_transients=3 * chunk * V)
        # Logits and their gradient, while the summand of the weight's gradient is made from it.
        of_weight = 2 * chunk * V + V * h
        yield self._moment(
            "loss backward",
            gradients=self._head,
            activations=saved,
            logits_transients=max(self._softmax_rows() * V, of_weight),
            layer_transients=self._tied_head + n * h,
        )

    def _softmax_rows(self) -> int:
        """Rows of logits that the loss's backward holds at most while it makes a chunk's softmax.

        Three of the chunk: its logits, those less the log-sum-exp, and its exp. From the second chunk on also
        the gradient of the logits of the chunk before, whose name is bound until this one's is made.
        """
        n = self.tokens
        if n <= LOSS_ROWS:
            return 3 * n
        if n < 2 * LOSS_ROWS:  # the second chunk is the last, and has fewer rows
            return max(3 * LOSS_ROWS, LOSS_ROWS + 3 * (n - LOSS_ROWS))
        return 4 * LOSS_ROWS

    def _last_norm(self) -> Moment:
        """At the backward of the square in the last norm.

        Gradients of x through x/rms, and of the squares; x, 2 x, and their product with those.
        """
        n = self.tokens
        m = self.shape
        return self._moment(
            "last norm",
            gradients=self._head + m.hidden,
            activations=self._beside_layers + m.layers * self._layer + n * m.hidden,
            layer_transients=self._tied_head + 5 * n * m.hidden,
        )

    def _feed_forward(self, layer: int) -> Moment:
        """At the backward of the product of silu and up.

        Gradients of the residual stream, of the product (which itself is freed), of both factors.
        """
        n, h, f = self.tokens, self.shape.hidden, self.shape.intermediate
        return self._moment(
            f"feed-forward of layer {layer}",
            gradients=self._gradients_after(layer) + f * h,
            activations=self._beside_layers + (layer + 1) * self._layer - self._saved["product"],
            layer_transients=self._tied_head + n * h + 3 * n * f,
        )

    def _attention(self, layer: int) -> Moment:
        """In the engine's backward: what it holds, and what waits around it.

        Gradients of the residual stream and of the engine's output. Of the layer's weights, those of the
        feed-forward network, the norm before it and the output projection are made.
        """
        n, h, f = self.tokens, self.shape.hidden, self.shape.intermediate
        layers_before = layer * self._layer
        return self._moment(
            f"attention of layer {layer}",
            gradients=self._gradients_after(layer) + 3 * f * h + h + h * h,
            activations=self._beside_layers
            + layers_before
            + self._saved["input norm"]
            + self._saved["attention"],
            layer_transients=self._tied_head + 2 * n * h,
            attention_transients=self.engine.in_backward(),
        )

    def _of_weights(self) -> Iterator[Moment]:
        """After the layers' backward: all gradients, and no activations but the batch."""
        m = self.shape
        # Tied: the head's gradient and the embedding's, beside their sum.
        yield self._moment(
            "embedding",
            gradients=m.parameters,
            activations=self._batch,
            layer_transients=2 * self._tied_head + self.tokens * m.hidden,
        )
        largest = max(m.embedding_parameters, m.hidden * m.intermediate, m.hidden**2)
        # AdamW: the root of a weight's second moment, and that divided. Checksum, in fp64: weight, square.
        for name, copies in (("AdamW", 2), ("checksum", 4)):
            yield self._moment(
                name, gradients=m.parameters, activations=self._batch, update_transients=copies * largest
            )
