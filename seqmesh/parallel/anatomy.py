"""Where the parts of a Hugging Face causal LM are, found by what they are and not by the model's class.

model
  base            the model without its head (base_model_prefix, or `model`)
    embedding       get_input_embeddings()
    layers          the ModuleList with num_hidden_layers modules
    rest            what else has parameters: the last norm
  head            get_output_embeddings()
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from seqmesh.parallel.loss import HeadRule

_SOFTCAP = "final_logit_softcapping"
_RESCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "unpadded_vocab_size")
"""Numbers in configs by which a model changes its logits in a way of its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Anatomy:
    """The parts of a model. Modules that were replaced by identities are found like any other."""

    base: PreTrainedModel
    embedding: nn.Module
    layers: nn.ModuleList
    rest: tuple[str, ...]
    """Names, in the base, of what else has parameters."""
    head: nn.Module
    is_tied: bool
    """Whether input and output embedding are one parameter."""

    @property
    def own_layers(self) -> list[nn.Module]:
        """The layers that are here."""
        return [self.layers[number] for number in self.own_numbers]

    @property
    def own_numbers(self) -> list[int]:
        """Their numbers: identities, in the place of other stages' layers, have no parameters."""
        return [number for number, layer in enumerate(self.layers) if any(True for _ in layer.parameters())]

    @staticmethod
    def of(model: PreTrainedModel) -> "Anatomy":
        """Find the parts.

        Raises:
            ValueError: a model without an output embedding, or whose layers are not in one list.
        """
        base = base_of(model)
        embedding = model.get_input_embeddings()
        head = model.get_output_embeddings()
        name = type(model).__name__
        if base is model or head is None:
            raise ValueError(
                f"{name} has no output embedding to predict tokens with; use a class ending in ForCausalLM"
            )
        count = model.config.num_hidden_layers
        lists = [
            part
            for part in base.children()
            if isinstance(part, nn.ModuleList) and len(part) == count and part is not embedding
        ]
        if len(lists) != 1:
            raise ValueError(
                f"{name} has {len(lists)} lists of {count} layers; use a decoder whose layers are one list"
            )
        rest = [
            child
            for child, part in base.named_children()
            if part is not embedding and part is not lists[0] and any(True for _ in part.parameters())
        ]
        return Anatomy(
            base=base,
            embedding=embedding,
            layers=lists[0],
            rest=tuple(rest),
            head=head,
            is_tied=hasattr(head, "weight") and head.weight is getattr(embedding, "weight", None),
        )


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; the model itself if that is not found."""
    base: PreTrainedModel = model.base_model
    if base is model:  # Llama 4 names another prefix than its attribute
        base = getattr(model, "model", model)
    return base


def head_rule(model: PreTrainedModel, chunk_rows: int) -> HeadRule:
    """How the model's logits follow from its hidden states.

    Raises:
        ValueError: in a way that `hidden_loss` does not do: a bias, or another factor.
    """
    name = type(model).__name__
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(f"{name} has a bias in its head, which the loss does not add; use a model without")
    for rescale in _RESCALES:
        given: Any = getattr(model.config, rescale, None)
        if given is not None and given != 1:
            raise ValueError(
                f"{name} has {rescale}={given} in its config, by which its logits change in a way of its own;"
                f" set it to 1, or use another model"
            )
    return HeadRule(softcap=getattr(model.config, _SOFTCAP, None), chunk_rows=chunk_rows)
