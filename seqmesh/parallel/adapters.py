"""LoRA adapters of peft in a model that is made parallel: found by what they are, so that peft is not needed.

    q_proj                    the adapted linear layer, W x + scale B A x
      base_layer              W (out, in), frozen
      lora_A.NAME             A (r, in)
      lora_B.NAME             B (out, r)

Ranks of tp share W by rows or columns (tensor.py). Then they share B by the same rows, or A by the same
columns, and the other of the two, which is small, is whole on every rank.

Source: LoRA (Hu et al. 2021); peft.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqmesh.integrations.calls import holds_experts
from seqmesh.parallel.anatomy import Anatomy

Named = TypeVar("Named")
Styles = dict[str, str]
"""Name of a module or parameter -> style, as transformers resolves a plan."""
_DOWN, _UP = "lora_A", "lora_B"
_BASE = "base_layer"
_OF_PEFT = (".lora_", ".modules_to_save.")
"""In the names of all parameters that peft adds."""
_COLUMNS = "rowwise"
"""The style that shares a matrix by its columns, by the name of the activations' side."""


def is_adapter(parameter: str) -> bool:
    """Whether a parameter is A or B of an adapter, by its name."""
    return f".{_DOWN}." in parameter or f".{_UP}." in parameter


def what_trains(named: Mapping[str, Named]) -> dict[str, Named]:
    """Of what a model's parameters are, or have, by name: that of its adapters, or of all if it has none.

    Adapters of other kinds than A and B too, such as DoRA's magnitudes.
    """
    return {name: x for name, x in named.items() if any(part in name for part in _OF_PEFT)} or dict(named)


def name_without_adapters(parameter: str) -> str:
    """What a parameter is called in the model before it was adapted, and in its folder."""
    return parameter.replace(f"{_BASE}.", "")  # experts may be adapted twice


def check_adapters(model: PreTrainedModel, tp: int = 1, experts: int = 1) -> None:
    """Refuse adapters that would be left out, or shared wrongly.

    Args:
        model: adapted or not.
        tp: ranks that share its matrices.
        experts: ranks that share a layer's experts.

    Raises:
        ValueError: an adapter outside the layers, with tp another kind than plain LoRA of linear layers, or
            adapted experts that are spread.
    """
    inside = {id(module) for layer in Anatomy.of(model).layers for module in layer.modules()}
    for name, module in model.named_modules():
        if not hasattr(module, _BASE) and not hasattr(module, "modules_to_save"):
            continue
        if id(module) not in inside:
            raise ValueError(
                f"{name} is adapted, and lies outside the layers, where the loss and tp take a module's own"
                " weight; adapt modules of the layers only (target_modules)"
            )
        if experts > 1 and any(holds_experts(part) for part in module.modules()):
            raise ValueError(
                f"experts={experts} with {name}, whose adapters belong to all experts; adapt other modules,"
                " or use experts=1"
            )
        if tp > 1 and not _is_plain(module):
            raise ValueError(
                f"tp={tp} with {name}, which is adapted by more than A and B of a linear layer, whose rows"
                " and columns ranks can share; use plain LoRA, or tp=1"
            )


def adapted_styles(model: PreTrainedModel, styles: Styles) -> Styles:
    """A plan of tp in the names of the adapted model, with A and B shared as their matrix is."""
    adapted = dict(_adapted(model))
    found: Styles = {}
    for name, style in styles.items():
        if name not in adapted:
            found[name] = style
            continue
        shared = f"{_DOWN if style == _COLUMNS else _UP}."
        for part, linear in adapted[name].named_modules(prefix=name):
            own = part.removeprefix(f"{name}.")
            if own == _BASE or own.startswith(shared):
                # A plan names parameters, to share them, before the module, to have it compute with shards.
                found |= {f"{part}.{key}": style for key, _ in linear.named_parameters(recurse=False)}
                found[part] = style
    return found


def linear_of(module: str) -> str:
    """The linear layer that a module is, or is a part of if it is adapted."""
    for part in (f".{_BASE}", f".{_DOWN}.", f".{_UP}."):
        module = module.partition(part)[0]
    return module


def whole_adapters(model: PreTrainedModel, styles: Styles) -> Iterator[nn.Module]:
    """Of the A and B of matrices that are shared, those that are whole on every rank of tp."""
    for name, module in _adapted(model):
        style = styles.get(f"{name}.{_BASE}")
        if style is not None:
            yield from getattr(module, _UP if style == _COLUMNS else _DOWN).values()


def starting_values(name: str, shape: torch.Size, seed: int) -> Tensor:
    """An adapter's parameter before training, fp32: A uniform below 1 / sqrt(in), as peft has it, B zeros.

    Args:
        name: the parameter's, which with the seed says what is drawn: the same on any mesh.
        shape: (r, in) or (out, r).
        seed: of the run.
    """
    if f".{_UP}." in name:
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[-1])
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if hasattr(module, _BASE) and hasattr(module, _DOWN):
            yield name, module


def _is_plain(module: nn.Module) -> bool:
    """Whether an adapted module is a linear layer with A and B, without a bias or a magnitude of its own."""
    return (
        isinstance(getattr(module, _BASE, None), nn.Linear)
        and all(is_adapter(f".{name}") or name.startswith(_BASE) for name, _ in module.named_parameters())
        and all(part.bias is None for side in (_DOWN, _UP) for part in getattr(module, side).values())
    )
