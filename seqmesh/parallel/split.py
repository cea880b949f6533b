"""A part of a model for a pipeline stage: the same model, foreign layers replaced by identities.

    stage 0 of 2     embedding   layer 0   layer 1   -         -         -      -
    stage 1 of 2     -           -         -         layer 2   layer 3   norm   head

Names stay what they are, so the state dicts of all stages together are the model's. What has no weights
(rotary tables) is on every stage. The model's own forward runs on every stage, from hidden states where there
is no embedding; a model that does more to them than its layers would do it on every stage, which is checked.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqmesh.layouts import split_evenly
from seqmesh.parallel.anatomy import Anatomy
from seqmesh.parallel.part import ModelPart


class PassThrough(nn.Module):
    """In place of what another stage has."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """x"""
        return x


def split(
    model: PreTrainedModel, stages: Sequence[int], count: int, *, loss_rows: int
) -> tuple[ModelPart, ...]:
    """The given stages of `count` of them, each with weights of its own.

    Raises:
        ValueError: fewer layers than stages, tied embeddings, or a model whose stages would differ from it.
    """
    check_stages(model, count)
    anatomy = Anatomy.of(model)
    cut = split_evenly(len(anatomy.layers), count)
    return tuple(
        ModelPart(
            _only(model, range(cut[stage], cut[stage + 1]), is_first=stage == 0, is_last=stage == count - 1),
            is_first=stage == 0,
            is_last=stage == count - 1,
            loss_rows=loss_rows,
        )
        for stage in stages
    )


def check_stages(model: PreTrainedModel, count: int) -> None:
    """Raise what `split` would raise."""
    anatomy = Anatomy.of(model)
    name = type(model).__name__
    if len(anatomy.layers) < count:
        raise ValueError(
            f"{name} has {len(anatomy.layers)} layers for {count} pipeline stages; use fewer, each needs one"
        )
    if anatomy.is_tied:
        raise ValueError(
            f"{name} has tied embeddings, which the first and the last stage would both have; use pp=1, or"
            " tie_word_embeddings=False"
        )
    _check_only_layers_change_hidden_states(model)


def _only(model: PreTrainedModel, layers: range, *, is_first: bool, is_last: bool) -> PreTrainedModel:
    """A copy that has some layers, the embedding if it is the first, norm and head if it is the last."""
    anatomy = Anatomy.of(model)
    foreign = [layer for number, layer in enumerate(anatomy.layers) if number not in layers]
    if not is_first:
        foreign.append(anatomy.embedding)
    if not is_last:
        foreign += [anatomy.head, *(getattr(anatomy.base, name) for name in anatomy.rest)]
    # What is in the memo already is not copied: foreign weights never exist twice.
    copied: PreTrainedModel = copy.deepcopy(model, {id(module): PassThrough() for module in foreign})
    return copied


def _check_only_layers_change_hidden_states(model: PreTrainedModel) -> None:
    """Run the model without layers and norm: what comes out must be what went in."""
    empty = _only(model, range(0), is_first=False, is_last=False).base_model
    empty.to_empty(device="cpu")
    size = model.config.hidden_size
    hidden = torch.linspace(-1, 1, size, dtype=model.dtype).view(1, 1, size)
    with torch.no_grad():
        out = empty(inputs_embeds=hidden, position_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    if not torch.equal(out.last_hidden_state, hidden):
        raise ValueError(
            f"{type(model).__name__} changes hidden states outside its layers (scaled or absolute"
            " embeddings), which every pipeline stage would do again; use pp=1"
        )
