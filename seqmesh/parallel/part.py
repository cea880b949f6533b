"""A Hugging Face causal LM, or some consecutive layers of it, as one module that ends in its loss.

    whole model     input_ids (1, n)     -> embedding, layers, norm, loss            -> ()
    first part      input_ids (1, n)     -> embedding, some layers                   -> (1, n, H)
    a part between  hidden (1, n, H)     ->            some layers                   -> (1, n, H)
    last part       hidden (1, n, H)     ->            some layers, norm, loss       -> ()

The transformers model inside keeps its class, its names and its forward, so its state dict is what it was.
Logits are not made: the loss takes the head's weight (loss.py).
"""

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from seqmesh.parallel.anatomy import Anatomy, head_rule
from seqmesh.parallel.balance import BalanceLoss
from seqmesh.parallel.batch import LocalBatch
from seqmesh.parallel.loss import HeadRule, hidden_loss


class ModelPart(nn.Module):
    """A model, or a part of one, and its loss."""

    def __init__(
        self, hf: PreTrainedModel, *, is_first: bool = True, is_last: bool = True, loss_rows: int
    ) -> None:
        """Wrap a model; nothing of it changes.

        Raises:
            ValueError: a model whose parts are not found, or whose head the loss cannot follow.
        """
        super().__init__()
        Anatomy.of(hf)
        self.hf = hf
        self.is_first = is_first
        self.is_last = is_last
        self.rule: HeadRule | None = head_rule(hf, loss_rows) if is_last else None
        self.balance: BalanceLoss | None = None

    @property
    def anatomy(self) -> Anatomy:
        """Where the parts of the model are, found anew: modules may have been replaced."""
        return Anatomy.of(self.hf)

    def forward(self, x: Tensor, *, batch: LocalBatch) -> Tensor:
        """Token ids (1, n) or hidden states (1, n, H) -> hidden states, or its share of the loss ()."""
        inputs: dict[str, Any] = {"input_ids" if self.is_first else "inputs_embeds": x}
        for name in ("sliding_schedule", "chunked_schedule"):
            given = getattr(batch, name)
            if given is not None:
                inputs[name] = given
        if self.balance is not None:
            self.balance.start()
        out = self.anatomy.base(**inputs, position_ids=batch.position_ids, schedule=batch.schedule)
        hidden = cast(Tensor, out.last_hidden_state)
        if self.rule is None:
            return hidden
        weight = cast(Tensor, self.hf.get_output_embeddings().weight)
        tokens = batch.shift_labels.shape[1]  # ranks of tp that share rows may have padded them
        rows = hidden[:, :tokens]
        share = hidden_loss(rows, weight, batch.shift_labels, batch.label_count, self.rule)
        return share if self.balance is None else share + self.balance.share(batch.batch_count)
