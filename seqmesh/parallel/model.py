"""A model that has been made parallel: gradients of a step, their norm, its optimiser.

    model = parallelize(hf_model, mesh)
    optimizer = model.optimizer(partial(torch.optim.AdamW, lr=1e-4))
    for batches in steps:
        share = model.gradients(shard_micro_batches(batches, mesh))
        norm = model.clip(1.0)
        optimizer.step()
        optimizer.zero_grad()

Without pipeline stages, a loop may also run its micro-batches itself: `loss(model, batch).backward()` for
each, then `model.finish_gradients()`. FSDP then reduces gradients after every micro-batch.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqmesh.parallel.batch import LocalBatch
from seqmesh.parallel.clip import clip_gradients
from seqmesh.parallel.dims import ParallelMesh
from seqmesh.parallel.fsdp import announce
from seqmesh.parallel.part import ModelPart
from seqmesh.parallel.pipeline import run_pipeline
from seqmesh.parallel.plan import ParallelPlan
from seqmesh.parallel.zero1 import MakeOptimizer, ParameterGroup, ShardedStates, sum_gradients


class ParallelModel:
    """This rank's part of a model, or parts, and how it trains. Made by `parallelize`."""

    def __init__(self, parts: Sequence[ModelPart], mesh: ParallelMesh, plan: ParallelPlan) -> None:
        self.parts = tuple(parts)
        self.mesh = mesh
        self.plan = plan

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters by the names that the model gives them, whatever stage they are in."""
        for part in self.parts:
            yield from part.hf.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters."""
        return (parameter for _, parameter in self.named_parameters())

    def gradients(self, batches: Sequence[LocalBatch]) -> Tensor:
        """Forward and backward of all micro-batches of a step. A collective over all ranks.

        Gradients are added to `.grad` and are those of the mean loss over all labels of all ranks.

        Returns:
            This rank's share of the loss, (); `total_loss` adds the shares up.
        """
        if not batches:
            raise ValueError("gradients of no micro-batch; pass what shard_micro_batches returns")
        if self.mesh.dims.pp > 1:
            total = run_pipeline(self.parts, self.mesh, self.plan, batches)
        else:
            total = self._accumulate(batches)
        self.finish_gradients()
        return total

    def _accumulate(self, batches: Sequence[LocalBatch]) -> Tensor:
        total = torch.zeros((), device=self.mesh.device_type)
        for number, batch in enumerate(batches):
            announce(self.parts[0], self.plan, is_last=number == len(batches) - 1)
            share = loss(self, batch)
            share.backward()
            total = total + share.detach()
        return total

    def finish_gradients(self) -> None:
        """After the last backward of a step: reduce what has not been reduced on the way."""
        if self.plan.zero < 2:
            sum_gradients(self.parameters(), self.mesh)

    def total_loss(self, share: Tensor) -> float:
        """The loss, given every rank's share of it. A collective over all ranks."""
        group = self.mesh.group("losses")
        total = share.detach().clone()
        if group is not None:
            dist.all_reduce(total, group=group)
        return total.item()

    def clip(self, max_norm: float) -> float:
        """Clip the gradients by their norm over all ranks, and return it as it was: `clip_gradients`."""
        return clip_gradients(self.parameters(), max_norm, self.mesh)

    def optimizer(
        self, make: MakeOptimizer, groups: list[ParameterGroup] | None = None
    ) -> torch.optim.Optimizer:
        """An optimiser of this rank's parameters; with zero=1 its states are spread over ranks.

        Args:
            make: such as `partial(torch.optim.AdamW, lr=1e-4)`; it gets the groups.
            groups: this rank's parameters with options; default: those that train, in one group.
        """
        given = groups or [{"params": [p for p in self.parameters() if p.requires_grad]}]
        group = self.mesh.group("replicas")
        if self.plan.zero != 1 or group is None:
            return make(given)
        return ShardedStates(given, make, group)


def loss(model: ParallelModel, batch: LocalBatch) -> Tensor:
    """This rank's share of a micro-batch's loss: its sum over the labels of all ranks and micro-batches.

    Raises:
        ValueError: a model with pipeline stages, none of which has a loss by itself.
    """
    if model.mesh.dims.pp > 1:
        raise ValueError(
            f"loss of a model in pp={model.mesh.dims.pp} stages: a stage sees other stages' results only as"
            " its pipeline runs; use model.gradients(batches)"
        )
    found: Tensor = model.parts[0](batch.input_ids, batch=batch)
    return found
