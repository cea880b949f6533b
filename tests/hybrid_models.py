"""Tiny hybrid models of transformers: every family whose mixers run on shards."""

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel
from transformers.utils import logging

VOCABULARY = 61
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
}


def _qwen3_next() -> PreTrainedModel:
    more = {"head_dim": 8, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2}
    return tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(**_COMMON | _DELTA | _EXPERTS | more))


def _qwen3_5() -> PreTrainedModel:
    return tf.Qwen3_5ForCausalLM(tf.Qwen3_5TextConfig(**_COMMON, **_DELTA, head_dim=8))


def _qwen3_5_moe() -> PreTrainedModel:
    more = {"head_dim": 8, "shared_expert_intermediate_size": 16}
    return tf.Qwen3_5MoeForCausalLM(tf.Qwen3_5MoeTextConfig(**_COMMON | _DELTA | _EXPERTS | more))


def _olmo_hybrid() -> PreTrainedModel:
    return tf.OlmoHybridForCausalLM(tf.OlmoHybridConfig(**_COMMON, **_DELTA))


def _kimi_linear() -> PreTrainedModel:
    types = {name: _DELTA[name] for name in ("num_hidden_layers", "layer_types")}
    more = {"first_k_dense_replace": 4, "linear_num_heads": 4, "linear_head_dim": 8}
    return tf.KimiLinearForCausalLM(tf.KimiLinearConfig(**_COMMON | types | _LATENT | more))


def _bailing_hybrid() -> PreTrainedModel:
    types = {name: _DELTA[name] for name in ("num_hidden_layers", "layer_types")}
    more = {"first_k_dense_replace": 4, "linear_num_heads": 4, "linear_head_dim": 8}
    return tf.BailingHybridForCausalLM(tf.BailingHybridConfig(**_COMMON | types | _LATENT | more))


def _nemotron_h() -> PreTrainedModel:
    mixers = {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "conv_kernel": 4}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    more = {"head_dim": 8, "chunk_size": 16, "moe_shared_expert_intermediate_size": 16}
    blocks = ["mamba", "moe", "attention", "mamba"]
    config = tf.NemotronHConfig(**_COMMON, layers_block_type=blocks, **mixers, **experts, **more)
    return tf.NemotronHForCausalLM(config)


def _bamba() -> PreTrainedModel:
    config = tf.BambaConfig(**_COMMON, **_MAMBA, num_hidden_layers=3, attn_layer_indices=[1])
    return tf.BambaForCausalLM(config)


def _falcon_h1() -> PreTrainedModel:
    config = tf.FalconH1Config(**_COMMON, **_MAMBA, num_hidden_layers=2, head_dim=8, mamba_d_ssm=64)
    return tf.FalconH1ForCausalLM(config)


def _granite_hybrid() -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16}
    types = {"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"]}
    return tf.GraniteMoeHybridForCausalLM(tf.GraniteMoeHybridConfig(**_COMMON, **_MAMBA, **experts, **types))


def _zamba2() -> PreTrainedModel:
    more = {
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "chunk_size": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
        "use_mem_rope": True,
    }
    return tf.Zamba2ForCausalLM(tf.Zamba2Config(**_COMMON | more))


def _lfm2() -> PreTrainedModel:
    types = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}
    return tf.Lfm2ForCausalLM(tf.Lfm2Config(**_COMMON, **types))


def _lfm2_moe() -> PreTrainedModel:
    types = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}
    return tf.Lfm2MoeForCausalLM(tf.Lfm2MoeConfig(**_COMMON, **types, **_EXPERTS, num_dense_layers=1))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "olmo_hybrid": _olmo_hybrid,
    "kimi_linear": _kimi_linear,
    "bailing_hybrid": _bailing_hybrid,
    "nemotron_h": _nemotron_h,
    "bamba": _bamba,
    "falcon_h1": _falcon_h1,
    "granite_hybrid": _granite_hybrid,
    "zamba2": _zamba2,
    "lfm2": _lfm2,
    "lfm2_moe": _lfm2_moe,
}


def hybrid(family: str) -> PreTrainedModel:
    """A tiny model of a family in fp32, the same in every process, whose recurrences matter."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = FAMILIES[family]().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            else:
                parameter.mul_(4)
    model.set_attn_implementation("eager")
    return model


_KERNELS = ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention", "mamba2_chunk_scan")


def rechunk(model: PreTrainedModel, chunk: int) -> PreTrainedModel:
    """The model with another chunk size in its kernels, which in real numbers changes nothing."""
    for mixer in model.modules():
        forward = inspect.unwrap(type(mixer).forward)
        for name in set(_KERNELS) & set(forward.__code__.co_names):
            ours = {name: partial(_with_chunks, forward.__globals__[name], chunk)}
            names = forward.__globals__ | ours
            copied = FunctionType(forward.__code__, names, "forward", forward.__defaults__)
            mixer.forward = MethodType(copied, mixer)
    return model


def _with_chunks(kernel: Callable[..., Any], chunk: int, *args: Any, **kwargs: Any) -> Any:
    return kernel(*args, **kwargs | {"chunk_size": chunk})
