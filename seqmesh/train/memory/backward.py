"""The moments of a micro-batch, from its loss to the end of its backward, at which a rank's memory can peak.

Each is what the step holds (step.py), what layers in front keep, what this layer has (kept.py), weights and
gradients (weights.py), and what is made there and gone soon.

Legend: n tokens of a rank, c rows between its layers, h hidden, f intermediate, V vocabulary, each of this
rank of tp.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from seqmesh.train.memory.moment import Moment
from seqmesh.train.memory.rank import FP32, TrainedRank
from seqmesh.train.memory.step import TrainerStep
from seqmesh.train.memory.weights import Held, Turn

LOSS_ROWS = 1024
"""Rows whose logits exist at a time (parallel/loss.py, HeadRule.chunk_rows)."""
MLP_ROWS = 4096
"""Rows of an MLP's tile (train/setup.py): of those that a rank has between layers."""


@dataclass(frozen=True)
class BackwardMoments:
    """Moments from a micro-batch's loss to the end of its backward."""

    step: TrainerStep
    turn: Turn

    @property
    def rank(self) -> TrainedRank:
        """Whose they are."""
        return self.step.rank

    def moments(self) -> Iterator[Moment]:
        """All that can be the peak."""
        if self.rank.is_last:
            yield from self._of_loss()
            yield self._last_norm()
        for number in self._ends():
            yield from self._tiles(number) if self.rank.is_tiled else self._mlp(number)
            yield self._mlp_norm(number)
            yield self._attention(number)
            yield self._input_norm(number)
        if self.rank.is_first:
            yield self._embedding()

    def _ends(self) -> list[int]:
        """The layers at which a sum over layers can peak.

        The last one has no gradients of another that are packed; the first one fetches no other's weights.
        """
        last = self.rank.layers - 1
        return [number for number in dict.fromkeys((last, last - 1, 1, 0)) if 0 <= number <= last]

    # What lives.

    @cached_property
    def _beside_layers(self) -> int:
        """What lives through a micro-batch's backward beside the layers, with other micro-batches' layers."""
        step = self.step
        others = (self.turn.in_flight - 1) * step.waiting
        sent = int(not self.rank.is_last) + int(self.turn.lingers)
        return step.batches + step.received + step.rotary + others + sent * self.rank.stream

    def _kept(self, layers: int) -> dict[str, int]:
        """Bytes that so many layers keep: as activations, and on the host."""
        kept = layers * self.step.layer.waiting
        if not self.rank.point.offloads_activations:
            return {"activations": self._beside_layers + kept, "host": 0}
        host = layers * self.rank.stream
        return {"activations": self._beside_layers + kept - host, "host": host}

    def _stream(self, number: int) -> int:
        """The gradient of the residual stream at a layer, and of a tied head; what is received is counted."""
        is_received = number == self.rank.layers - 1 and not self.rank.is_last
        return self._tied_head() + (0 if is_received else self.rank.stream)

    def _tied_head(self) -> int:
        """The gradient of a head that is only a summand of a weight's, and not yet that."""
        rank = self.rank
        return rank.head * rank.element if rank.is_tied and rank.is_first else 0

    # Moments.

    def _moment(
        self, name: str, held: Held, kept: dict[str, int], more: int = 0, **transients: int
    ) -> Moment:
        """With `more` activations than the layers in front keep."""
        activations = kept["activations"] + more
        return self.step.moment(name, held, activations=activations, host=kept["host"], **transients)

    def _of_loss(self) -> Iterator[Moment]:
        """The loss, which makes its gradients too and leaves them to its backward, which scales them.

        Those of all hidden states are filled chunk by chunk. Those of the head's weight are summed in fp32.
        """
        rank, layer, weights = self.rank, self.step.layer, self.step.weights
        kept, rows = self._kept(rank.layers), layer.whole
        columns = min(rank.tokens, LOSS_ROWS) * rank.vocabulary
        # Logits less the largest of their row, and their exp; then their gradient, a summand of the weight's.
        of_chunk = max(2 * FP32 * columns, rank.element * (columns + rank.head))
        sums = 0 if rank.is_half else FP32 * rank.head  # what is left is in the weight's precision
        held = weights.in_loss(self.turn, head=0)
        yield self._moment(
            "loss",
            held,
            kept,
            layer.norm + rows + sums,
            logits_transients=of_chunk + FP32 * rank.head - sums,
            layer_transients=layer.normed,
        )
        # What becomes `.grad` as it is, in place of a summand of it.
        is_own = not (rank.is_half or self.turn.accumulates or self._tied_head())
        of_head = rank.root - rank.shape.hidden if is_own else 0
        yield self._moment(
            "loss backward",
            weights.in_loss(self.turn, head=of_head),
            kept,
            layer.norm + rows + rank.element * rank.head,
            logits_transients=rank.element * (rank.head - of_head),
            layer_transients=rows,
        )

    def _last_norm(self) -> Moment:
        """At the backward of the square in the last norm.

        Gradients of x through x/rms, and of the squares; x, 2 x, and their product with those.
        """
        held = self.step.weights.in_loss(self.turn, head=self.rank.root)
        x = FP32 * self.rank.rows * self.rank.shape.hidden
        kept = self._kept(self.rank.layers)
        return self._moment("last norm", held, kept, x, layer_transients=5 * x)

    def _mlp(self, number: int) -> Iterator[Moment]:
        """At the backward of the down projection, then of the product of silu and up.

        Gradients of the residual stream, of the product; then of both factors, while the product is freed.
        Where ranks of tp share rows, the first has the gradient of all rows of the MLP's result.
        """
        rank, layer = self.rank, self.step.layer
        held = self.step.weights.in_layer(self.turn, number, made=rank.matrices["down"])
        stream = self._stream(number)
        result = layer.whole if rank.shard_norms else 0
        kept, more = self._kept(number), layer.with_mlp
        yield self._moment(
            f"down projection of layer {number}",
            held,
            kept,
            more,
            layer_transients=stream + result + layer.wide,
        )
        more -= layer.wide
        yield self._moment(
            f"MLP of layer {number}", held, kept, more, layer_transients=stream + 3 * layer.wide
        )

    def _tiles(self, number: int) -> Iterator[Moment]:
        """In the last tile's backward, and when the gradients of all tiles' inputs are put together.

        Beside the gradient of the residual stream. The gradients of the weights are sums over tiles until the
        last one; that of the down projection is made first.
        """
        rank, layer, weights = self.rank, self.step.layer, self.step.weights
        rows = min(rank.rows, MLP_ROWS)
        of_row = rank.shape.hidden * rank.element
        stream = self._stream(number)
        sums = rank.element * (rank.matrices["gate"] + rank.matrices["up"]) if rows < rank.rows else 0
        inputs_before = (rank.rows - rows) * of_row
        # Before silu, silu, up, and their product, made again, with gradients as without tiles. A tile
        # gathers rows that tp shares: of its input, and in the down projection's backward of its result.
        gathered = 0
        if rank.shard_norms:
            rows = min(rank.tokens, rows * rank.point.tp)
            gathered = rows * of_row
        wide = rows * rank.mlp_width * rank.element
        tile = max(6 * wide + gathered, 5 * wide + 2 * gathered)
        kept, more = self._kept(number), layer.with_mlp
        yield self._moment(
            f"tile of layer {number}",
            weights.in_layer(self.turn, number, made=rank.matrices["down"]),
            kept,
            more,
            layer_transients=stream + inputs_before + sums + tile,
        )
        yield self._moment(
            f"tiles of layer {number}",
            weights.in_layer(self.turn, number, made=rank.mlp_matrices),
            kept,
            more,
            layer_transients=stream + 2 * rank.stream,
        )

    def _mlp_norm(self, number: int) -> Moment:
        """As in the last norm, with the gradient of the residual stream."""
        layer = self.step.layer
        x = FP32 * self.rank.rows * self.rank.shape.hidden
        return self._moment(
            f"MLP norm of layer {number}",
            self.step.weights.in_layer(self.turn, number, made=self.rank.mlp_matrices),
            self._kept(number),
            layer.with_attention + layer.output + x,
            layer_transients=self._stream(number) + 5 * x,
        )

    def _attention(self, number: int) -> Moment:
        """In the engine's backward: what it holds, and what waits around it.

        Gradients of the residual stream and of the engine's output. Of the layer's weights, those of the
        MLP, the norm before it and the output projection are made.
        """
        rank, layer = self.rank, self.step.layer
        made = rank.mlp_matrices + rank.matrices["output"] + rank.shape.hidden
        return self._moment(
            f"attention of layer {number}",
            self.step.weights.in_layer(self.turn, number, made=made),
            self._kept(number),
            layer.with_attention,
            layer_transients=self._stream(number) + layer.heads,
            attention_transients=rank.engine.in_backward(),
        )

    def _input_norm(self, number: int) -> Moment:
        """As in the last norm, with the gradient of the residual stream, and all weights but the norm's."""
        layer = self.step.layer
        x = FP32 * self.rank.rows * self.rank.shape.hidden
        return self._moment(
            f"norm of layer {number}",
            self.step.weights.in_layer(self.turn, number, made=self.rank.layer),
            self._kept(number),
            layer.beside + x,
            layer_transients=self._stream(number) + 5 * x,
        )

    def _embedding(self) -> Moment:
        """After the layers' backward: all gradients. Tied, the head's and the embedding's, and their sum."""
        rank = self.rank
        made = 2 * self._tied_head() + rank.stream
        held = self.step.weights.after_backward(self.turn)
        return self._moment("embedding", held, self._kept(0), layer_transients=made)
