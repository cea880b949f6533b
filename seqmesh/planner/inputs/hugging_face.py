"""The shape of a model from its Hugging Face config.json.

It is read only if its model_type is one whose layers are known: attention or a mixer (hybrid_configs.py),
then a feed-forward network or experts. Anything else is refused, for a wrong shape would make every
prediction wrong.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from seqmesh.planner.inputs.hybrid_configs import HybridLayers, split_hybrid
from seqmesh.planner.inputs.shape import LatentShape, MixtureShape, ModelShape
from seqmesh.planner.inputs.tables import Table, read_data, read_text, shown, unknown


@dataclass(frozen=True, kw_only=True)
class _Type:
    """How transformers reads the config.json of one model_type, from data/model_types.toml."""

    gated: bool = True
    tied: bool = False
    """tie_word_embeddings where it is absent."""
    tied_is_said: bool = False
    """Whether tie_word_embeddings must be there."""
    expansion: int | None = None
    """Feed-forward width over hidden_size where the width is absent; None: it must be there."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Keys that it names otherwise than LLaMA."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Keys whose absence does not mean null."""
    expert_width: str = ""
    """Key of the width of one expert; empty: it has none."""
    latent: bool = False
    """Whether its attention is latent, and its routers have buffers: DeepSeek-V3."""
    gated_attention: bool = False
    """Whether queries come with a gate of attention's output."""
    shared_width: str = ""
    """Key of the width of the experts that every token passes; empty: so many of the width of one."""
    shared_gate: bool = False
    """Whether what those give has a gate."""
    router_buffers: bool = False
    """Whether its routers have buffers, without latent attention."""
    full_every: int = 0
    """Where layer_types is absent, every so manyth layer sees everything, the others a window; 0: no such."""


@cache
def _types() -> Mapping[str, _Type]:
    """By model_type."""
    types: dict[str, _Type] = {}
    for family in read_data("model_types.toml")["family"]:
        kind = _Type(**{key: value for key, value in family.items() if key != "types"})
        types |= dict.fromkeys(family["types"], kind)
    return types


_MIXED: Final = ("gemma3n_text", "cohere2", "exaone4", "olmo3", "llama4_text", "gpt_neo")
_RECURRENT: Final = (
    "mamba",
    "mamba2",
    "falcon_mamba",
    "rwkv",
    "recurrent_gemma",
    "jamba",
    "minimax",
    "xlstm",
)
_OTHERWISE: Final = {
    "zamba": "shares one block of attention between layers",
    "zamba2": "shares one block of attention between layers",
    "bailing_hybrid": "gates its latent attention head by head",
}
"""Hybrid models that are not known, and why not."""
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_FULL: Final = "full_attention"
_LAYER_TYPES: Final = (_FULL, "sliding_attention")


def shape_from_config(path: Path) -> ModelShape:
    """The shape in a config.json, or in the one of this folder.

    Raises:
        ValueError: no such file, a mistake in it, or a model that is no decoder of known layers.
    """
    path = path / "config.json" if os.path.isdir(path) else path
    whole = _read_json(path)
    config, hybrid = split_hybrid(whole)
    _refuse(config)
    if "text_config" in whole:
        config, hybrid = split_hybrid(_text_config(whole))
        _refuse(config)
    model_type = config.text("model_type")
    if model_type not in _types():
        mistake = unknown("model_type", model_type, _types(), config.where)
        raise ValueError(f"{mistake}; or write its shape as [model.NAME] in a TOML file")
    kind = _types()[model_type]
    complete = replace(config, values={**kind.defaults, **config.values})
    shape = _shape(complete, kind, hybrid, f"{whole.name} config.json, model_type {model_type}")
    return replace(shape, folder=str(path.parent) if path.name == "config.json" else "")


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
    """Refuse what is not a decoder of attention and a feed-forward network, or experts of a known type."""
    model_type = config.text("model_type") if "model_type" in config else ""
    kind = _types().get(model_type, _Type())
    experts = _experts(config)
    if experts and not kind.expert_width:
        raise _refusal(config, "is a mixture of experts", f"{experts} = {config.values[experts]}")
    if config.flag("is_encoder_decoder", default=False):
        raise _refusal(config, "is an encoder-decoder", "is_encoder_decoder = true")
    if "kv_lora_rank" in config and not kind.latent:
        raise _refusal(config, "has multi-head latent attention", "kv_lora_rank")
    _refuse_layers(config, model_type)
    hidden = config.values.get("hidden_size")
    if config.values.get("word_embed_proj_dim", hidden) != hidden:
        raise _refusal(config, "embeds in another width than it computes", "word_embed_proj_dim")


def _experts(config: Table) -> str:
    """The key that says how many experts there are, if there are several; else empty."""
    return next((key for key in _EXPERTS if key in config and config.count(key, least=0) > 1), "")


def _refuse_layers(config: Table, model_type: str) -> None:
    """Refuse layers without attention, of several kinds where none are known, or of an unknown kind."""
    if model_type in _OTHERWISE:
        raise _refusal(config, _OTHERWISE[model_type], f"model_type {model_type}")
    recurrent = [shown(key) for key in config.values if key.startswith(("mamba_", "ssm_", "linear_"))]
    if not recurrent and model_type in _RECURRENT:
        recurrent = [f"model_type {model_type}"]
    if recurrent:
        raise _refusal(config, "has layers without attention", recurrent[0])
    layer_types = config.values.get("layer_types") or []
    kinds = [repr(layer_types)]
    if isinstance(layer_types, list):
        kinds = sorted({shown(str(each)) for each in layer_types})
    known = _types().get(model_type, _Type())
    if len(kinds) > 1 and not known.full_every and "use_sliding_window" not in known.defaults:
        raise _refusal(config, "mixes kinds of layers", f"layer_types {', '.join(kinds)}")
    if model_type in _MIXED:
        raise _refusal(config, "mixes kinds of layers", f"model_type {model_type}")
    unknown_kinds = [kind for kind in kinds if kind not in _LAYER_TYPES]
    if unknown_kinds:
        raise _refusal(config, "has layers of an unknown kind", f"layer_types {unknown_kinds[0]}")


def _refusal(config: Table, reason: str, evidence: str) -> ValueError:
    remedy = "give a decoder of a known model_type"
    return ValueError(
        f"{config.where}: the model {reason} ({evidence}), which the plan cannot price; {remedy}"
    )


def _shape(config: Table, kind: _Type, hybrid: HybridLayers | None, source: str) -> ModelShape:
    def key(llama: str) -> str:
        return kind.keys.get(llama, llama)

    hidden = config.count(key("hidden_size"))
    heads = config.count(key("num_attention_heads"))
    layers = config.count(key("num_hidden_layers"))
    latent = _latent(config) if kind.latent else None
    reach = _reach(config, kind, layers)
    return ModelShape(
        name=config.name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads if latent else _kv_heads(config, key("num_key_value_heads"), heads),
        head_dim=_head_dim(config, hidden, heads, latent),
        value_dim=config.count("v_head_dim") if latent else None,
        intermediate=config.count(
            key("intermediate_size"), default=kind.expansion * hidden if kind.expansion else None
        ),
        vocabulary=config.count("vocab_size"),
        gated=kind.gated,
        tied_embeddings=config.flag("tie_word_embeddings", None if kind.tied_is_said else kind.tied),
        sliding_window=reach.window,
        full_layers=reach.full_layers,
        mixture=_mixture(config, kind) if _experts(config) else None,
        latent=latent,
        gated_attention=kind.gated_attention,
        mixer=hybrid.mixer if hybrid else None,
        attention_layers=hybrid.attention_layers if hybrid else None,
        network_layers=hybrid.network_layers if hybrid else None,
        source=source,
    )


def _head_dim(config: Table, hidden: int, heads: int, latent: LatentShape | None) -> int:
    if latent is not None:
        return config.count("qk_nope_head_dim") + latent.rotary_dim
    if "head_dim" in config:
        return config.count("head_dim")
    if hidden % heads:
        raise ValueError(
            f"{config.where}: hidden size {hidden} over {heads} heads is not a whole head_dim; add head_dim"
        )
    return hidden // heads


def _latent(config: Table) -> LatentShape:
    return LatentShape(
        q_rank=config.count("q_lora_rank", least=0),
        kv_rank=config.count("kv_lora_rank"),
        rotary_dim=config.count("qk_rope_head_dim"),
    )


def _mixture(config: Table, kind: _Type) -> MixtureShape:
    width = config.count(kind.expert_width)
    if config.values.get("decoder_sparse_step", 1) != 1:
        step = config.values["decoder_sparse_step"]
        raise _refusal(config, "has experts in some of its layers only", f"decoder_sparse_step = {step}")
    dense = config.values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise _refusal(config, "has layers of an unknown kind", f"mlp_only_layers {dense!r}")
    first = config.count("first_k_dense_replace", least=0, default=0)
    shared = config.count("n_shared_experts", least=0, default=0) * width
    if kind.shared_width:
        shared = config.count(kind.shared_width, least=0)
    return MixtureShape(
        experts=config.count(_experts(config)),
        active=config.count("num_experts_per_tok"),
        intermediate=width,
        architecture="qwen3_moe" if config.text("model_type") == "qwen3_moe" else "mixtral",
        shared=shared,
        shared_gate=kind.shared_gate,
        dense_layers=first + len(dense),
        has_router_buffers=kind.latent or kind.router_buffers,
    )


def _kv_heads(config: Table, key: str, heads: int) -> int:
    """Falcon's first form says multi_query in place of a number."""
    new_form = config.flag("new_decoder_architecture", default=False)
    if config.flag("multi_query", default=False) and not new_form:
        return 1
    return config.count(key, default=heads)


class _Seen(NamedTuple):
    """What layers see."""

    window: int | None = None
    """Of the layers that have one; None: no layer has."""
    full_layers: int = 0
    """Layers that see everything beside them."""


def _reach(config: Table, kind: _Type, layers: int) -> _Seen:
    if "use_sliding_window" in config.values and not config.flag("use_sliding_window", default=False):
        return _Seen()
    layer_types = config.values.get("layer_types") or []
    if not layer_types and "sliding_window" not in config:
        return _Seen()
    full = layers // kind.full_every if kind.full_every else 0
    if isinstance(layer_types, list) and layer_types:
        different = set(layer_types)
        if len(different) > 1 and len(layer_types) != layers:
            raise ValueError(
                f"{config.where}: layer_types has {len(layer_types)} of {layers} layers; name all"
            )
        full = layers if different == {_FULL} else layer_types.count(_FULL)
    elif "use_sliding_window" in config:  # Qwen's first max_window_layers layers see everything
        full = min(layers, config.count("max_window_layers", least=0))
    return _Seen() if full == layers else _Seen(config.count("sliding_window"), full)
