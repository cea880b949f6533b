"""Folders of tiny Hugging Face models, with weights and without, for the tests of [model] folder."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

WINDOW = 23
"""Shorter than some documents of the tests, longer than others."""
COMMON: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
KINDS: dict[str, dict[str, Any]] = {
    # few K/V heads, whose dim is not hidden / heads
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    # full and sliding layers in turn; caps, scaled embeddings
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": WINDOW},
    "mistral": {"num_key_value_heads": 2, "head_dim": 4, "sliding_window": WINDOW},
    # scales what the embedding gives
    "granite": {"num_key_value_heads": 2, "embedding_multiplier": 3.0},
    "llama4_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 17,
        "layer_types": ["chunked_attention", "full_attention"] * 2,
    },
    "mixtral": {
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
    },
    "qwen3_next": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "olmo_hybrid": {
        "num_key_value_heads": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "bamba": {
        "num_key_value_heads": 2,
        "attn_layer_indices": [1, 3],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    },
    "lfm2": {
        "num_key_value_heads": 2,
        "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "gpt_oss": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
    },
}


def config_of(kind: str, **more: Any) -> PreTrainedConfig:
    """A tiny configuration."""
    return AutoConfig.for_model(kind, **(COMMON | KINDS[kind] | more))


def save_config(kind: str, folder: Path, **more: Any) -> str:
    """A folder with a config.json and no weights."""
    config_of(kind, **more).save_pretrained(folder)
    return str(folder)


def save_model(kind: str, folder: Path, **more: Any) -> str:
    """A folder with weights too, in several files. Not those that any seed of a run makes."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(4321)
    model = AutoModelForCausalLM.from_config(config_of(kind, **more), dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="60KB")
    return str(folder)
