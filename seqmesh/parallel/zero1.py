"""ZeRO-1: every rank has all parameters and gradients, and the optimiser's states of some parameters.

    gradients   all-reduce (SUM) over replicas, once a step
    states      whole parameters, dealt out by size; the rank that has a parameter's states updates it
    parameters  broadcast from that rank

Any optimiser that treats each parameter by itself can be dealt out so.
Source: ZeRO (Rajbhandari et al. 2020); torch.distributed.optim.ZeroRedundancyOptimizer, which does the same.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from seqmesh.parallel.dims import ParallelMesh
from seqmesh.parallel.shards import local_part

ParameterGroup = dict[str, Any]
"""Parameters under "params", and options of the optimiser for them."""
MakeOptimizer = Callable[[list[ParameterGroup]], torch.optim.Optimizer]


def sum_gradients(parameters: Iterable[nn.Parameter], mesh: ParallelMesh) -> None:
    """Sum every gradient over the ranks that have the same parameters, in place."""
    group = mesh.group("replicas")
    if group is None:
        return
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:  # unused here, but maybe not elsewhere
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(local_part(parameter.grad), group=group)


class ShardedStates(torch.optim.Optimizer):
    """An optimiser whose states are spread over the ranks of a group.

    Its parameter groups are all of them, with the options of the optimiser inside: a learning rate set here
    is used there. `inner` holds this rank's states.
    """

    def __init__(self, groups: list[ParameterGroup], make: MakeOptimizer, group: Any) -> None:
        """Deal the parameters out, the same way on every rank.

        Args:
            groups: all parameters.
            make: makes the optimiser of some of them.
            group: the process group of the ranks that have the same parameters.
        """
        super().__init__(groups, {})
        self.group = group
        self.owners = _deal([p for one in groups for p in one["params"]], dist.get_world_size(group))
        me = dist.get_rank(group)
        self.inner = make(
            [one | {"params": [p for p in one["params"] if self.owners[p] == me]} for one in groups]
        )
        for mine, all_of_it in zip(self.inner.param_groups, self.param_groups, strict=True):
            all_of_it.update(_options(mine))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update this rank's parameters, and get those of the others. A collective."""
        assert closure is None
        for mine, all_of_it in zip(self.inner.param_groups, self.param_groups, strict=True):
            mine.update(_options(all_of_it))
        self.inner.step()
        for parameter, owner in self.owners.items():
            dist.broadcast(local_part(parameter.detach()), group=self.group, group_src=owner)


def _options(group: ParameterGroup) -> ParameterGroup:
    return {name: value for name, value in group.items() if name != "params"}


def _deal(parameters: list[nn.Parameter], ranks: int) -> dict[nn.Parameter, int]:
    """Rank that owns each parameter: the largest first, each to the rank that has least."""
    held = [0] * ranks
    owners = {}
    for parameter in sorted(parameters, key=lambda p: -p.numel()):
        owner = held.index(min(held))
        held[owner] += parameter.numel()
        owners[parameter] = owner
    return owners
