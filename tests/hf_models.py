"""Tiny Hugging Face models, and calls of them on the 1 x 1 mesh, for the tests of the integration."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from seqmesh import Schedule, SequenceMesh, masks
from seqmesh.integrations.transformers import plug_in
from seqmesh.masks import Mask

VOCABULARY = 31
LENGTHS = [9, 1, 17, 6]
WINDOW = 5
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    },
    "gpt_oss": {"head_dim": 8, "sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
}
"""Grouped heads; norms on q and k; every layer slides; mixed layers with softcap; mixed layers with sinks."""
MIXED = ("gemma2", "gpt_oss")
"""Models of full and sliding layers."""


def model_of(kind: str, **more: Any) -> PreTrainedModel:
    """A tiny causal model in fp64, the same in every process, with transformers' own attention."""
    logging.set_verbosity_error()
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, max_position_embeddings=64, **SIZES, **ids, **KINDS.get(kind, {}), **more
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    return model.double()


def encoder_config(kind: str) -> Any:
    return AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        embedding_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels shifted inside documents, positions that restart: (1, s) each."""
    ids = torch.randint(2, VOCABULARY, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    labels[0, torch.tensor(LENGTHS).cumsum(0) - 1] = -100
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return ids, labels, positions


def both_masks() -> tuple[Mask, Mask]:
    """Of full layers and of sliding ones."""
    documents = masks.documents(LENGTHS)
    return documents, documents & masks.sliding_window(sum(LENGTHS), WINDOW)


def plugged(**more: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A llama on the 1 x 1 mesh, and a call that works."""
    ids, _, positions = inputs()
    schedule = Schedule.build(masks.documents(LENGTHS), SequenceMesh.build())
    call = {"input_ids": ids, "position_ids": positions, "schedule": schedule}
    return plug_in(model_of("llama", **more)), call


def refusal(function: Any, *args: Any, **kwargs: Any) -> str:
    """The message of a ValueError, which must be one line."""
    with pytest.raises(ValueError, match=r"\S") as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)
