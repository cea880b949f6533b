"""Models that peft has wrapped: the transformers model inside has the adapters, so it is what we work on."""

from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedModel


@runtime_checkable
class PeftModel(Protocol):
    """What is used of peft's class, so that peft need not be installed."""

    peft_config: Any

    def get_base_model(self) -> PreTrainedModel:
        """The transformers model inside, whose layers have the adapters."""


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside a PeftModel; anything else as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
