"""LoRA adapters in the model of a run: put in by peft before it is made parallel, written as peft reads them.

    adapt    q_proj -> q_proj.base_layer, frozen, with q_proj.lora_A.default and q_proj.lora_B.default
    save     adapter_config.json, adapter_model.safetensors: PeftModel.from_pretrained(model, FOLDER)

A run's checkpoints hold the adapters alone: the rest comes from model.folder again.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqmesh.parallel.adapters import is_adapter, starting_values
from seqmesh.train.config.lora import ALL_LINEAR, AdapterConfig
from seqmesh.train.paths import expanded

_PREFIX = "base_model.model."
"""What peft puts before a model's own names."""
_ADAPTER = ".default."
"""The adapter's name inside a model, which files leave out."""


def adapt(
    model: PreTrainedModel, settings: AdapterConfig, seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Put adapters into a model, which train alone from then on. Nothing is done if none are asked for.

    Args:
        model: with weights, or on the meta device; changed in place.
        settings: rank 0 asks for none.
        seed: of the A matrices.
        dtype: of the weights that stay. What layers compute in is enough: nothing is added to them.

    Returns:
        The model.

    Raises:
        ValueError: peft is not installed, or names that are no linear layers of the model.
    """
    if not settings.rank:
        return model
    peft = _peft()
    try:
        with warnings.catch_warnings(), torch.device("meta"):  # their values are ours
            # Of patterns for modules that other models have, and of a name in transformers.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern", RuntimeWarning)
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            peft.inject_adapter_in_model(_peft_config(settings), model)
    except ValueError as error:
        what = str(error).strip().splitlines()[0]
        raise ValueError(
            f"lora.targets={settings.targets!r} with {type(model).__name__} ({what}); name its linear layers"
        ) from None
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, own = name.rpartition(".")
        if id(parameter) not in made:  # tied weights stay one
            made[id(parameter)] = _started(name, parameter, seed, dtype)
        setattr(model.get_submodule(owner), own, made[id(parameter)])
    return model


def _started(name: str, parameter: nn.Parameter, seed: int, dtype: torch.dtype) -> nn.Parameter:
    """An adapter's parameter as training begins, or one that stays."""
    if is_adapter(name):
        return nn.Parameter(starting_values(name, parameter.shape, seed))
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)


def save(settings: AdapterConfig, model_folder: str, weights: dict[str, Tensor], folder: Path) -> None:
    """Write adapters as peft does.

    Args:
        settings: of the run.
        model_folder: what they adapt.
        weights: A and B by their names in the model, whole, on the host.
        folder: is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = _peft_config(settings)
    adapted = expanded(model_folder, "model.folder=", "model.folder")
    described.base_model_name_or_path = str(adapted.absolute())
    described.inference_mode = True
    described.save_pretrained(folder)
    named = {_PREFIX + name.replace(_ADAPTER, "."): weight.contiguous() for name, weight in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft_config(settings: AdapterConfig) -> Any:
    names = ALL_LINEAR if settings.targets == ALL_LINEAR else settings.names
    return _peft().LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=names, task_type="CAUSAL_LM"
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("lora.rank needs peft; pip install peft, or leave lora.rank out") from None
    return peft
