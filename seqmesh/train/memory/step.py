"""What lives in all micro-batches of a step of the trainer, and at its end. In bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from seqmesh.train.memory.kept import KeptLayer
from seqmesh.train.memory.moment import Moment
from seqmesh.train.memory.rank import TrainedRank
from seqmesh.train.memory.weights import Held, HeldWeights

INT64 = 8
"""Bytes of a token's id or place."""


@dataclass(frozen=True)
class TrainerStep:
    """A step of one rank."""

    rank: TrainedRank

    @cached_property
    def weights(self) -> HeldWeights:
        """Weights and gradients."""
        return HeldWeights(self.rank)

    @cached_property
    def layer(self) -> KeptLayer:
        """One of its layers."""
        return KeptLayer(self.rank)

    @cached_property
    def batches(self) -> int:
        """int64 of all micro-batches' tokens.

        Ids, labels, positions; on several ranks also their places in the sequence.
        """
        numbers = 3 if self.rank.point.gpus == 1 else 4
        return numbers * INT64 * self.rank.tokens * self.rank.micro_batches

    @cached_property
    def rotary(self) -> int:
        """cos and sin of the rotary embedding, of one micro-batch."""
        return 2 * self.rank.tokens * self.rank.shape.head_dim * self.rank.element

    @cached_property
    def received(self) -> int:
        """What a pipeline stage keeps for its neighbours, beside what its layers keep.

        Buffers of all micro-batches for hidden states from the stage before, and for gradients from the
        stage behind.
        """
        sides = int(not self.rank.is_first) + int(not self.rank.is_last)
        return sides * self.rank.micro_batches * self.rank.stream

    @cached_property
    def last_norm(self) -> int:
        """What the last norm saves, with the gradient of its result, which the loss leaves."""
        return self.layer.norm + self.layer.whole if self.rank.is_last else 0

    @cached_property
    def waiting(self) -> int:
        """What a micro-batch in flight keeps."""
        kept = self.rotary + self.rank.layers * self.layer.waiting + self.last_norm
        if not self.rank.is_last:
            kept += self.rank.stream  # its result, which has been sent
        # The first layer's input is what was received, and counted with all that is.
        if not self.rank.is_first and (self.rank.recomputes or not self.rank.is_half):
            kept -= self.rank.stream
        return kept

    def moment(self, name: str, held: Held, *, activations: int, **transients: int) -> Moment:
        """A moment; weights and AdamW's two states are always there."""
        offloads = self.rank.point.offloads_optimizer
        states = {
            "parameters": self.weights.parameters,
            "optimizer": self.weights.optimizer,
            "gradients": held.gradients,
        }
        host = transients.pop("host", 0)
        if offloads:
            host += sum(states.values())
            states = dict.fromkeys(states, 0)
        sizes = {**states, "zero_buffers": held.whole, "activations": activations, **transients}
        return Moment(name=name, host=host, **sizes)

    def after_backwards(self) -> Iterator[Moment]:
        """Of the step's end, without activations."""
        if self.rank.point.pp > 1 and self.weights.is_sharded:
            held = self.weights.in_reduction()
            yield self.moment("reduction", held, activations=self.batches + self.received)
        yield self._update()

    def _update(self) -> Moment:
        """In AdamW, which takes one weight after the other."""
        held = Held(gradients=self.weights.in_update(), whole=0)
        # On the host with the states, if those are.
        kind = "host" if self.rank.point.offloads_optimizer else "update_transients"
        return self.moment("AdamW", held, activations=self.batches, **{kind: self.weights.in_adamw})
