"""Run a Hugging Face model on sequence shards: its attention becomes `seqmesh.attention`, the rest stays.

    model = plug_in(LlamaForCausalLM(config))
    schedule = Schedule.build(masks.documents(lengths), mesh)
    ids, positions = schedule.shard(ids, 1), schedule.shard(positions, 1)              # (b, s) -> (b, n)
    logits = model(ids, position_ids=positions, schedule=schedule).logits              # (b, n, vocabulary)

How it works: transformers keeps public tables of attention and mask functions; we add one entry to each,
named "seqmesh", and patch nothing. Extra keyword arguments of a model's forward travel through its layers to
the attention function, so the schedule does too: no state is global, and two meshes work in one process.
Rank-local layers (norms, MLPs, embeddings) need no change.

What the function gets is honoured or refused, never ignored. What the model alone could do wrong on a shard
is refused too (see refusals.py): when it is plugged in (heads that pool, rotary tables that depend on the
longest position), and by a hook on every forward, the inner model's included, before any communication and on
every rank alike (no position ids, labels, a K/V cache).

Windows and chunks: a layer's window, or its chunk, must be in its schedule's mask. A model that mixes layers
takes several schedules over one layout: `schedule=` for the full layers, `sliding_schedule=` (mask &
masks.sliding_window(s, w)) and `chunked_schedule=` (mask & masks.chunked(s, c)) for the others.

Legend: b batch, n local tokens, h query heads, g K/V heads, d head dim.
"""

import inspect
from typing import Any, TypeVar

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from seqmesh.engine.attention import attention
from seqmesh.engine.sharding import Schedule
from seqmesh.integrations.adapted import PeftModel, unwrapped
from seqmesh.integrations.cached import CachedForward, Softmax, finish_cached
from seqmesh.integrations.layers import LayerSchedules, chunk_of
from seqmesh.integrations.mixers import bind, mixers_of
from seqmesh.integrations.refusals import (
    check_forward,
    check_labels,
    check_pluggable,
    check_recurrent,
    no_interface,
)
from seqmesh.integrations.temperature import counts_from_zero, scaled_by_position

NAME = "seqmesh"
"""Our key in transformers' tables of attention and mask functions."""

Model = TypeVar("Model", bound=PreTrainedModel | PeftModel)

_HARMLESS = frozenset(
    {
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "is_causal",
        "output_hidden_states",
        "return_dict",
        "labels",
        "shift_labels",
        "num_items_in_batch",
        "logits_to_keep",
        "layer_idx",
    }
)
"""Keywords that travel through the layers and change nothing that attention computes.

The schedule holds the mask, so what transformers would derive masks and positions from has no say.
"""


def register() -> None:
    """Add "seqmesh" to transformers' attention and mask functions. Repeating it is harmless.

    Raises:
        ValueError: somebody else's function has that name.
    """
    ours = ((AttentionInterface, sequence_attention), (AttentionMaskInterface, refuse_padding))
    for table, function in ours:
        taken = table().get(NAME)
        if taken is not None and taken is not function:
            raise ValueError(
                f"{table.__name__} already has another {NAME!r} ({taken});"
                " load only one library that registers this name"
            )
        table.register(NAME, function)


def plug_in(model: Model) -> Model:
    """Let a transformers model, or one in a PeftModel, attend through seqmesh: in place; returned as it came.

    From then on its forward needs `schedule=` and `position_ids=`, both for this rank's tokens, or the whole
    tokens with a K/V cache of the mesh (seqmesh.generate.ShardedCache) as `past_key_values=`. Save it with
    `save_pretrained` as usual: the attention implementation is not part of a checkpoint.

    Raises:
        ValueError: the model's attention cannot be plugged in, or other layers of it need the whole sequence.
    """
    own = unwrapped(model)
    check_pluggable(own)
    register()
    before = own.config._attn_implementation
    own.set_attn_implementation(NAME)
    parts = [part for part in own.modules() if isinstance(part, PreTrainedModel)]
    # transformers only warns where a part cannot change its attention, and leaves it as it was.
    if any(part.config._attn_implementation != NAME for part in parts):
        own.set_attn_implementation(before)
        raise ValueError(no_interface(own))
    mixers = mixers_of(own)
    for mixer in mixers:
        bind(mixer)
    own.register_forward_pre_hook(check_labels, with_kwargs=True)
    for part in parts:
        # The inner model too: it may be called without the outer one, whose hook would not see it.
        if part is own or "position_ids" in inspect.signature(part.forward).parameters:
            if mixers:
                part.register_forward_pre_hook(check_recurrent, with_kwargs=True)
            part.register_forward_pre_hook(check_forward, with_kwargs=True)
            part.register_forward_hook(finish_cached, with_kwargs=True)
    return model


def refuse_padding(
    *, attention_mask: Tensor | None = None, q_length: int = 0, kv_length: int = 0, **_: Any
) -> None:
    """Our mask function: no dense mask is ever made, and a padding mask or a filled cache is refused.

    transformers calls this where it would build a mask. A name without a mask function would lose a padding
    mask silently.

    Raises:
        ValueError: an attention mask, or more keys than queries.
    """
    if attention_mask is not None:
        raise ValueError(
            "attention_mask was given, but the mask lives in the schedule; pass attention_mask=None"
        )
    if kv_length != q_length:
        raise ValueError(
            f"{q_length} queries with {kv_length} keys: a K/V cache is not sharded; pass use_cache=False"
        )


def sequence_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    schedule: Schedule | CachedForward | None = None,
    sliding_schedule: Schedule | None = None,
    chunked_schedule: Schedule | None = None,
    token_positions: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`seqmesh.attention` as transformers calls it: (b, h, n, d), twice (b, g, n, d) -> (b, n, h, d), None.

    `module` is the layer that calls. `sliding_window` is its window, to which its schedule's mask must keep;
    `token_positions` (b, n) are the position ids, which not every model hands on, or places in a cache;
    `softcap` is c for logits c tanh(logits / c); `s_aux`, or `sinks`, are attention sinks, (h,).

    Raises:
        ValueError: no schedule, a mask, dropout, or among the others anything that could change the result.
    """
    layer = f"{type(module).__name__} {getattr(module, 'layer_idx', '')}".strip()
    _check_arguments(layer, schedule, attention_mask, dropout, others)
    assert schedule is not None
    if counts_from_zero(module):
        query = scaled_by_position(module, query, token_positions, getattr(schedule, "past", 0))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (b, heads, n, d) -> (b, n, heads, d)
    softmax = Softmax(scaling, softcap, sinks if s_aux is None else s_aux)
    chunk = chunk_of(module)
    if isinstance(schedule, CachedForward):
        return schedule.attend(module.layer_idx, q, k, v, sliding_window, chunk, softmax), None
    schedules = LayerSchedules(schedule, sliding_schedule, chunked_schedule)
    return attention(q, k, v, schedules.of_layer(layer, sliding_window, chunk), *softmax), None


def _check_arguments(
    layer: str,
    schedule: Schedule | CachedForward | None,
    attention_mask: Tensor | None,
    dropout: float,
    others: dict[str, Any],
) -> None:
    if schedule is None:
        # The hook on the model's forward has seen one.
        raise ValueError(
            f"{layer} got no schedule, as the model does not hand keyword arguments of its forward on to its"
            " attention; use another model, or call this layer with schedule=Schedule.build(mask, mesh)"
        )
    if attention_mask is not None:
        raise ValueError(
            f"{layer} got an attention mask that its model has made itself, while seqmesh knows masks from"
            " the schedule only; use another model"
        )
    if dropout > 0:
        raise ValueError(
            f"{layer} has attention dropout {dropout}, which seqmesh does not do;"
            " set attention_dropout=0 in the model's config"
        )
    refused: list[str] = []
    for name, given in others.items():
        # transformers passes many of its switches on as None or False: they ask for nothing.
        if name not in _HARMLESS and given is not None and given is not False:
            refused.append(name)
    if refused:
        raise ValueError(
            f"{layer} got {', '.join(sorted(refused))}, which seqmesh cannot honour;"
            " do not pass it, or use another attention"
        )
