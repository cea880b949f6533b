"""What one layer of the trainer keeps for its backward, and what it has when that begins. In bytes.

    checkpointing      forward to backward                                  made again for the backward
    none               all that autograd saves
    selective          input, attention's results, matrix products          the rest of what autograd saves
    full               input, attention's results                           likewise, with matrix products

With its MLP in tiles a layer keeps the MLP's input only, and no matrix products of it.

Read off transformers' Llama and what PyTorch 2.13's derivatives save.
Legend: n tokens, c rows between layers, h hidden, f intermediate (h and f of this rank of tp).
"""

from dataclasses import dataclass

from seqmesh.train.memory.rank import FP32, TrainedRank


@dataclass(frozen=True)
class KeptLayer:
    """One layer of a rank."""

    rank: TrainedRank

    @property
    def whole(self) -> int:
        """An activation (n, H) with all rows, whatever tp shares."""
        return self.rank.tokens * self.rank.shape.hidden * self.rank.element

    @property
    def wide(self) -> int:
        """An activation (n, f) of the MLP."""
        return self.rank.tokens * self.rank.mlp_width * self.rank.element

    @property
    def heads(self) -> int:
        """An activation (n, h) of this rank's query heads."""
        return self.rank.tokens * self.rank.heads_width * self.rank.element

    @property
    def norm(self) -> int:
        """What a norm saves.

        Its input x in fp32, for the gradient of the mean square; 1/rms; x/rms, for its weight's gradient.
        """
        rank = self.rank
        return rank.rows * (rank.shape.hidden * (FP32 + rank.element) + FP32)

    @property
    def normed(self) -> int:
        """x/rms * weight of all rows, which the matrices after a norm save."""
        return self.whole

    @property
    def mlp_input(self) -> int:
        """The same of the MLP's norm. Tiles gather their rows themselves, where ranks of tp share them."""
        return self.rank.stream if self.rank.is_tiled else self.whole

    @property
    def output(self) -> int:
        """Attention's output at home, for the weight of the output projection; U = 1: the engine saves it."""
        return self.heads if self.rank.point.ulysses > 1 else 0

    @property
    def mlp(self) -> int:
        """What the MLP saves: before silu, silu, up, and the product of those two; in tiles nothing."""
        return 0 if self.rank.is_tiled else 4 * self.wide

    @property
    def input(self) -> int:
        """The layer's input, if it is not what the norm saves: in bf16 that is a copy in fp32."""
        return self.rank.stream if self.rank.is_half else 0

    # Forward to backward.

    @property
    def waiting(self) -> int:
        """What a layer keeps until its backward begins."""
        if not self.rank.recomputes:
            return self.saved
        kept = self.rank.stream + self.rank.engine.results + self.output
        return kept + self.products if self.rank.point.checkpointing == "selective" else kept

    @property
    def saved(self) -> int:
        """All that autograd saves of a layer."""
        of_norms = 2 * self.norm + self.normed + self.mlp_input
        return of_norms + self.rank.engine.saved + self.output + self.mlp

    @property
    def products(self) -> int:
        """Matrix products: q, k, v, output, gate, up, down; of output and down all columns, for tp to sum."""
        rank = self.rank
        of_attention = rank.tokens * rank.engine.local_width * rank.element + self.whole
        return of_attention + (0 if rank.is_tiled else 2 * self.wide + self.whole)

    # In the backward.

    @property
    def beside(self) -> int:
        """What a recomputed layer holds to its end, beside what autograd saves.

        Its input where that is not the norm's, and the last product, which is never asked for.
        """
        if not self.rank.recomputes:
            return 0
        has_last = self.rank.point.checkpointing == "selective" and not self.rank.is_tiled
        return self.input + (self.whole if has_last else 0)

    @property
    def with_mlp(self) -> int:
        """As the backward of its MLP begins."""
        return self.beside + self.saved

    @property
    def with_attention(self) -> int:
        """As the backward of its attention begins."""
        return self.beside + self.norm + self.normed + self.rank.engine.saved
