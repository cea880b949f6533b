"""Config.json files of hybrid models: their layers that carry a state, and the rest as a decoder's.

Each family names them in its own words. A reader takes these out of the config, and says the rest in the
words of hugging_face.py, which goes on from there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from seqmesh.planner.inputs.mixers import ConvolutionMixer, DeltaMixer, Mixer, ScanMixer
from seqmesh.planner.inputs.tables import Table

_ATTENTION: Final = ("full_attention", "attention")
_MIXING: Final = ("linear_attention", "mamba", "conv")
_BLOCKS: Final = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
"""Letters of Nemotron-H's hybrid_override_pattern."""
_OWN: Final = ("mamba_", "ssm_", "linear_", "layer_types", "layers_block_type")
"""How keys begin that readers take out."""


@dataclass(frozen=True, kw_only=True)
class HybridLayers:
    """What a reader finds."""

    mixer: Mixer
    attention_layers: int
    network_layers: int | None = None
    """None: all."""
    values: Mapping[str, object] = field(default_factory=dict)
    """Keys in place of the config's; None: none."""


def split_hybrid(config: Table) -> tuple[Table, HybridLayers | None]:
    """A config without what is a hybrid model's alone, and that; or the config as it is, and None.

    Raises:
        ValueError: a key that is missing or wrong, or layers of an unknown kind.
    """
    model_type = config.text("model_type") if "model_type" in config else ""
    if model_type not in _READERS:
        return config, None
    found = _READERS[model_type](config)
    rest = {key: value for key, value in config.values.items() if not key.startswith(_OWN)}
    return replace(config, values={**rest, **found.values}), found


def _kinds(config: Table, otherwise: Sequence[str] = ()) -> list[str]:
    """The kind of each layer; `otherwise` where the config does not say."""
    given = config.values.get("layer_types") or config.values.get("layers_block_type") or list(otherwise)
    known = (*_ATTENTION, *_MIXING)
    if not isinstance(given, list) or not given or any(kind not in known for kind in given):
        raise ValueError(
            f"{config.where}: layer_types {given!r} is not a list of {', '.join(known)}; name each layer's"
        )
    if len(given) != config.count("num_hidden_layers"):
        raise ValueError(
            f"{config.where}: layer_types has {len(given)} of {config.count('num_hidden_layers')} layers;"
            " name all"
        )
    return given


def _mixing(kinds: Sequence[str]) -> int:
    return sum(kind in _MIXING for kind in kinds)


def _delta(config: Table) -> HybridLayers:
    """Qwen3-Next, Qwen3.5, OLMo hybrid: every fourth layer has attention where they do not say."""
    every = config.count("full_attention_interval", default=4)
    layers = range(config.count("num_hidden_layers"))
    kinds = _kinds(config, [_MIXING[0] if (i + 1) % every else _ATTENTION[0] for i in layers])
    mixer = DeltaMixer(
        layers=_mixing(kinds),
        heads=config.count("linear_num_value_heads"),
        key_heads=config.count("linear_num_key_heads"),
        key_dim=config.count("linear_key_head_dim"),
        value_dim=config.count("linear_value_head_dim"),
        width=config.count("linear_conv_kernel_dim") - 1,
    )
    # A mixture in all layers has no width of another network.
    width = config.values.get("intermediate_size") or config.values.get("moe_intermediate_size")
    values = {"intermediate_size": width}
    return HybridLayers(mixer=mixer, attention_layers=len(kinds) - mixer.layers, values=values)


def _kimi(config: Table) -> HybridLayers:
    """Kimi-Linear, as published or as transformers saves it."""
    layers = config.count("num_hidden_layers")
    own = config.table("linear_attn_config")
    attends = own.values.get("full_attn_layers") or [i + 1 for i in range(4, layers, 4)]
    if not isinstance(attends, list):
        raise ValueError(f"{own.where}: full_attn_layers {attends!r} is not a list; number the layers from 1")
    kinds = _kinds(config, [_ATTENTION[0] if i + 1 in attends else _MIXING[0] for i in range(layers)])
    where, names = (
        (own, ("num_heads", "head_dim", "short_conv_kernel_size"))
        if "num_heads" in own
        else (config, ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim"))
    )
    heads, head_dim, kernel = map(where.count, names)
    mixer = DeltaMixer(
        layers=_mixing(kinds),
        heads=heads,
        key_heads=heads,
        key_dim=head_dim,
        value_dim=head_dim,
        width=kernel - 1,
        gate_rank=head_dim,
    )
    networks = config.values.get("mlp_layer_types")
    dense = networks.count("dense") if isinstance(networks, list) else None
    if dense is None:
        dense = config.count("first_k_dense_replace", least=0, default=1)
    values = {
        "q_lora_rank": config.values.get("q_lora_rank") or 0,
        "num_experts": config.values.get("num_experts") if dense < layers else None,
        "num_experts_per_tok": config.values.get("num_experts_per_token"),
        "n_shared_experts": config.values.get("num_shared_experts"),
        "first_k_dense_replace": dense,
    }
    return HybridLayers(mixer=mixer, attention_layers=layers - mixer.layers, values=values)


def _scan(config: Table, layers: int) -> ScanMixer:
    """Mamba-2 in the words of Bamba, Falcon-H1 and Granite."""
    heads = config.count("mamba_n_heads")
    head_dim = config.values.get("mamba_d_head", "auto")
    inner = config.values.get("mamba_d_ssm") or config.count("mamba_expand") * config.count("hidden_size")
    return ScanMixer(
        layers=layers,
        heads=heads,
        head_dim=int(str(inner)) // heads if head_dim == "auto" else config.count("mamba_d_head"),
        groups=config.count("mamba_n_groups"),
        state_dim=config.count("mamba_d_state"),
        width=config.count("mamba_d_conv") - 1,
        chunk=config.count("mamba_chunk_size"),
    )


def _bamba(config: Table) -> HybridLayers:
    attends = config.values.get("attn_layer_indices") or []
    if not isinstance(attends, list) or not attends:
        raise ValueError(
            f"{config.where}: attn_layer_indices {attends!r} names no layer with attention, which the plan"
            " is of; give a model with some"
        )
    layers = config.count("num_hidden_layers")
    return HybridLayers(mixer=_scan(config, layers - len(attends)), attention_layers=len(attends))


def _falcon(config: Table) -> HybridLayers:
    """Both side by side, in all layers."""
    layers = config.count("num_hidden_layers")
    return HybridLayers(mixer=_scan(config, layers), attention_layers=layers)


def _granite(config: Table) -> HybridLayers:
    """Experts beside a shared network, or that alone."""
    kinds = _kinds(config)
    has_experts = config.count("num_local_experts", least=0, default=0) > 0
    values = {} if has_experts else {"intermediate_size": config.count("shared_intermediate_size")}
    mixer = _scan(config, _mixing(kinds))
    return HybridLayers(mixer=mixer, attention_layers=len(kinds) - mixer.layers, values=values)


def _nemotron(config: Table) -> HybridLayers:
    """A layer is a mixer, attention, a network or experts."""
    pattern = config.values.get("hybrid_override_pattern")
    blocks = config.values.get("layers_block_type") or config.values.get("layer_types")
    if blocks is None and isinstance(pattern, str):
        blocks = [_BLOCKS.get(letter, letter) for letter in pattern]
    known = (*_ATTENTION, *_MIXING, "mlp", "moe")
    if not isinstance(blocks, list) or any(block not in known for block in blocks):
        raise ValueError(
            f"{config.where}: layers_block_type {blocks!r} is not a list of {', '.join(known)}; add it"
        )
    if "moe_latent_size" in config:
        raise ValueError(
            f"{config.where}: moe_latent_size has experts behind narrow products, which the plan cannot"
            " price; give a model without"
        )
    groups = "mamba_n_groups" if "mamba_n_groups" in config else "n_groups"
    mixer = ScanMixer(
        layers=_mixing(blocks),
        heads=config.count("mamba_num_heads"),
        head_dim=config.count("mamba_head_dim"),
        groups=config.count(groups),
        state_dim=config.count("ssm_state_size"),
        width=config.count("mamba_d_conv" if "mamba_d_conv" in config else "conv_kernel") - 1,
        chunk=config.count("mamba_chunk_size" if "mamba_chunk_size" in config else "chunk_size"),
    )
    dense, sparse = blocks.count("mlp"), blocks.count("moe")
    values: dict[str, object] = {"num_hidden_layers": len(blocks), "n_shared_experts": None}
    values |= {"first_k_dense_replace": dense} if sparse else {"n_routed_experts": None}
    return HybridLayers(
        mixer=mixer,
        attention_layers=sum(block in _ATTENTION for block in blocks),
        network_layers=dense + sparse,
        values=values,
    )


def _lfm2(config: Table) -> HybridLayers:
    """The network of the dense one may be narrower than the config says."""
    layers = config.count("num_hidden_layers")
    attends = config.values.get("full_attn_idxs") or []
    assert isinstance(attends, list)
    kinds = _kinds(config, [_ATTENTION[0] if i in attends else _MIXING[2] for i in range(layers)])
    mixer = ConvolutionMixer(
        layers=_mixing(kinds), channels=config.count("hidden_size"), width=config.count("conv_L_cache") - 1
    )
    width = config.count("block_ff_dim" if "block_ff_dim" in config else "intermediate_size")
    if config.flag("block_auto_adjust_ff_dim", default="num_experts" not in config):
        factor = config.number("block_ffn_dim_multiplier") if "block_ffn_dim_multiplier" in config else 1.0
        multiple = config.count("block_multiple_of", default=256)
        width = -(-int(factor * int(2 * width / 3)) // multiple) * multiple
    values: dict[str, object] = {"intermediate_size": width}
    if "tie_embedding" in config:
        values["tie_word_embeddings"] = config.values["tie_embedding"]
    if "num_dense_layers" in config:
        values["first_k_dense_replace"] = config.values["num_dense_layers"]
    return HybridLayers(mixer=mixer, attention_layers=layers - mixer.layers, values=values)


_READERS: Final[Mapping[str, Callable[[Table], HybridLayers]]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), _delta),
    "kimi_linear": _kimi,
    "nemotron_h": _nemotron,
    "bamba": _bamba,
    "falcon_h1": _falcon,
    "granitemoehybrid": _granite,
    **dict.fromkeys(("lfm2", "lfm2_moe"), _lfm2),
}
"""By model_type."""
