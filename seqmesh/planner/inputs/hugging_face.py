"""The shape of a model from its Hugging Face config.json.

It is read only if its model_type is one whose layers are known to be all alike: attention, then a
feed-forward network. Anything else is refused, for a wrong shape would make every prediction wrong.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.inputs.tables import Table, read_text, shown, unknown


@dataclass(frozen=True, kw_only=True)
class _Type:
    """How transformers reads the config.json of one model_type."""

    gated: bool = True
    tied: bool | None = False
    """tie_word_embeddings where it is absent; None: it must be there."""
    expansion: int | None = None
    """Feed-forward width over hidden_size where the width is absent; None: it must be there."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Keys that it names otherwise than LLaMA."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Keys whose absence does not mean null."""


_GPT2: Final = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
}
_FALCON: Final = {"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"}
_QWEN: Final = {"num_key_value_heads": 32, "use_sliding_window": False, "max_window_layers": 28}
_QWEN_VL: Final = _Type(
    tied=None, defaults={"num_key_value_heads": 8, "use_sliding_window": False, "max_window_layers": 80}
)

_TYPES: Final[Mapping[str, _Type]] = {
    **dict.fromkeys(("llama", "phi3", "olmo", "olmo2", "granite"), _Type()),
    "mistral": _Type(defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "ministral3": _Type(defaults={"num_key_value_heads": 8, "head_dim": 128}),
    "qwen2": _Type(defaults=_QWEN),
    "qwen3": _Type(defaults=_QWEN | {"head_dim": 128}),
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), _QWEN_VL),
    "gemma": _Type(tied=True, defaults={"num_key_value_heads": 16, "head_dim": 256}),
    "stablelm": _Type(defaults={"num_key_value_heads": 32}),
    **dict.fromkeys(("glm", "glm4"), _Type(defaults={"num_key_value_heads": 2, "head_dim": 128})),
    "seed_oss": _Type(defaults={"num_key_value_heads": 8, "head_dim": 128}),
    "cohere": _Type(tied=True),
    "starcoder2": _Type(gated=False, tied=True, defaults={"num_key_value_heads": 2}),
    **dict.fromkeys(("phi", "gpt_neox"), _Type(gated=False)),
    "gpt2": _Type(gated=False, tied=True, expansion=4, keys=_GPT2),
    "opt": _Type(gated=False, tied=True, keys={"intermediate_size": "ffn_dim"}),
    "falcon": _Type(gated=False, tied=True, expansion=4, keys=_FALCON, defaults={"multi_query": True}),
}
"""The model types whose layers are all alike, with transformers' defaults."""

_MIXED: Final = (
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "cohere2",
    "exaone4",
    "gpt_oss",
    "olmo3",
    "llama4_text",
    "gpt_neo",
)
_RECURRENT: Final = ("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "lfm2", "xlstm")
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_LAYER_TYPES: Final = ("full_attention", "sliding_attention")


def shape_from_config(path: Path) -> ModelShape:
    """The shape in a config.json, or in the one of this folder.

    Raises:
        ValueError: no such file, a mistake in it, or a model that is not a dense decoder with equal layers.
    """
    path = path / "config.json" if os.path.isdir(path) else path
    whole = _read_json(path)
    _refuse(whole)
    config = whole
    if "text_config" in whole:
        config = _text_config(whole)
        _refuse(config)
    model_type = config.text("model_type")
    if model_type not in _TYPES:
        mistake = unknown("model_type", model_type, _TYPES, config.where)
        raise ValueError(f"{mistake}; or write its shape as [model.NAME] in a TOML file")
    kind = _TYPES[model_type]
    complete = replace(config, values={**kind.defaults, **config.values})
    return _shape(complete, kind, f"{whole.name} config.json, model_type {model_type}")


def _text_config(whole: Table) -> Table:
    """The decoder inside a model of text and images; whether its embeddings are tied may stand outside."""
    text = whole.table("text_config")
    tie = "tie_word_embeddings"
    tied = (text if tie in text else whole).values.get(tie)
    return replace(text, name=whole.name, values={**text.values, tie: tied})


def _read_json(path: Path) -> Table:
    form = "a Hugging Face config.json or the folder that holds it"
    text = read_text(path, form)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}; give {form}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object at its top; give {form}")
    place = Path(os.path.abspath(path))
    return Table(
        name=(place.parent.name if place.name == "config.json" else place.stem) or "config",
        where=repr(str(path)),
        values=values,
    )


def _refuse(config: Table) -> None:
    """Refuse what is not a decoder of equal layers of attention and a dense feed-forward network."""
    experts = [key for key in _EXPERTS if key in config and config.count(key, least=0) > 1]
    if experts:
        raise _refusal(config, "is a mixture of experts", f"{experts[0]} = {config.values[experts[0]]}")
    if config.flag("is_encoder_decoder", default=False):
        raise _refusal(config, "is an encoder-decoder", "is_encoder_decoder = true")
    if "kv_lora_rank" in config:
        raise _refusal(config, "has multi-head latent attention", "kv_lora_rank")
    _refuse_layers(config)
    hidden = config.values.get("hidden_size")
    if config.values.get("word_embed_proj_dim", hidden) != hidden:
        raise _refusal(config, "embeds in another width than it computes", "word_embed_proj_dim")


def _refuse_layers(config: Table) -> None:
    """Refuse layers without attention, of several kinds, or of a kind that is not known."""
    model_type = config.text("model_type") if "model_type" in config else ""
    recurrent = [shown(key) for key in config.values if key.startswith(("mamba_", "ssm_", "linear_"))]
    if not recurrent and model_type in _RECURRENT:
        recurrent = [f"model_type {model_type}"]
    if recurrent:
        raise _refusal(config, "has layers without attention", recurrent[0])
    layer_types = config.values.get("layer_types") or []
    kinds = [repr(layer_types)]
    if isinstance(layer_types, list):
        kinds = sorted({shown(str(each)) for each in layer_types})
    if len(kinds) > 1:
        raise _refusal(config, "mixes kinds of layers", f"layer_types {', '.join(kinds)}")
    if model_type in _MIXED:
        raise _refusal(config, "mixes kinds of layers", f"model_type {model_type}")
    if kinds and kinds[0] not in _LAYER_TYPES:
        raise _refusal(config, "has layers of an unknown kind", f"layer_types {kinds[0]}")


def _refusal(config: Table, reason: str, evidence: str) -> ValueError:
    remedy = "give a dense decoder whose layers are all alike"
    return ValueError(
        f"{config.where}: the model {reason} ({evidence}), which the plan cannot price; {remedy}"
    )


def _shape(config: Table, kind: _Type, source: str) -> ModelShape:
    def key(llama: str) -> str:
        return kind.keys.get(llama, llama)

    hidden = config.count(key("hidden_size"))
    heads = config.count(key("num_attention_heads"))
    layers = config.count(key("num_hidden_layers"))
    if "head_dim" not in config and hidden % heads:
        raise ValueError(
            f"{config.where}: hidden size {hidden} over {heads} heads is not a whole head_dim; add head_dim"
        )
    width = key("intermediate_size")
    if kind.expansion and width not in config:
        intermediate = kind.expansion * hidden
    else:
        intermediate = config.count(width)
    return ModelShape(
        name=config.name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(config, key("num_key_value_heads"), heads),
        head_dim=config.count("head_dim") if "head_dim" in config else hidden // heads,
        intermediate=intermediate,
        vocabulary=config.count("vocab_size"),
        gated=kind.gated,
        tied_embeddings=config.flag("tie_word_embeddings", kind.tied),
        sliding_window=_window(config, layers),
        source=source,
    )


def _kv_heads(config: Table, key: str, heads: int) -> int:
    """Falcon's first form says multi_query in place of a number."""
    new_form = config.flag("new_decoder_architecture", default=False)
    if config.flag("multi_query", default=False) and not new_form:
        return 1
    return config.count(key) if key in config else heads


def _window(config: Table, layers: int) -> int | None:
    """The window of every layer; None where no layer has one."""
    if "use_sliding_window" in config.values and not config.flag("use_sliding_window", default=False):
        return None
    layer_types = config.values.get("layer_types")
    if isinstance(layer_types, list) and layer_types:
        return config.count("sliding_window") if layer_types[0] == "sliding_attention" else None
    if "sliding_window" not in config:
        return None
    # Qwen's first max_window_layers layers see everything, those after them a window.
    full = config.count("max_window_layers", least=0) if "use_sliding_window" in config else 0
    if 0 < full < layers:
        raise _refusal(config, "mixes kinds of layers", f"max_window_layers = {full} of {layers}")
    return config.count("sliding_window") if full == 0 else None
