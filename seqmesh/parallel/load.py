"""Weights for a model that was made parallel on the meta device, where it had none.

    with torch.device("meta"):
        hf_model = AutoModelForCausalLM.from_config(config)
    model = parallelize(hf_model, mesh)
    load_folder(model, "folder of safetensors")      or      load_from_rank_0(model, build)

`load_folder` maps each file and copies what a rank holds, and nothing else. `load_from_rank_0` is for weights
that only a whole model can make, such as random ones: rank 0 has it whole, on its host, the others a tensor
at a time; it gives the weights of one rank exactly, whatever the mesh. Both come before the optimiser, which
keeps the parameters that it is made of.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from seqmesh.parallel.adapters import is_adapter, name_without_adapters, starting_values
from seqmesh.parallel.model import ParallelModel
from seqmesh.parallel.shards import local_part
from seqmesh.parallel.tensor import check_ranges


@torch.no_grad()
def load_folder(model: ParallelModel, folder: Path | str, seed: int = 0) -> None:
    """Load a Hugging Face checkpoint. Each rank reads its shards alone.

    LoRA adapters, which the folder does not have, begin as LoRA says: `starting_values`.

    Args:
        model: on the meta device, or with weights to overwrite.
        folder: with .safetensors files whose names are the model's own, as `save_pretrained` writes them.
        seed: of the adapters' A.

    Raises:
        ValueError: no such files, a parameter that they do not have, or one that tp does not share by rows.
    """
    homes = _homes(Path(folder))
    _check_stored(homes, {name: tuple(tensor.shape) for name, tensor in _stored_of(model)}, folder)
    _check_ranges(model)
    _allocate(model)
    for name, tensor in _stored_of(model):
        with safe_open(homes[name], framework="pt") as file:
            _copy(file.get_slice(name), tensor)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            _copy(starting_values(name, parameter.shape, seed), parameter)
    for part in model.parts:
        _compute_buffers(part.hf)


def stored_names(folder: Path | str) -> set[str]:
    """Names of all tensors in the .safetensors files of a folder."""
    return set(_homes(Path(folder)))


def names_in_folder(model: PreTrainedModel) -> set[str]:
    """What a folder of a model must have: its parameters but for adapters, by the names without them."""
    return {name for name, _ in _own_parameters(model)}


def check_folder(model: PreTrainedModel, folder: Path | str) -> None:
    """Raise what `load_folder` would raise, given the model on any device. Reads names and shapes alone."""
    _check_stored(_homes(Path(folder)), {name: tuple(x.shape) for name, x in _stored(model)}, folder)


@torch.no_grad()
def load_from_rank_0(model: ParallelModel, build: Callable[[], PreTrainedModel]) -> None:
    """Copy the weights and buffers of a whole model that rank 0 makes. A collective over all ranks.

    Args:
        model: on the meta device, or with weights to overwrite.
        build: makes the whole model on the host; it is called on rank 0 alone.

    Raises:
        ValueError: on all ranks alike, a parameter that tp does not share by rows.
    """
    _check_ranges(model)
    _allocate(model)
    here: dict[str, list[Tensor]] = defaultdict(list)  # two stages of a rank have the same buffers
    for name, tensor in _tensors_of(model):
        here[name].append(tensor)
    source = build() if model.mesh.number == 0 else None
    for name, tensor in _sent_from_rank_0(source, model.mesh.device_type, model.mesh.device_mesh is None):
        for into in here.get(name, ()):
            _copy(tensor, into)


@torch.no_grad()
def fill_with_noise(model: ParallelModel, deviation: float = 0.02) -> None:
    """Random matrices, vectors of ones, each rank's its own: for who measures a step and reads no number."""
    _allocate(model)
    for part in model.parts:
        for parameter in part.hf.parameters():
            values = local_part(parameter)
            if parameter.ndim > 1:
                values.normal_(std=deviation)
            else:
                values.fill_(1.0)
        _compute_buffers(part.hf)


def _tensors_of(model: ParallelModel) -> Iterator[tuple[str, Tensor]]:
    for part in model.parts:
        yield from part.hf.named_parameters()
        yield from part.hf.named_buffers()


def _sent_from_rank_0(
    source: PreTrainedModel | None, device: str, is_alone: bool
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of rank 0's model, whole, one after the other."""
    tensors: dict[str, Tensor] = {}
    if source is not None:
        tensors = dict(source.named_parameters()) | dict(source.named_buffers())
    if is_alone:
        yield from tensors.items()
        return
    facts: list[Any] = [[(name, tuple(x.shape), x.dtype) for name, x in tensors.items()]]
    dist.broadcast_object_list(facts, device=torch.device(device) if device == "cuda" else None)
    for name, shape, dtype in facts[0]:
        if source is None:
            sent = torch.empty(shape, dtype=dtype, device=device)
        else:
            sent = tensors[name].detach().to(device).contiguous()
        dist.broadcast(sent, 0)
        yield name, sent


def _homes(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{str(folder)!r} has no .safetensors files; pass a folder that save_pretrained wrote"
        )
    homes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            homes.update(dict.fromkeys(file.keys(), path))
    return homes


def _stored(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of a model: parameters, and buffers that are weights; under its names."""
    yield from _own_parameters(model)
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in kept:
            yield name_without_adapters(name), buffer


def _own_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            yield name_without_adapters(name), parameter


def _stored_of(model: ParallelModel) -> Iterator[tuple[str, Tensor]]:
    for part in model.parts:
        yield from _stored(part.hf)


def _check_stored(homes: dict[str, Path], wanted: dict[str, tuple[int, ...]], folder: Path | str) -> None:
    missing = sorted(wanted.keys() - homes.keys())
    if missing:
        raise ValueError(
            f"{str(folder)!r} lacks {len(missing)} parameters of the model, such as {missing[0]!r}; pass a"
            " checkpoint of this model whose names need no conversion: load it by from_pretrained and save it"
            " by save_pretrained"
        )
    for name, shape in wanted.items():
        with safe_open(homes[name], framework="pt") as file:
            stored = tuple(file.get_slice(name).get_shape())
        if stored != shape:
            raise ValueError(
                f"{name} of shape {stored} in the folder is of shape {shape} in the model; pass a checkpoint"
                " of this model"
            )


def _copy(source: Any, into: Tensor) -> None:
    """Copy what `into` holds of a whole tensor, which may be one in a file: only that is read."""
    if not isinstance(into, DTensor):
        into.copy_(source[:])
        return
    shape, offset = compute_local_shape_and_global_offset(into.shape, into.device_mesh, into.placements)
    mine = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    if into.to_local().numel():  # more ranks than rows leave some without any
        into.to_local().copy_(source[mine])


def _check_ranges(model: ParallelModel) -> None:
    if model.mesh.dims.tp > 1:
        check_ranges(model.parts[0].hf, model.mesh.dims, model.plan.experts)


def _allocate(model: ParallelModel) -> None:
    """Memory for what is on the meta device; its contents are garbage."""
    for part in model.parts:
        if any(x.is_meta for x in part.parameters()):
            is_tied = part.anatomy.is_tied
            part.to_empty(device=model.mesh.device_type)
            if is_tied and not part.anatomy.is_tied:  # plain parameters come apart, FSDP's do not
                part.hf.tie_weights()


def _compute_buffers(model: PreTrainedModel) -> None:
    """Buffers that no checkpoint holds (rotary frequencies): the model's own initialisation makes them."""
    for module in model.modules():
        if module._non_persistent_buffers_set:
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True  # leave it alone
            model._init_weights(module)
