"""Run a Hugging Face model on sequence shards: its attention becomes `seqmesh.attention`, everything else
stays as it is.

    model = plug_in(LlamaForCausalLM(config))
    schedule = Schedule.build(masks.documents(lengths), mesh)
    logits = model(schedule.shard(ids, 1), position_ids=schedule.shard(positions, 1), schedule=schedule).logits    # (b, n, vocabulary)

How it works: transformers keeps public tables of attention and mask functions; we add one entry to each,
named "seqmesh", and patch nothing. Extra keyword arguments of a model's forward travel through its layers to
the attention function, so the schedule does too: no state is global, and two meshes work in one process.
Rank-local layers (norms, MLPs, embeddings) need no change.

What the function gets is honoured or refused, never ignored. What the model alone could do wrong on a shard
is refused too (see refusals.py): when it is plugged in (heads that pool, rotary tables that depend on the
longest position), and by a hook on every forward, the inner model's included, before any communication and on
every rank alike (no position ids, labels, a K/V cache).

Sliding windows: a layer's window must be in its schedule's mask. A model that mixes full and sliding layers
takes two schedules over one layout: `schedule=` for the full layers and `sliding_schedule=` (mask &
masks.sliding_window(s, w)) for the others.

Legend: b batch, n local tokens, h query heads, g K/V heads, d head dim.
"""

import inspect
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from seqmesh.engine.attention import attention
from seqmesh.engine.sharding import Schedule
from seqmesh.integrations.refusals import check_forward, check_labels, check_pluggable, no_interface
from seqmesh.masks import Mask

NAME = "seqmesh"
"""Our key in transformers' tables of attention and mask functions."""

Model = TypeVar("Model", bound=PreTrainedModel)

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
"""Keywords that travel through the layers and change nothing that attention computes once the schedule holds
the mask.
"""


def register() -> None:
    """Add "seqmesh" to transformers' attention and mask functions. Repeating it is harmless.

    Raises:
        ValueError: somebody else's function has that name.
    """
    for table, function in (
        (AttentionInterface, sequence_attention),
        (AttentionMaskInterface, refuse_padding),
    ):
        taken = table().get(NAME)
        if taken is not None and taken is not function:
            raise ValueError(
                f"{table.__name__} already has another {NAME!r} ({taken}); load only one library that registers this name"
            )
        table.register(NAME, function)


def plug_in(model: Model) -> Model:
    """Let a transformers model attend through seqmesh. Changes the model in place and returns it.

    From then on its forward needs `schedule=` and `position_ids=`, both for this rank's tokens. Save it with
    `save_pretrained` as usual: the attention implementation is not part of a checkpoint.

    Raises:
        ValueError: the model's attention cannot be plugged in, or other layers of it need the whole sequence.
    """
    check_pluggable(model)
    register()
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if any(
        part.config._attn_implementation != NAME
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
    ):
        model.set_attn_implementation(before)
        raise ValueError(no_interface(model))
    model.register_forward_pre_hook(check_labels, with_kwargs=True)
    for part in model.modules():
        if part is model or (
            isinstance(part, PreTrainedModel) and "position_ids" in inspect.signature(part.forward).parameters
        ):
            part.register_forward_pre_hook(check_forward, with_kwargs=True)
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
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    schedule: Schedule | None = None,
    sliding_schedule: Schedule | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`seqmesh.attention` in the shape that transformers calls.

    Args:
        module: the attention layer that calls.
        query: (b, h, n, d) this rank's tokens.
        key: (b, g, n, d).
        value: (b, g, n, d).
        attention_mask: must be None: the mask lives in the schedule.
        schedule: from the model's forward keywords.
        sliding_schedule: the schedule of sliding layers, when the model also has full ones.
        dropout: must be 0.
        scaling: factor of the logits.
        sliding_window: this layer's window; its schedule's mask must keep to it.
        softcap: c for logits c tanh(logits / c).
        s_aux: (h,) attention sinks; `sinks` is another name for them.
        sinks: see s_aux.
        others: what else travels along; anything that could change the result is refused.

    Returns:
        (b, n, h, d), and no attention weights.

    Raises:
        ValueError: an argument that cannot be honoured.
    """
    layer = f"{type(module).__name__} {getattr(module, 'layer_idx', '')}".strip()
    if schedule is None:
        raise ValueError(
            f"{layer} got no schedule; pass schedule=Schedule.build(mask, mesh) to the model's forward"
        )
    if attention_mask is not None:
        raise ValueError(
            f"{layer} got an attention mask, but the mask lives in the schedule; pass attention_mask=None"
        )
    if dropout > 0:
        raise ValueError(
            f"{layer} has attention dropout {dropout}, which seqmesh does not do; set attention_dropout=0 in the model's config"
        )
    refused = [
        name
        for name, given in others.items()
        if name not in _HARMLESS and given is not None and given is not False
    ]
    if refused:
        raise ValueError(
            f"{layer} got {', '.join(sorted(refused))}, which seqmesh cannot honour; do not pass it, or use another attention"
        )
    chosen = _schedule_of_layer(layer, schedule, sliding_schedule, sliding_window)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (b, heads, n, d) -> (b, n, heads, d)
    return attention(
        q, k, v, chosen, scale=scaling, softcap=softcap, sinks=s_aux if s_aux is not None else sinks
    ), None


def _schedule_of_layer(
    layer: str, schedule: Schedule, sliding_schedule: Schedule | None, window: int | None
) -> Schedule:
    """The schedule whose mask is this layer's."""
    if sliding_schedule is not None and sliding_schedule.layout != schedule.layout:
        raise ValueError(
            "sliding_schedule has another layout than schedule; build it with layout=schedule.layout"
        )
    if window is None:
        return schedule
    chosen = sliding_schedule or schedule
    if (reach := furthest(chosen.mask)) >= window:
        raise ValueError(
            f"{layer} has a sliding window of {window} tokens but its schedule's mask lets tokens {reach} apart meet; build the schedule"
            f" from mask & masks.sliding_window(s, {window}) and pass it as sliding_schedule= (or schedule=, if every layer slides)"
        )
    return chosen


def furthest(mask: Mask) -> int:
    """Largest distance |i - j| of an allowed pair, 0 for an empty mask."""
    back = (b.q_stop - 1 - b.k_start if b.hi is None else b.hi for b in mask.bands)
    ahead = (b.k_stop - 1 - b.q_start if b.lo is None else -b.lo for b in mask.bands)
    return max(0, *back, *ahead) if mask.bands else 0
