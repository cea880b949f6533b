"""What a Hugging Face model would silently get wrong on a sequence shard, each refused in one line.

`check_pluggable` looks at a model once, when it is plugged in; `check_labels` and `check_forward` are forward
pre-hooks and look at every call before any layer runs. All three see only what is the same on every rank, so
no rank is left waiting for another.

Why a model goes wrong: on a shard, whatever looks along the sequence outside attention sees this rank's
tokens only. A head that pools, a loss that shifts or averages, a rotary table chosen by the longest position,
a recurrence: each would give a number, and on every rank another one.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from seqmesh.engine.recurrent.rank_pieces import RankPieces
from seqmesh.engine.sharding import Schedule
from seqmesh.integrations.cached import CachedForward, SequenceCache
from seqmesh.integrations.layers import CHUNKED, FULL, SLIDING
from seqmesh.integrations.mixers import mixers_of
from seqmesh.integrations.temperature import counts_from_zero, is_known

_TOKENWISE = ("Model", "ForCausalLM", "ForMaskedLM", "ForTokenClassification")
"""How the classes end whose outputs are one per token.

The others pool or pick a token, or do so in their loss.
"""
_POOLS = re.compile(r"Pooler|SequenceSummary")
_MIXES_TOKENS = re.compile(
    r"Mamba|SSM|DeltaNet|GatedDelta|ShortConv|LinearAttention|LightningAttention"
    r"|Recurrent|R[wW][kK][vV]|Retention|LSTM"
)
"""Layers that pass information along the sequence outside attention.

On a shard they would miss what the other ranks hold.
"""

Call = tuple[tuple[Any, ...], dict[str, Any]]


def no_interface(model: PreTrainedModel) -> str:
    """The message for a model that does not use transformers' table of attention functions."""
    return (
        f"{type(model).__name__} cannot be plugged in:"
        " it does not call its attention through transformers' AttentionInterface;"
        " use a model that does (Llama, Mistral, Qwen, Gemma, gpt-oss, ...)"
    )


def check_pluggable(model: PreTrainedModel) -> None:
    """Refuse a model whose attention cannot be plugged in, or of which another part needs the whole sequence.

    Raises:
        ValueError: what was found, and what to use instead.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{name} is not a transformers model;"
            " pass the PreTrainedModel itself, before wrapping it (DDP, FSDP, compile)"
        )
    mixers = mixers_of(model)
    if not model.is_backend_compatible() and not mixers:  # hybrids are not marked compatible, but are
        raise ValueError(no_interface(model))
    _check_config(name, model.config, has_mixers=bool(mixers))
    if not name.endswith(_TOKENWISE):
        raise ValueError(
            f"{name} has a head that may pool over the sequence, and would pool the shard;"
            f" use the base model (AutoModel) or a class ending in {', '.join(_TOKENWISE[1:])}"
        )
    _check_rotary(name, model)
    _check_modules(name, model, mixers)


def _check_modules(name: str, model: nn.Module, mixers: Sequence[nn.Module]) -> None:
    """Every module but those inside of mixers that run on shards."""
    inside = {part for mixer in mixers for part in mixer.modules()}
    for path, module in model.named_modules():
        if module in inside:
            continue
        _check_module(name, path, module)
        # In a model with mixers that are known, the names of other layers speak of those.
        if isinstance(module, (nn.Conv1d, nn.RNNBase)) or (
            not mixers and _MIXES_TOKENS.search(type(module).__name__)
        ):
            raise ValueError(
                f"{name} has a {type(module).__name__} at {path!r}, which mixes tokens outside attention"
                " and needs the whole sequence;"
                " use a model of attention layers, or a hybrid that docs/hybrids.md lists"
            )


def _check_config(name: str, config: Any, *, has_mixers: bool) -> None:
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"{name} has cross-attention, which needs a schedule of its own;"
            " plug in a decoder-only or encoder-only model"
        )
    if config.sub_configs:
        parts = ", ".join(sorted(config.sub_configs))
        raise ValueError(
            f"{name} has several parts ({parts}) with sequences of their own;"
            " plug in its language model alone"
        )
    unknown = sorted(_layer_types(config) - {FULL, SLIDING, CHUNKED})
    if unknown and not has_mixers:
        raise ValueError(
            f"{name} has layers of type {', '.join(unknown)}, which need the whole sequence;"
            " use a model of attention layers, or a hybrid that docs/hybrids.md lists"
        )
    if getattr(config, "output_router_logits", False):
        raise ValueError(_router_logits(f"{name}'s config", "set output_router_logits=False in it"))


def _check_rotary(name: str, model: PreTrainedModel) -> None:
    wrong = sorted({kind for kind in _rope_types(model) if "dynamic" in kind or kind == "longrope"})
    if wrong:
        raise ValueError(
            f"{name} has RoPE of type {', '.join(wrong)}, whose frequencies depend on the longest position,"
            " which differs between ranks;"
            " use rope_type default, linear, yarn or llama3"
        )


def _check_module(name: str, path: str, module: nn.Module) -> None:
    kind = type(module).__name__
    # Albert's pooler is a plain Linear: only the attribute's name tells.
    if _POOLS.search(kind) or path.rpartition(".")[2] == "pooler":
        raise ValueError(
            f"{name} has a {kind} at {path!r}, which pools over the sequence and would pool the shard;"
            " build the model without it (add_pooling_layer=False) and pool the gathered outputs"
        )
    if counts_from_zero(module) and not is_known(module):
        raise ValueError(
            f"{name} has attn_temperature_tuning at {path!r}, which scales queries by their position"
            " in the shard, not in the sequence;"
            " build the model with attn_temperature_tuning=False, or use another one"
        )


def _layer_types(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


def _rope_types(model: PreTrainedModel) -> Iterator[str]:
    """Every RoPE type in a model: what its modules were built with and what its config says.

    Either is one for all layers, or a dict by layer type.
    """
    for module in model.modules():
        built = getattr(module, "rope_type", None)
        if isinstance(built, str):
            yield built
        elif isinstance(built, dict):
            yield from built.values()
    parameters = getattr(model.config, "rope_parameters", None) or {}
    for given in (parameters, *parameters.values()):
        if isinstance(given, dict) and isinstance(given.get("rope_type"), str):
            yield given["rope_type"]


def _router_logits(where: str, remedy: str) -> str:
    return (
        f"{where} has output_router_logits=True, and its auxiliary loss, of the shard alone,"
        f" would be summed over ranks; {remedy}"
    )


def check_labels(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Refuse labels unless the model's own loss is then this rank's share of the mean.

    For the outermost model: it has the loss.

    Raises:
        ValueError: labels without their shift or their count, or a loss other than transformers'
            ForCausalLMLoss.
    """
    if kwargs.get("labels") is None or isinstance(kwargs.get("past_key_values"), SequenceCache):
        return args, kwargs  # a cache refuses them itself
    name = type(model).__name__
    if not name.endswith("ForCausalLM") or model.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"{name}(...) got labels, but its own loss is not transformers' ForCausalLMLoss"
            " and would average over the shard;"
            " pass no labels and use seqmesh.train.loss.next_token_loss on the logits"
        )
    if kwargs.get("shift_labels") is None or kwargs.get("num_items_in_batch") is None:
        raise ValueError(
            f"{name}(...) got labels, and would shift them inside the shard and average over it;"
            " use seqmesh.train.loss.next_token_loss on the logits,"
            " or pass shift_labels (shifted before sharding) and num_items_in_batch (of all ranks) too"
        )
    return args, kwargs


def check_forward(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Refuse, before any layer runs, what a model would silently get wrong on a shard.

    Turns the K/V cache off, unless it is one of the whole mesh, which then says how the model runs. Sends the
    positions along to every attention.

    Raises:
        ValueError: schedules or position ids that are missing, or an argument that cannot be honoured.
    """
    call = f"{type(model).__name__}(...)"
    if len(args) > 1:
        raise ValueError(
            f"{call} got {len(args)} positional arguments; pass everything but input_ids by name"
        )
    cache = kwargs.get("past_key_values")
    if isinstance(cache, SequenceCache):
        if isinstance(kwargs.get("schedule"), CachedForward):  # the outer model has begun it
            return args, kwargs
        named = {"input_ids": args[0], **kwargs} if args else kwargs
        return (), cache.begin(call, named)
    if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        raise ValueError(
            f"{call} was asked for a K/V cache of this rank's tokens alone;"
            " pass past_key_values=seqmesh.generate.ShardedCache(mesh, model.config) to generate, or"
            " use_cache=False"
        )
    _check_schedules(call, model, kwargs)
    if kwargs.get("position_ids") is None:
        raise ValueError(
            f"{call} got no position_ids, and would count from 0 on every rank;"
            " pass schedule.shard(position_ids, 1)"
        )
    if kwargs.get("attention_mask") is not None:
        raise ValueError(
            f"{call} got an attention_mask, but the mask lives in the schedule; pass attention_mask=None"
        )
    _check_outputs(call, model, kwargs)
    return args, kwargs | {"use_cache": False, "token_positions": kwargs["position_ids"]}


def check_recurrent(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Refuse, for a hybrid model, what its mixers cannot do; on every rank alike, before any layer runs.

    With both degrees of a mesh above 1, makes the process group of all its ranks on the first call.

    Raises:
        ValueError: a mask that is not of whole documents, strided layouts, ranks without tokens, a cache.
    """
    name, schedule = type(model).__name__, kwargs.get("schedule")
    if isinstance(kwargs.get("past_key_values"), SequenceCache):
        raise ValueError(
            f"{name}(...) has layers that carry a state along the sequence, which no K/V cache of the mesh"
            " holds; pass schedule=Schedule.build(mask, mesh), and no cache"
        )
    if torch.compiler.is_compiling() or not isinstance(schedule, Schedule):  # check_forward says so
        return args, kwargs
    here = RankPieces.of(schedule)
    if not all(here.chains.pieces):
        raise ValueError(
            f"{name}(...) has {schedule.mask.q_len} tokens on {here.chains.size} ranks, and its mixers fail"
            " on a rank that holds none; use fewer ranks, or another layout"
        )
    return args, kwargs


def _check_outputs(call: str, model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    if kwargs.get("logits_to_keep") not in (None, 0):
        raise ValueError(
            f"{call} got logits_to_keep, which would keep the shard's last tokens;"
            " leave it out and select from the logits"
        )
    asked = kwargs.get("output_router_logits")
    if asked or (asked is None and getattr(model.config, "output_router_logits", False)):
        raise ValueError(_router_logits(call, "pass output_router_logits=False"))


def _check_schedules(call: str, model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    schedule = kwargs.get("schedule")
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"{call} got schedule={schedule!r}; pass schedule=Schedule.build(mask, mesh) on every call"
        )
    # Models all of whose layers are of one type need one schedule: the window is in its mask.
    types = _layer_types(model.config)
    others = {SLIDING: ("sliding", "sliding_window(s, w)"), CHUNKED: ("chunked", "chunked(s, c)")}
    for kind, (name, mask) in others.items():
        given = kwargs.get(f"{name}_schedule")
        if len(types) > 1 and kind in types and not isinstance(given, Schedule):
            raise ValueError(
                f"{call} got {name}_schedule={given!r}, but mixes {name} and other layers,"
                " which need a mask each;"
                f" pass {name}_schedule=Schedule.build(mask & masks.{mask}, mesh,"
                " layout=schedule.layout) too"
            )
