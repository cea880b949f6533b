"""A Hugging Face model on a mesh against one device: loss, gradients, and the first module that deviates.

    truth         one device, transformers' own attention with a dense mask, fp64; of a hybrid model each
                  document by itself, with recurrences by their definitions
    one device    the same in the dtype asked for          its distance from the truth is the noise floor
    mesh          attention plugged in, the sequence sharded

A tensor deviates if its error is more than LIMIT times that noise (judge.py has the measure and the limit).
Modules are looked at in the order of the forward, children before parents, so the first that deviates is
where the difference arose: for attention itself, which is no module, the projection after it.

Trade-off: the truth's norms and rotary tables are computed in fp32 by transformers whatever the model's
dtype, so noise is counted a little low; a mixture of experts may choose another expert where two are equally
good.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from seqmesh.engine.mesh import SequenceMesh
from seqmesh.integrations.mixers import mixers_of
from seqmesh.integrations.transformers import plug_in
from seqmesh.masks import Mask
from seqmesh.verify.definitions import by_definition
from seqmesh.verify.hf_model import (
    PackedBatch,
    build,
    dense_masks,
    has_weights,
    masks_of,
    packed,
    schedules_of,
)
from seqmesh.verify.judge import LIMIT, TensorError, row_error
from seqmesh.verify.oracle import DTYPES
from seqmesh.verify.watch import Computed, alone, alone_by_document, on_mesh

ROUNDINGS = {"fp32": 4, "bf16": 1, "fp16": 1}
"""Of the floor, should one device be lucky, in units of the dtype's rounding: see judge.py."""
FEW = 32
"""Numbers of a gradient that may all be lucky: the decay of each head, say."""
LEAST = 1e-30
"""Stands for the largest row of a tensor of zeros. Gradients of a mean are small: their own size measures."""


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """What is compared."""

    given: str
    """A folder or config.json."""
    ulysses: int
    ring: int
    dtype: str

    def __post_init__(self) -> None:
        """Raises ValueError for a dtype that the truth is no better than."""
        if self.dtype not in ROUNDINGS:
            raise ValueError(f"--dtype {self.dtype}: the truth is fp64; use {', '.join(ROUNDINGS)}")


@dataclass(frozen=True, kw_only=True)
class ModelOutcome:
    """What came of it."""

    case: ModelCase
    model: str
    """Class, weights and batch, in words."""
    loss: TensorError
    losses: dict[str, float]
    """By who computed it: mesh, one device, fp64."""
    modules: dict[str, TensorError]
    """In the order of the forward."""
    gradients: dict[str, TensorError]
    missing: tuple[str, ...]
    """Parameters that got a gradient on one side only."""
    left_out: int
    """Modules whose output does not run along the tokens."""

    @property
    def ok(self) -> bool:
        """Whether nothing deviates."""
        tensors = (self.loss, *self.modules.values(), *self.gradients.values())
        return not self.missing and all(error.ratio <= LIMIT for error in tensors)

    @property
    def first_deviating(self) -> str | None:
        """The first module that deviates, in forward order."""
        return next((name for name, error in self.modules.items() if not error.ratio <= LIMIT), None)

    @property
    def last_agreeing(self) -> str | None:
        """The module before it."""
        names = list(self.modules)
        first = self.first_deviating
        return names[names.index(first) - 1] if first in names[1:] else None


def compare_model(case: ModelCase, turn: int, device: torch.device) -> ModelOutcome | None:
    """Run the model on the mesh, and on rank 0 alone, and compare there; None on the other ranks.

    A collective until the mesh is done; then rank 0 needs nobody.

    Raises:
        ValueError: a model that cannot be built or plugged in; on every rank alike.
    """
    del turn  # rank 0 compares: it is the one with a model to spare
    mesh = SequenceMesh.build(ulysses=case.ulysses, ring=case.ring, device_type=device.type)
    given = Path(case.given)
    dtype = DTYPES[case.dtype]
    model = plug_in(build(given, dtype).to(device))
    batch = packed(model.config.vocab_size, getattr(model.config, "max_position_embeddings", None))
    seen = masks_of(model.config, batch.lengths)
    ours = on_mesh(model, batch, schedules_of(seen, mesh), device)
    if mesh.rank:
        return None
    weights = "its weights" if has_weights(given) else "random weights"
    described = (
        f"{type(model).__name__}, {weights}, {batch.ids.shape[1]} tokens in {len(batch.lengths)} documents"
    )
    del model
    one, truth = _on_one_device(given, dtype, batch, seen, device)
    return _outcome(case, batch, described, ours, one, truth)


def _on_one_device(
    given: Path, dtype: torch.dtype, batch: PackedBatch, seen: Mapping[str, Mask], device: torch.device
) -> tuple[Computed, Computed]:
    """The model in the dtype on the device, and in fp64 on the CPU."""
    cpu = torch.device("cpu")
    one, truth = build(given, dtype).to(device), build(given, torch.float64)
    if mixers_of(truth):
        with by_definition(truth):
            return alone_by_document(one, batch, device), alone_by_document(truth, batch, cpu)
    return (
        alone(one, batch, dense_masks(seen, dtype, device), device),
        alone(truth, batch, dense_masks(seen, torch.float64, cpu), cpu),
    )


def _outcome(
    case: ModelCase, batch: PackedBatch, described: str, ours: Computed, one: Computed, truth: Computed
) -> ModelOutcome:
    floor = ROUNDINGS[case.dtype] * torch.finfo(DTYPES[case.dtype]).eps / 2
    # The loss is a mean of tokens, in fp32.
    floor_of_loss = max(floor / batch.label_count**0.5, 4 * torch.finfo(torch.float32).eps / 2)
    modules = _errors(ours.outputs, one.outputs, truth.outputs, floor)
    scale = max(1.0, abs(truth.loss))
    return ModelOutcome(
        case=case,
        model=described,
        loss=TensorError(
            ours=abs(ours.loss - truth.loss) / scale,
            one_device=abs(one.loss - truth.loss) / scale,
            floor=floor_of_loss,
        ),
        losses={"mesh": ours.loss, "one device": one.loss, "fp64": truth.loss},
        modules=modules,
        gradients=_not_by_luck(
            _errors(ours.gradients, one.gradients, truth.gradients, floor), truth.gradients
        ),
        missing=tuple(sorted(ours.gradients.keys() ^ truth.gradients.keys())),
        left_out=len(truth.outputs) - len(modules),
    )


def _errors(
    ours: Mapping[str, Tensor], one: Mapping[str, Tensor], truth: Mapping[str, Tensor], floor: float
) -> dict[str, TensorError]:
    """By name, in our order, of what all three have."""
    found: dict[str, TensorError] = {}
    for name, mine in ours.items():
        right = truth.get(name)
        if right is not None and right.shape == mine.shape and right.numel():
            found[name] = TensorError(
                ours=row_error(mine, right, LEAST),
                one_device=row_error(one[name], right, LEAST),
                floor=floor,
            )
    return found


def _not_by_luck(found: Mapping[str, TensorError], tensors: Mapping[str, Tensor]) -> dict[str, TensorError]:
    """Few numbers can all be lucky on one device: their noise is at least that of their module's others."""
    of_module: dict[str, float] = {}
    for name, error in found.items():
        module = name.rpartition(".")[0]
        of_module[module] = max(of_module.get(module, 0.0), error.one_device)
    return {
        name: replace(error, one_device=of_module[name.rpartition(".")[0]])
        if tensors[name].numel() < FEW
        else error
        for name, error in found.items()
    }
