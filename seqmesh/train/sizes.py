"""A model's arithmetic: what its layers call attention with, its weights, its FLOPs.

MFU = model FLOPs / (seconds x peak). Model FLOPs of a step, forward + backward (backward = 2 x forward):

    6 x active matmul weights x tokens  +  6 x sum over calls of attention of  pairs x heads x (d + e)
    + 6 x tokens x sum over recurrences of  heads x products with a head's state (x taps, of a convolution)

where pairs is the number of (query, key) pairs that the layer's mask allows, exactly; d and e are the head
dims of keys and of values. Of experts, as many are active as a token is routed to. Weights that do not train
(all but LoRA's) have 4 in place of 6: no gradient of theirs is made.

(2 FLOPs per weight and token forward; QK^T and PV are 2 d and 2 e FLOPs per pair and head forward.) The PaLM
convention takes seq_len^2 pairs instead; we report both and say which is which.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from seqmesh.integrations.calls import LayerCall, calls_of, holds_experts
from seqmesh.integrations.recurrent_calls import RecurrentCall
from seqmesh.parallel.anatomy import Anatomy
from seqmesh.parallel.layer_kinds import LayerKinds, allowed_pairs
from seqmesh.train.config import DecoderSizes


class Reach(NamedTuple):
    """How far a layer sees."""

    window: int | None
    chunk: int | None

    def pairs(self, lengths: Iterable[int]) -> int:
        """Allowed pairs of documents of so many tokens."""
        return sum(allowed_pairs(length, self.window, self.chunk) for length in lengths)


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Of a whole model, whatever mesh it is trained on."""

    parameters: int
    trained: int
    """Of these, those that train."""
    matmul_parameters: int
    """Weights that a token is multiplied by: of experts those that it is routed to, the output embedding
    included, without input embeddings, norms and biases."""
    trained_matmul_parameters: int
    """Of these, those that train."""
    experts: int
    """Of a layer that has some; 0 if none has."""
    layers: int
    is_tied: bool
    """Whether input and output embeddings are one matrix."""
    calls: tuple[LayerCall, ...]
    """Of attention in a forward, in its order."""
    recurrent: tuple[RecurrentCall, ...] = ()
    """Of short convolutions and recurrences in a forward."""

    @staticmethod
    def of(model: PreTrainedModel) -> "ModelSizes":
        """Those of a model on the meta device, which is not plugged in.

        Raises:
            ValueError: a model whose parts are not found, or that cannot be looked at without its weights.
        """
        anatomy = Anatomy.of(model)
        model.train()
        calls = calls_of(anatomy.base, list(anatomy.layers))
        return ModelSizes(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            matmul_parameters=_active_weights(model),
            trained_matmul_parameters=_active_weights(model, trained=True),
            experts=max((_experts_of(module) for module in model.modules()), default=0),
            layers=len(anatomy.layers),
            is_tied=anatomy.is_tied,
            calls=calls.attention,
            recurrent=calls.recurrent,
        )

    @cached_property
    def kinds(self) -> LayerKinds:
        """Layers by what they see.

        Raises:
            ValueError: windows, or chunks, of several sizes.
        """
        return LayerKinds.of(self.calls)

    @cached_property
    def _weights(self) -> Counter[Reach]:
        """heads x (d + e) of all calls of a reach, for each."""
        found: Counter[Reach] = Counter()
        for call in self.calls:
            found[Reach(call.window, call.chunk)] += call.heads * (call.key_dim + call.value_dim)
        return found

    def area(self, lengths: Sequence[int]) -> int:
        """Allowed pairs of documents in a layer: the mean over layers, rounded, where they differ."""
        counts = Counter(Reach(call.window, call.chunk) for call in self.calls)
        return round(sum(n * reach.pairs(lengths) for reach, n in counts.items()) / len(self.calls))

    def attention_work(self, lengths: Sequence[int]) -> int:
        """Multiplications of attention in a forward over documents: pairs x heads x (d + e), all layers."""
        return sum(weight * reach.pairs(lengths) for reach, weight in self._weights.items())

    def step_flops(self, tokens: int, attention_work: int) -> float:
        """FLOPs of one forward and backward, see the top of the file."""
        weights = 4.0 * self.matmul_parameters + 2.0 * self.trained_matmul_parameters
        recurrent_work = sum(call.work for call in self.recurrent)
        return (weights + 6.0 * recurrent_work) * tokens + 6.0 * attention_work

    def noncausal_work(self, sequences: int, seq_len: int) -> int:
        """`attention_work` by the convention that ignores masks."""
        return self._weights.total() * sequences * seq_len**2

    def fits(self, folder: str) -> list[DecoderSizes]:
        """What must fit the mesh: one for each pair of numbers of heads that layers have."""
        return [
            DecoderSizes(
                layers=self.layers,
                heads=heads,
                kv_heads=kv_heads,
                tie_embeddings=self.is_tied,
                experts=self.experts,
                folder=folder,
            )
            for heads, kv_heads in sorted({(call.heads, call.kv_heads) for call in self.calls})
        ]


def _active_weights(model: PreTrainedModel, *, trained: bool = False) -> int:
    """Of the matrices that a token is multiplied by, or of those of them that train.

    A head that is the embedding's tensor is one.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        share = _active_share(model, module)
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim >= 2 and not name.endswith("bias") and (weight.requires_grad or not trained):
                total += round(weight.numel() * (share if weight.ndim == 3 else 1))
    return total


def _experts_of(module: nn.Module) -> int:
    """Experts whose matrices a module holds; 0 for any other module."""
    if not holds_experts(module):
        return 0
    return max(weight.shape[0] for weight in module.parameters(recurse=False) if weight.ndim == 3)


def _active_share(model: PreTrainedModel, module: nn.Module) -> float:
    """Of a module's experts, the part that a token is routed to; 1 for any other module."""
    experts = _experts_of(module)
    if not experts:
        return 1.0
    routed = getattr(model.config, "num_experts_per_tok", None)
    if not routed:
        raise ValueError(
            f"{type(model).__name__} has {experts} experts, and its config no num_experts_per_tok that says"
            " how many a token is routed to; use another model"
        )
    return float(routed) / experts
