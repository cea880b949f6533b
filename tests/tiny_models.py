"""A tiny model of every causal architecture of transformers: sizes are set wherever a configuration has them.

Nothing is known about an architecture but what `MORE` says of a few. The sweep (test_model_sweep.py) builds
all of them.
"""

from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

VOCABULARY = 31
WINDOW = 5
CHUNK = 6
MOST_PARAMETERS = 20_000_000
"""A model that is larger all the same is looked at without memory, and must be refused."""

SIZES: dict[int, tuple[str, ...]] = {
    32: ("hidden_size", "n_embd", "d_model", "dim", "model_dim", "embedding_size"),
    4: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"),
        *("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"),
        *("num_decoder_attention_heads", "num_local_experts", "num_experts", "n_routed_experts"),
        *("moe_num_experts", "num_moe_experts"),
    ),
    48: (
        *("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "intermediate_size_mlp"),
        *("ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
        *("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"),
    ),
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input"),
    64: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"),
    8: (
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_head_dim",
        "head_dim",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
    ),
    6: ("v_head_dim", "attention_chunk_size"),
    5: ("sliding_window", "attention_window"),
    2: (
        *("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"),
        *("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "num_experts_per_tok"),
        *("num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
    ),
    1: (
        *("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"),
        *("num_expert_group", "first_k_dense_replace", "num_dense_layers", "bos_token_id", "eos_token_id"),
    ),
    0: ("pad_token_id",),
    12: ("q_lora_rank",),
    16: ("qk_head_dim",),
    10: ("kv_lora_rank",),
}
SET_IF_NONE = (
    *("head_dim", "num_key_value_heads", "num_experts_per_tok"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""None means "derived" there; of other sizes it means "not in this model"."""
RANDOM = ("dropout", "pdrop", "layerdrop", "jitter")
"""Parts of the names of what would make two runs differ."""

MORE: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 48}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "longcat_flash": {"zero_expert_num": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"layer_types": ["chunked_attention"] * 3 + ["full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "prophetnet": {"num_encoder_layers": 2},
    "reformer": {"axial_pos_embds": False},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_headdim": 8, "num_mem_blocks": 1},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}

NOT_TRIED: dict[str, str] = {
    "cohere_compass_text": "cannot be built without its own layer types",
    "dots3_note_text": "its layers differ in their numbers of heads",
    "emu3": "its language model is a Llama",
    "gemma3n": "needs a package for images",
    "gemma3n_text": "shares caches between layers, which needs more of them",
    "gemma4_assistant": "shares caches between layers, which needs more of them",
    "gemma4_unified_assistant": "shares caches between layers, which needs more of them",
    "llama4": "its language model is llama4_text",
    "mllama": "its language model has cross-attention to images",
    "musicgen": "has no sizes of its own",
    "musicgen_melody": "has no sizes of its own",
    "qwen3_5": "its language model is qwen3_5_text",
    "qwen3_5_moe": "its language model is qwen3_5_moe_text",
    "qwen4_exp": "its language model is qwen4_exp_text",
    "qwen4_exp_text": "cannot be built without sizes of its own layers",
    "zamba": "its shared layers need more layers",
}
"""Why the sweep has no tiny model of it."""


@cache
def _value_of() -> dict[str, int]:
    return {name: value for value, names in SIZES.items() for name in names}


def config_of(kind: str, **more: Any) -> PreTrainedConfig:
    """A tiny configuration of a model type."""
    given: dict[str, Any] = {}
    defaults = CONFIG_MAPPING[kind]().to_dict()
    for name, default in defaults.items():
        value = _value_of().get(name)
        if value is not None and (type(default) is int or (default is None and name in SET_IF_NONE)):
            given[name] = value
        elif any(part in name for part in RANDOM) and isinstance(default, float):
            given[name] = 0.0
    if "kv_lora_rank" in given:  # latent attention: a key and a value for every query head
        given["num_key_value_heads"] = given["num_attention_heads"]
        given["head_dim"] = given["qk_rope_head_dim"]
    if defaults.get("is_decoder") is False and not defaults.get("is_encoder_decoder"):
        given["is_decoder"] = True
    return CONFIG_MAPPING[kind](**given | MORE.get(kind, {}) | more)


def build(kind: str, *, device: str = "cpu", **more: Any) -> PreTrainedModel:
    """The model in fp64, the same in every process, with transformers' own attention."""
    logging.set_verbosity_error()
    config = config_of(kind, **more)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )
    return model.double()


def size(model: PreTrainedModel) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
