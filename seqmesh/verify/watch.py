"""One forward and backward of a model, watched: what every module put out, the loss, every gradient.

    hooks    a module's output, when it is done        children before parents: the order of the forward
    gather   (1, n, ...) of every rank  -- unshard -->  (1, s, ...)        whatever runs along the tokens

What does not run along the tokens on every rank alike (an expert's rows, a table) is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqmesh.engine.sharding import Schedule
from seqmesh.train.loss import next_token_loss
from seqmesh.verify.hf_model import PackedBatch


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What a model computed from a batch: global, in fp64 on the CPU."""

    loss: float
    outputs: dict[str, Tensor]
    """By module, in the order in which they were done."""
    gradients: dict[str, Tensor]
    """By parameter."""


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects the first output of every module, while it is entered."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(partial(_keep, seen, name)) for name, module in model.named_modules()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keep(seen: dict[str, Tensor], name: str, module: nn.Module, given: Any, output: Any) -> None:
    del module, given
    if isinstance(output, Mapping):  # a model's output object
        output = next(iter(output.values()), None)
    if isinstance(output, tuple) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.is_floating_point() and name not in seen:
        seen[name] = output.detach()


def alone(model: nn.Module, batch: PackedBatch, dense: Any, device: torch.device) -> Computed:
    """One device with transformers' own attention."""
    with watched(model) as seen:
        out = model(
            batch.ids.to(device),
            position_ids=batch.positions.to(device),
            attention_mask=dense,
            use_cache=False,
        )
        loss = next_token_loss(out.logits, batch.labels.to(device), batch.label_count)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Computed(loss=float(loss.detach()), outputs=_stored(seen), gradients=_stored(gradients))


def alone_by_document(model: nn.Module, batch: PackedBatch, device: torch.device) -> Computed:
    """One device, each document by itself: for layers that no mask keeps apart."""
    loss = torch.zeros((), device=device)
    parts: list[dict[str, Tensor]] = []
    rows = (x.split(batch.lengths, 1) for x in (batch.ids, batch.positions, batch.labels))
    for ids, positions, labels in zip(*rows, strict=True):
        with watched(model) as seen:
            out = model(ids.to(device), position_ids=positions.to(device), use_cache=False)
            share = next_token_loss(out.logits, labels.to(device), batch.label_count)
        share.backward()
        loss = loss + share.detach()
        parts.append(seen)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Computed(
        loss=float(loss), outputs=_stored(_joined(parts, batch.lengths)), gradients=_stored(gradients)
    )


def _joined(parts: Sequence[Mapping[str, Tensor]], lengths: Sequence[int]) -> dict[str, Tensor]:
    """Outputs of documents, one after the other; those that run along the tokens of every one."""
    found: dict[str, Tensor] = {}
    for name in parts[0]:
        own = [part.get(name) for part in parts]
        if any(x is None for x in own):
            continue
        outputs = [x for x in own if x is not None]
        for dim in (1, 0):
            if all(dim < x.ndim and x.shape[dim] == n for x, n in zip(outputs, lengths, strict=True)):
                found[name] = torch.cat(outputs, dim)
                break
    return found


def on_mesh(
    model: nn.Module, batch: PackedBatch, schedules: Mapping[str, Schedule], device: torch.device
) -> Computed:
    """The same on a mesh, with attention plugged in: a collective. Every rank gets the whole."""
    schedule = schedules["schedule"]
    with watched(model) as seen:
        out = model(
            schedule.shard(batch.ids, 1).to(device),
            position_ids=schedule.shard(batch.positions, 1).to(device),
            **schedules,
        )
        labels = schedule.shard(batch.labels, 1).to(device)
        loss = next_token_loss(out.logits, labels, batch.label_count)
    loss.backward()
    total = loss.detach().clone()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if dist.is_initialized():
        for x in (total, *gradients.values()):
            dist.all_reduce(x)
    gathered = {name: schedule.unshard(seen[name], dim) for name, dim in _token_dims(seen, schedule).items()}
    return Computed(loss=float(total), outputs=_stored(gathered), gradients=_stored(gradients))


def _token_dims(seen: Mapping[str, Tensor], schedule: Schedule) -> dict[str, int]:
    """The dim of every output that runs along this rank's tokens, where all ranks agree on one."""
    n = schedule.rows[schedule.mesh.ulysses_rank]
    mine = {name: [dim for dim in (1, 0) if dim < x.ndim and x.shape[dim] == n] for name, x in seen.items()}
    everyone = [mine]
    if dist.is_initialized():
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        everyone = gathered
    found: dict[str, int] = {}
    for name, dims in everyone[0].items():
        common = [dim for dim in dims if all(dim in theirs.get(name, ()) for theirs in everyone)]
        if common:
            found[name] = common[0]
    return found


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().to("cpu", torch.float64) for name, x in tensors.items()}
