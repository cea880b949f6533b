"""The model of a run and its arithmetic: building it, and its FLOPs.

MFU = model FLOPs / (seconds x peak). Model FLOPs of a step, forward + backward (backward = 2 x forward):

    6 x matmul weights x tokens  +  12 x layers x area x heads x head_dim

where area is the number of allowed (query, key) pairs, exactly.

(2 FLOPs per weight and token forward; QK^T and PV are 2 x 2 x head_dim FLOPs per pair and head forward.) The
PaLM convention takes seq_len^2 pairs instead; we report both and say which is which.
"""

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from seqmesh.integrations.refusals import check_pluggable
from seqmesh.train.config import Config, ModelConfig
from seqmesh.train.data import TokenIds, tokenizer_of


def build(config: Config, vocabulary: TokenIds | None = None) -> PreTrainedModel:
    """The model with random fp32 weights from the run's seed, the same wherever it is made.

    Args:
        config: the run.
        vocabulary: of the text; default: that of the recipe's tokenizer.

    Raises:
        ValueError: an architecture that transformers does not know, that has other dimensions, or that cannot
            be plugged in; too small a vocabulary; no tokenizer.
    """
    model = config.model
    if model.architecture not in CONFIG_MAPPING:
        raise ValueError(
            f"model.architecture={model.architecture!r} is not a model type of transformers;"
            " use llama, mistral, qwen2, ..."
        )
    known = vocabulary or tokenizer_of(config.data.tokenizer).vocabulary
    rows = embedding_rows(config, known)
    torch.manual_seed(config.train.seed)
    try:
        given = _transformers_config(model, config.data.seq_len, rows, known)
        built = AutoModelForCausalLM.from_config(given, dtype=torch.float32)
    # Each configuration class of transformers has checks, and exceptions, of its own.
    except Exception as error:
        what = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.architecture={model.architecture!r} refuses [model] ({what});"
            " use llama, mistral, qwen2, ..."
        ) from None
    check_pluggable(built)
    _check_layers_see_whole_documents(built, model)
    _check_sizes(built, model)
    return built


def embedding_rows(config: Config, vocabulary: TokenIds) -> int:
    """Token ids of the model: the recipe's, or those of the text.

    Raises:
        ValueError: fewer than the text's.
    """
    asked = config.model.vocabulary
    if 0 < asked < vocabulary.size:
        whose = (
            f"tokens of data.tokenizer={config.data.tokenizer!r}" if config.data.tokenizer else "byte tokens"
        )
        raise ValueError(
            f"model.vocabulary={asked} for {whose}, of which there are {vocabulary.size}; use at least so"
            " many, or 0"
        )
    return asked or vocabulary.size


def _transformers_config(
    model: ModelConfig, seq_len: int, rows: int, vocabulary: TokenIds
) -> PreTrainedConfig:
    """The recipe's sizes in transformers' names, without a sliding window where the architecture has one.

    A batch has one schedule, of whole documents, for all layers.
    """
    no_window: dict[str, None] = {}
    if hasattr(CONFIG_MAPPING[model.architecture](), "sliding_window"):
        no_window = {"sliding_window": None}
    return AutoConfig.for_model(
        model.architecture,
        **no_window,
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate,
        vocab_size=rows,
        max_position_embeddings=seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=None,
        eos_token_id=vocabulary.end,
        pad_token_id=vocabulary.padding,
    )


def _check_layers_see_whole_documents(built: PreTrainedModel, model: ModelConfig) -> None:
    """Layers that slide (gemma2, olmo3, ...) would be refused at the first long document: too late."""
    windows = [getattr(module, "sliding_window", None) for module in built.modules()]
    layer_types = set(getattr(built.config, "layer_types", None) or ())
    if any(window is not None for window in windows) or layer_types - {"full_attention"}:
        raise ValueError(
            f"model.architecture={model.architecture!r} has layers that do not attend to whole documents"
            " (sliding windows);"
            " use llama, mistral, qwen2, ..., whose layers all can"
        )


def _check_sizes(built: PreTrainedModel, model: ModelConfig) -> None:
    """An architecture that names its sizes differently would ignore the recipe.

    One with experts has other FLOPs; its weights are known by their third dim.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    queries = [shape for name, shape in shapes.items() if name.endswith("self_attn.q_proj.weight")]
    keys = [shape for name, shape in shapes.items() if name.endswith("self_attn.k_proj.weight")]
    q_shape = (model.hidden, model.hidden)
    k_shape = (model.kv_heads * model.head_dim, model.hidden)
    if (
        queries != [q_shape] * model.layers
        or keys != [k_shape] * model.layers
        or any(len(shape) > 2 for shape in shapes.values())
    ):
        raise ValueError(
            f"model.architecture={model.architecture!r} is not a dense decoder"
            " with the dimensions of [model];"
            " use llama, mistral, qwen2, ..."
        )


def count_parameters(config: Config, vocabulary: TokenIds | None = None) -> tuple[int, int]:
    """All parameters of the whole model, and the weights of its linear layers, output embedding included."""
    with torch.device("meta"):
        model = build(config, vocabulary)
    matmul = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    return sum(parameter.numel() for parameter in model.parameters()), matmul


def step_flops(*, matmul_parameters: int, tokens: int, model: ModelConfig, area: int) -> float:
    """FLOPs of one forward and backward, see the top of the file."""
    of_matmuls = 6.0 * matmul_parameters * tokens
    of_attention = 12.0 * model.layers * area * model.heads * model.head_dim
    return of_matmuls + of_attention
