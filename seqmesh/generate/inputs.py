"""What a model is called with when it has a sharded cache: refused, or made this rank's."""

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from seqmesh.engine.exchange import all_gather
from seqmesh.generate.forward import ShardedForward
from seqmesh.generate.plan import SamePadding
from seqmesh.generate.sight import Runs
from seqmesh.integrations.samples import EVERY, by_mask

_OF_TOKENS = ("input_ids", "inputs_embeds", "position_ids")
"""Tensors with an entry for each token, along dim 1."""
_KNOWN = (*_OF_TOKENS, "attention_mask")
"""Tensors that are understood."""
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
"""What would be of this rank's tokens alone."""


def check_inputs(call: str, given: dict[str, Any], config: Any, seen: int, held: Tensor | None) -> int:
    """The tokens of a forward, if all of it can be honoured.

    `config` is the model's; `seen` tokens came before; `held` are keys of some layer, (b, g, rows, d), if
    there are any.

    Raises:
        ValueError: what cannot.
    """
    if torch.is_grad_enabled():
        raise ValueError(
            f"{call} with a ShardedCache computes no gradients; call it under torch.no_grad(), as generate is"
        )
    _check_arguments(call, given, config)
    tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or tokens.shape[1] == 0:
        raise ValueError(f"{call} got no tokens; pass input_ids (b, n) or inputs_embeds (b, n, H)")
    batch, count = tokens.shape[:2]
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if positions is None or positions.ndim != 2 or positions.shape[1] != count:
        shape = "none" if positions is None else f"of shape {tuple(positions.shape)}"
        raise ValueError(
            f"{call} got position_ids {shape} for {count} tokens; pass (b, {count}), such as"
            f" torch.arange({seen}, {seen + count})[None]"
        )
    total = seen + count
    if mask is not None and (mask.ndim != 2 or tuple(mask.shape) != (batch, total)):
        raise ValueError(
            f"{call} got an attention_mask of shape {tuple(mask.shape)} for {batch} sequences of {total}"
            f" tokens, {seen} of them in the cache; pass ({batch}, {total}), or none"
        )
    if held is not None and held.shape[0] != batch:
        raise ValueError(
            f"{call} got {batch} sequences and a cache of {held.shape[0]}; use a cache of its own, or reset()"
        )
    return count


def _check_arguments(call: str, given: dict[str, Any], config: Any) -> None:
    if given.get("labels") is not None:
        raise ValueError(
            f"{call} got labels and a ShardedCache, with which no loss is computed; leave them out"
        )
    for name in ("schedule", "sliding_schedule", "chunked_schedule"):
        if given.get(name) is not None:
            raise ValueError(f"{call} got {name}= and a ShardedCache, which makes its own; leave it out")
    asked = [name for name in _OUTPUTS if given.get(name, getattr(config, name, False))]
    if asked:
        raise ValueError(
            f"{call} got {asked[0]}=True: with a ShardedCache a rank has its own tokens' only; leave it out"
        )
    keep = given.get("logits_to_keep")
    if keep is not None and (not isinstance(keep, int) or keep < 0):
        raise ValueError(
            f"{call} got logits_to_keep={keep} with a ShardedCache; pass how many of the last tokens, or 0"
        )
    if given.get("use_cache") is False:
        raise ValueError(f"{call} got use_cache=False with a ShardedCache; leave one of them out")
    strange = [name for name, value in given.items() if isinstance(value, Tensor) and name not in _KNOWN]
    if strange:
        raise ValueError(
            f"{call} got {strange[0]}, which a ShardedCache does not know how to shard; leave it out"
        )


def groups_of(attention_mask: Tensor | None) -> list[SamePadding]:
    """Sequences by their padding."""
    if attention_mask is None or bool(attention_mask.all()):
        return [SamePadding(EVERY, None)]
    masks = by_mask(map(_runs, attention_mask.bool().cpu()))
    return [SamePadding(samples, real) for real, samples in masks.items()]


def _runs(row: Tensor) -> Runs:
    """(start, stop) of the ones in a row of booleans."""
    edges = torch.nn.functional.pad(row.to(torch.int8), (1, 1)).diff().nonzero()[:, 0]
    return tuple((start, stop) for start, stop in edges.view(-1, 2).tolist())


def sharded_inputs(given: dict[str, Any], forward: ShardedForward) -> dict[str, Any]:
    """The model's arguments for this rank, with the forward in place of a schedule."""
    plan = forward.plan
    made = {name: value for name, value in given.items() if name != "attention_mask"}
    if plan.is_sharded:
        for name in _OF_TOKENS:
            if made.get(name) is not None:
                made[name] = made[name].index_select(1, plan.places.to(made[name].device))
    # transformers scales queries by their place, padding included, where position ids would leave it out.
    slots = (plan.places + plan.past).to(given["position_ids"].device)[None]
    return made | {"schedule": forward, "token_positions": slots, "attention_mask": None}


def check_agreement(call: str, given: dict[str, Any], forward: ShardedForward) -> None:
    """Tell all ranks a digest of the inputs. They must be the same, or ranks would compute pieces of
    different texts, or wait for each other.

    Raises:
        ValueError: on every rank alike, they are not.
    """
    ring = forward.state.ring
    if ring.ring_group is None:
        return
    told = repr((forward.past, given.get("logits_to_keep"), forward.groups))
    digest = blake2b(told.encode(), digest_size=8)
    for name in _OF_TOKENS:
        if given.get(name) is not None:
            digest.update(name.encode())
            digest.update(given[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    device = given["position_ids"].device
    mine = torch.tensor([int.from_bytes(digest.digest(), "big", signed=True)], device=device)
    digests = all_gather(mine, [1] * ring.size, ring.ring_group).tolist()
    if len(set(digests)) > 1:
        raise ValueError(
            f"{call}: ranks were given different tokens, positions or padding (digests {digests}); sampling"
            " needs the same seed everywhere: call torch.manual_seed with one number on all ranks"
        )
