"""What is saved of a run, by the name that it has in a checkpoint: weights, and the optimiser's states.

Names are the model's own, so that any mesh finds what another one saved. Of a model with adapters, only those
are saved: the others are what they were in its folder.
"""

import torch
from torch import Tensor

from seqmesh.parallel.adapters import what_trains
from seqmesh.parallel.model import ParallelModel
from seqmesh.parallel.zero1 import ShardedStates


def weights_of(model: ParallelModel) -> dict[str, Tensor]:
    """What this rank has of the parameters that train; not copies."""
    trained = what_trains(dict(model.named_parameters()))
    return {f"model.{name}": parameter.detach() for name, parameter in trained.items()}


def states_of_this_rank(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """With zero=1, other ranks have the rest."""
    return optimizer.inner if isinstance(optimizer, ShardedStates) else optimizer


def owned_by(model: ParallelModel, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that an optimiser updates, by name."""
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in owned]


def states_of(model: ParallelModel, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimiser's states that this rank has, by parameter and by key; not copies."""
    inner = states_of_this_rank(optimizer)
    return {name: inner.state[parameter] for name, parameter in owned_by(model, inner)}
