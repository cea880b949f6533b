"""A mesh of ranks that do not exist, for a process that traces one of them with fake tensors.

    collectives     answered at once, by whatever lies in the buffers           PyTorch's "fake" backend
    votes           the other data-parallel ranks say of a step what this one says
    weights         made where they are, whole, and cut from there: nobody sends them
    meshes          joined with real numbers, since fake ones say nothing of ranks

Everything else is the code of real ranks. This process is rank 0: the first on every axis. Pipelines are
refused: with fake tensors, torch.distributed.pipelining corrupts the memory of the process (PyTorch 2.13).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401  (shapes of the collectives' results)
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from seqmesh.parallel import ParallelDims, ParallelMesh, ParallelModel, batch, parallelize
from seqmesh.train import model, setup
from seqmesh.train.config import Config
from seqmesh.train.data import TokenIds


@contextmanager
def fake_ranks(config: Config) -> Iterator[ParallelMesh]:
    """The mesh of rank 0 among ranks that do not exist.

    Raises:
        ValueError: a pipeline, or a process that already has a process group.
    """
    if config.mesh.pp > 1:
        raise ValueError(
            f"mesh.pp={config.mesh.pp}: pipelines cannot be traced with fake tensors; trace with mesh.pp=1"
        )
    if dist.is_initialized():
        raise ValueError(
            "this process already has a process group; trace in a process of its own,"
            " or destroy the group first"
        )
    if config.mesh.world == 1:
        yield ParallelDims().build()
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.mesh.world)
    with ExitStack() as undone:
        undone.callback(dist.destroy_process_group)
        undone.enter_context(replaced(batch, "_all_votes", _votes_like_mine))
        undone.enter_context(replaced(setup, "build", _build_from_whole))
        joined = staticmethod(_with_real_tensors(DeviceMesh._concatenate))
        undone.enter_context(replaced(DeviceMesh, "_concatenate", joined))
        yield setup.dims_of(config.mesh).build()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is something else for a while."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:  # inherited
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _votes_like_mine(mine: Any, mesh: ParallelMesh) -> list[Any]:
    return [mine] * (mesh.dims.dp_replicate * mesh.dims.dp_shard)


def _build_from_whole(config: Config, mesh: ParallelMesh, vocabulary: TokenIds) -> ParallelModel:
    """As setup.build, but for the way in which weights come; whole ones take no memory if they are fake."""
    return parallelize(model.build(config, vocabulary), mesh, setup.plan_of(config.train))


def _with_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    def outside(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return outside
