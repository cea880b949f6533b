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
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqmesh.parallel.dims import ParallelMesh

_EXCHANGING = ("dp_shard", "ring", "ulysses")
"""Axes of a sequence and its shards: they send all-to-alls of attention, and nothing else by themselves."""
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class CountTraffic(TorchDispatchMode):
    """Counts the bytes that this rank sends to others, by process group, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.by_group: Counter[tuple[str, bool]] = Counter()
        """Bytes by the group's name in PyTorch, all-to-alls (True) apart from all else."""

    def __enter__(self) -> "CountTraffic":
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_collective(func):
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Any) -> None:
        kind = _kind_of(func)
        if kind is None:
            return
        group = next(found for found in map(_group_of, args) if found is not None)
        nbytes = round(_SENT[kind](args, func.namespace == "c10d", group))
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

        Axes may have one group. All-to-alls are then those of ring or ulysses, all else is not.
        """
        found: Counter[str] = Counter()
        for (group_name, is_exchange), sent in self.by_group.items():
            axes = mesh.axes if is_exchange else sorted(mesh.axes, key=lambda axis: axis in _EXCHANGING)
            names = (axis for axis in axes if _name_of(mesh.group(axis)) == group_name)
            found[next(names, "other")] += sent
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


def _group_of(argument: Any) -> Any:
    """The process group that an argument of a collective is; None for other arguments."""
    if isinstance(argument, dist.ProcessGroup):
        return argument
    if isinstance(argument, str):
        try:
            return _resolve_process_group(argument)  # type: ignore[arg-type]
        except (RuntimeError, ValueError):  # the name of a reduction
            return None
    if isinstance(argument, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(argument)
        except RuntimeError:  # the object of a reduction
            return None
    return None


def _nbytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tensors) if isinstance(x, Tensor))


def _input(args: Any, out_comes_first: bool) -> int:
    """Bytes of what a collective is given; c10d's operators are given the room for the result first."""
    return _nbytes(args[1] if out_comes_first else args[0])


def _of_all_to_all(args: Any, out_comes_first: bool, group: Any) -> float:
    n, me = int(group.size()), int(group.rank())
    given = args[1] if out_comes_first else args[0]
    if not isinstance(given, Tensor):  # a list, one tensor for each rank
        return _nbytes(given) - _nbytes(given[me])
    splits = args[4] if out_comes_first else args[2]
    stays = splits[me] / max(1, sum(splits)) if splits else 1 / n
    return _nbytes(given) * (1.0 - stays)


def _of_whole(args: Any, _: bool, group: Any) -> float:
    n = int(group.size())
    return _nbytes(args[0]) * (n - 1) / n


_SENT: dict[str, Callable[[Any, bool, Any], float]] = {
    "allreduce": lambda args, first, group: 2 * _of_whole(args, first, group),
    "allgather": lambda args, first, group: _input(args, first) * (group.size() - 1),
    "reducescatter": lambda args, first, group: _input(args, first) * (group.size() - 1) / group.size(),
    "alltoall": _of_all_to_all,
    "broadcast": _of_whole,
    "send": lambda args, _, __: _nbytes(args[0]),
}
"""Bytes that a rank sends, from the operator's arguments, whether its result is the first, and the group."""
