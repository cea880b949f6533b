"""What a rank sends in collectives and messages, counted where PyTorch dispatches them, by axis of the mesh.

    with CountTraffic() as sent:
        share = model.gradients(batches)
    sent.by_axis(mesh)                      {"fsdp": 1_203_968, "ulysses": 524_288, ...}

    all_to_all, send                 what goes to others, exactly
    all_gather                       (N - 1) x the part that this rank has
    reduce_scatter, broadcast        (N - 1) / N of the whole
    all_reduce                       2 (N - 1) / N of the whole

That is what a ring of N ranks sends, each rank as much as any other; backends may choose other ways. Whoever
calls the collective is counted: attention, FSDP, tensor parallelism, pipelines, the trainer.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.utils._pytree import tree_leaves

from seqmesh.engine.exchange import Watch
from seqmesh.parallel.dims import ParallelMesh

_EXCHANGING = ("dp_shard", "ring", "ulysses", "sequence")
"""Axes of a sequence and its shards: by themselves they send all-to-alls of attention and of states."""
_BALANCE = "balance"
"""What a sequence's ranks add up for the loss that keeps experts evenly used (balance.py)."""
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class CountTraffic(Watch):
    """Counts the bytes that this rank sends to others, by process group, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.by_group: Counter[tuple[str, bool]] = Counter()
        """Bytes by the group's name in PyTorch, all-to-alls (True) apart from all else."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_collective(func):
            self._count(func, arguments_of(func, args, kwargs))
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, arguments: dict[str, Any]) -> None:
        kind, group = _kind_of(func), group_of(arguments)
        if kind is None or group is None:
            return
        nbytes = round(_SENT[kind](arguments, group))
        self.by_group[group.group_name, kind == "alltoall"] += nbytes

    def add_message(self, group: Any, nbytes: int) -> None:
        """Count a message that PyTorch does not dispatch."""
        self.by_group[group.group_name, False] += nbytes

    @property
    def total(self) -> int:
        """Bytes in all groups."""
        return sum(self.by_group.values())

    def by_axis(self, mesh: ParallelMesh) -> dict[str, int]:
        """Bytes by axis, or flattened axis, of a mesh; what other groups sent is "other". No zeros.

        Of a sequence's ranks "sequence" are the exchanges, "balance" the sums.

        Axes may have one group. All-to-alls are then those of ring, ulysses or sequence, all else is not.
        """
        found: Counter[str] = Counter()
        for (group_name, is_exchange), sent in self.by_group.items():
            axes = sorted(mesh.axes, key=lambda axis: (axis in _EXCHANGING) is not is_exchange)
            names = (axis for axis in axes if _name_of(mesh.group(axis)) == group_name)
            axis = next(names, "other")
            found[_BALANCE if axis == "sequence" and not is_exchange else axis] += sent
        return {axis: sent for axis, sent in found.items() if sent}


def is_collective(func: Any) -> bool:
    """Whether an operator is a collective, or waits for one."""
    return func.namespace in _NAMESPACES


def _name_of(group: Any) -> str | None:
    return None if group is None else group.group_name


def _kind_of(func: Any) -> str | None:
    """Which of `_SENT` an operator is; None for what sends nothing."""
    name = func._schema.name.split("::")[1].replace("_", "")
    for kind in _SENT:
        if name.startswith(kind):
            return kind
    return None


def arguments_of(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """What an operator is called with, by the names of its schema."""
    return dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | (kwargs or {})


def group_of(arguments: dict[str, Any]) -> Any:
    """The process group of a collective; None for an operator without one, such as a wait."""
    if "group_name" in arguments:
        return _resolve_process_group(arguments["group_name"])
    if "process_group" in arguments:
        return dist.ProcessGroup.unbox(arguments["process_group"])
    return None


def _given(arguments: dict[str, Any]) -> Any:
    """What this rank hands to a collective: PyTorch's names for it."""
    return next(value for name, value in arguments.items() if name.startswith(("input", "tensor")))


def _nbytes(tensors: Any) -> int:
    return sum(x.nbytes for x in tree_leaves(tensors) if isinstance(x, Tensor))


def _of_all_to_all(arguments: dict[str, Any], group: Any) -> float:
    n, me = int(group.size()), int(group.rank())
    given = _given(arguments)
    if not isinstance(given, Tensor):  # a list, one tensor for each rank
        return _nbytes(given) - _nbytes(given[me])
    splits = arguments["input_split_sizes"]
    stays = splits[me] / max(1, sum(splits)) if splits else 1 / n
    return _nbytes(given) * (1.0 - stays)


def _share_of_others(arguments: dict[str, Any], group: Any) -> float:
    n = int(group.size())
    return _nbytes(_given(arguments)) * (n - 1) / n


_SENT: dict[str, Callable[[dict[str, Any], Any], float]] = {
    "allreduce": lambda arguments, group: 2 * _share_of_others(arguments, group),
    "allgather": lambda arguments, group: _nbytes(_given(arguments)) * (group.size() - 1),
    "reducescatter": _share_of_others,
    "alltoall": _of_all_to_all,
    "broadcast": _share_of_others,
    "send": lambda arguments, _: _nbytes(_given(arguments)),
}
"""Bytes that a rank sends, from the operator's arguments and the group."""
