"""Models that peft has wrapped: the transformers model inside has the adapters, so it is what we work on."""

from typing import Any, Protocol, runtime_checkable

from torch import nn
from transformers import PreTrainedModel


@runtime_checkable
class PeftModel(Protocol):
    """What is used of peft's class, so that peft need not be installed."""

    peft_config: Any

    def get_base_model(self) -> PreTrainedModel:
        """The transformers model inside, whose layers have the adapters."""


def innermost(module: nn.Module) -> nn.Module:
    """What adapters have been put around, one or several; any other module as it is."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside a PeftModel; anything else as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
