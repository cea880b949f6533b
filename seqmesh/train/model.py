"""The model of a run, as transformers has it: from the keys of a recipe, or from a folder (folder.py)."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from seqmesh.integrations.layers import FULL
from seqmesh.integrations.refusals import check_pluggable
from seqmesh.train import folder as folders
from seqmesh.train.config import Config, ModelConfig
from seqmesh.train.data import TokenIds, tokenizer_of
from seqmesh.train.lora import adapt
from seqmesh.train.sizes import ModelSizes

_REMEDY = (
    "give a folder with its config.json as model.folder, or use llama, mistral, qwen2, ..., or with experts"
    " mixtral, qwen3_moe"
)


def build(config: Config, vocabulary: TokenIds | None = None) -> PreTrainedModel:
    """The model with random weights from the run's seed, the same wherever it is made, and its adapters.

    Weights are fp32, but for those beside adapters: they are what layers compute in.

    Args:
        config: the run.
        vocabulary: of the text; default: that of the recipe's tokenizer.

    Raises:
        ValueError: an architecture that transformers does not know, that has other dimensions, or that cannot
            be plugged in; a folder without a model; too small a vocabulary; no tokenizer.
    """
    known = vocabulary or tokenizer_of(config.data.tokenizer).vocabulary
    if config.model.folder:
        built = folders.build_random(config.model.folder, config.train.seed)
        _check_rows(config, built.config.vocab_size, known)
        check_pluggable(built)
        computes_in = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        return adapt(built, config.lora, config.train.seed, computes_in)
    built = _from_keys(config, known)
    check_pluggable(built)
    _check_sizes(built, config.model)
    return built


def build_hollow(config: Config, vocabulary: TokenIds | None = None) -> PreTrainedModel:
    """The same on the meta device, without memory."""
    with torch.device("meta"):
        return build(config, vocabulary)


def sizes_of(config: Config, hollow: PreTrainedModel | None = None) -> ModelSizes:
    """What the model's layers compute, without memory for it.

    Args:
        config: the run.
        hollow: what `build_hollow` made, if somebody has it; it is not changed.

    Raises:
        ValueError: layers of the keys' architecture that do not see what the keys say; what `build` raises.
    """
    hollow = hollow or build_hollow(config)
    sizes = ModelSizes.of(hollow)
    if not config.model.folder:
        _check_window(config.model, hollow.config, sizes)
    return sizes


def _from_keys(config: Config, vocabulary: TokenIds) -> PreTrainedModel:
    """The model of [model]'s keys, whether or not it has the sizes that they say."""
    model = config.model
    if model.architecture not in CONFIG_MAPPING:
        raise ValueError(
            f"model.architecture={model.architecture!r} is not a model type of transformers;"
            " use llama, mistral, qwen2, ..."
        )
    rows = model.vocabulary or vocabulary.size
    _check_rows(config, rows, vocabulary)
    torch.manual_seed(config.train.seed)
    try:
        given = _transformers_config(model, config.data.seq_len, rows, vocabulary)
        built = AutoModelForCausalLM.from_config(given, dtype=torch.float32)
    # Each configuration class of transformers has checks, and exceptions, of its own.
    except Exception as error:
        what = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.architecture={model.architecture!r} refuses [model] ({what});"
            " use llama, mistral, qwen2, ..."
        ) from None
    return built


def _check_rows(config: Config, rows: int, vocabulary: TokenIds) -> None:
    if rows >= vocabulary.size:
        return
    whose = f"tokens of data.tokenizer={config.data.tokenizer!r}" if config.data.tokenizer else "byte tokens"
    if config.model.folder:
        raise ValueError(
            f"vocab_size={rows} of model.folder={config.model.folder!r} for {whose}, of which there are"
            f" {vocabulary.size}; use the model's own tokenizer as data.tokenizer"
        )
    raise ValueError(
        f"model.vocabulary={rows} for {whose}, of which there are {vocabulary.size}; use at least so"
        " many, or 0"
    )


def _transformers_config(
    model: ModelConfig, seq_len: int, rows: int, vocabulary: TokenIds
) -> PreTrainedConfig:
    """The recipe's sizes in transformers' names, with its window and its experts where there are some."""
    return AutoConfig.for_model(
        model.architecture,
        **_window(model),
        **_mixture(model),
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.elements_of_head,
        intermediate_size=model.intermediate,
        vocab_size=rows,
        max_position_embeddings=seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=None,
        eos_token_id=vocabulary.end,
        pad_token_id=vocabulary.padding,
    )


def _window(model: ModelConfig) -> dict[str, Any]:
    """The window, or none, where the architecture has one."""
    default = CONFIG_MAPPING[model.architecture]()
    given: dict[str, Any] = {}
    if hasattr(default, "sliding_window"):
        given["sliding_window"] = model.window or None
    if hasattr(default, "use_sliding_window"):  # Qwen: in the layers after the first max_window_layers
        given |= {"use_sliding_window": model.window > 0, "max_window_layers": 0}
    return given


def _mixture(model: ModelConfig) -> dict[str, Any]:
    """Experts in all layers; weights of a token's experts add up to 1, as in published models."""
    if not model.experts:
        return {}
    default = CONFIG_MAPPING[model.architecture]()
    given: dict[str, Any] = {"num_experts_per_tok": model.experts_per_token}
    name = "num_local_experts" if hasattr(default, "num_local_experts") else "num_experts"
    given[name] = model.experts
    if hasattr(default, "moe_intermediate_size"):
        given["moe_intermediate_size"] = model.intermediate
    if hasattr(default, "norm_topk_prob"):
        given["norm_topk_prob"] = True
    return given


def _check_window(model: ModelConfig, config: PreTrainedConfig, sizes: ModelSizes) -> None:
    """An architecture may leave out the window, or have it in some layers only, or chunks."""
    found = {call.chunk or call.window for call in sizes.calls}
    types = set(getattr(config, "layer_types", None) or ())
    # Layers of a sliding type without a window are no model that anyone else would load.
    if found == {model.window or None} and (model.window or types <= {FULL}):
        return
    if model.window and found == {None}:
        raise ValueError(
            f"model.window={model.window} with model.architecture={model.architecture!r}, whose layers have"
            " no sliding window; use mistral, qwen2, ..., or model.window=0"
        )
    raise ValueError(
        f"model.architecture={model.architecture!r} has sliding windows, or chunks, in some of its layers;"
        " give a folder with its config.json as model.folder, or use llama, mistral, qwen2, ..."
    )


def _check_sizes(built: PreTrainedModel, model: ModelConfig) -> None:
    """An architecture that names its sizes differently would ignore the recipe."""
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    queries = [shape for name, shape in shapes.items() if name.endswith("self_attn.q_proj.weight")]
    keys = [shape for name, shape in shapes.items() if name.endswith("self_attn.k_proj.weight")]
    q_shape = (model.heads * model.elements_of_head, model.hidden)
    k_shape = (model.kv_heads * model.elements_of_head, model.hidden)
    if queries != [q_shape] * model.layers or keys != [k_shape] * model.layers:
        raise ValueError(
            f"model.architecture={model.architecture!r} is not a decoder with the dimensions of [model];"
            f" {_REMEDY}"
        )
    # Weights of experts are known by their third dim.
    has_experts = any(len(shape) > 2 for shape in shapes.values())
    if has_experts != (model.experts > 0):
        have, remedy = ("have", "set it") if has_experts else ("have no", "use mixtral, qwen3_moe")
        raise ValueError(
            f"model.experts={model.experts} with model.architecture={model.architecture!r}, whose layers"
            f" {have} experts; {remedy}, or another architecture"
        )
    if has_experts:
        _check_experts(shapes, model)


def _check_experts(shapes: dict[str, tuple[int, ...]], model: ModelConfig) -> None:
    """Layers that share an expert, or have biases or another router, are no models of these keys."""
    said = {
        "gate.weight": (model.experts, model.hidden),
        "experts.gate_up_proj": (model.experts, 2 * model.intermediate, model.hidden),
        "experts.down_proj": (model.experts, model.hidden, model.intermediate),
    }
    for layer in range(model.layers):
        start = f"model.layers.{layer}.mlp."
        found = {name.removeprefix(start): shape for name, shape in shapes.items() if name.startswith(start)}
        if found == said:
            continue
        others = (found.keys() - said.keys()) or {name for name in found if found[name] != said[name]}
        other = min(others, default="")
        what = f"has {start}{other} of {found[other]}" if other else f"lacks experts in layer {layer}"
        raise ValueError(
            f"model.architecture={model.architecture!r} {what}, which the keys of [model] do not say; give a"
            " folder with its config.json as model.folder, or use mixtral, qwen3_moe"
        )
