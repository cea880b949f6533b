"""A mesh of ranks that do not exist, for a process that is one of them.

    collectives     as large as what would arrive: PyTorch's "fake" backend; numbers in bench/arrivals.py
    messages        of pipelines: counted, not sent; received is what lies in the buffers
    votes           the other data-parallel ranks say of a step what this one says
    weights         made where they are: nobody sends them
    meshes          joined and parted with real numbers, since fake ones say nothing of ranks

Everything else is the code of real ranks. This process is the first of them on every axis but pp, where it
may be any.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401  (shapes of the collectives' results)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import schedules
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from seqmesh.parallel import ParallelDims, ParallelMesh, ParallelModel, batch, parallelize
from seqmesh.parallel.load import fill_with_noise
from seqmesh.parallel.traffic import CountTraffic
from seqmesh.train import model, setup
from seqmesh.train.config import Config
from seqmesh.train.data import TokenIds


@contextmanager
def fake_ranks(config: Config, stage: int = 0) -> Iterator[ParallelMesh]:
    """The mesh of one rank among ranks that do not exist: the first of those at `stage` of a pipeline.

    Raises:
        ValueError: no such stage, or a process that already has a process group.
    """
    if not 0 <= stage < config.mesh.pp:
        raise ValueError(f"stage={stage} of mesh.pp={config.mesh.pp}: use 0 to {config.mesh.pp - 1}")
    if dist.is_initialized():
        raise ValueError(
            "this process already has a process group; trace in a process of its own,"
            " or destroy the group first"
        )
    if not config.has_group:
        yield ParallelDims().build()
        return
    world = config.mesh.world
    rank = stage * (world // config.mesh.pp)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    with ExitStack() as undone:
        undone.callback(dist.destroy_process_group)
        undone.enter_context(replaced(batch, "_all_votes", _votes_like_mine))
        undone.enter_context(replaced(schedules, "_batch_p2p", _exchange_nothing))
        joined = staticmethod(_with_real_tensors(DeviceMesh._concatenate))
        undone.enter_context(replaced(DeviceMesh, "_concatenate", joined))
        parted = _with_real_tensors(DeviceMesh._unflatten)
        undone.enter_context(replaced(DeviceMesh, "_unflatten", parted))
        yield setup.dims_of(config.mesh).build(config.run.device)


@contextmanager
def fake_weights() -> Iterator[None]:
    """Where tensors are fake: models are made whole, which takes no memory, and cut from there."""
    with replaced(setup, "build", _build_from_whole), replaced(FakeTensor, "__deepcopy__", _copied):
        yield


@contextmanager
def weights_of_noise() -> Iterator[None]:
    """Where tensors are real: each rank makes weights of its own, which nobody sends it."""
    with replaced(setup, "load_from_rank_0", _fill_with_noise):
        yield


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


@dataclass(frozen=True)
class _Message:
    """Of a pipeline, done at once; whoever has it has its tensor too, as of a real one."""

    told: dist.P2POp

    def wait(self) -> None:
        """Nothing is under way."""


def _exchange_nothing(messages: Sequence[dist.P2POp], **_: Any) -> list[_Message]:
    """In place of PyTorch's for pipelines: counted by whoever counts."""
    counters = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, CountTraffic)]
    for message in messages:
        if message.op is dist.isend:
            for counter in counters:
                counter.add_message(message.group, message.tensor.nbytes)
    return [_Message(message) for message in messages]


def _build_from_whole(config: Config, mesh: ParallelMesh, _: Any, vocabulary: TokenIds) -> ParallelModel:
    """As setup.build, but for the way in which weights come; whole ones take no memory if they are fake."""
    return parallelize(model.build(config, vocabulary), mesh, setup.plan_of(config))


def _fill_with_noise(made: ParallelModel, _: Callable[[], Any]) -> None:
    fill_with_noise(made)


def _copied(tensor: FakeTensor, memo: dict[int, Any]) -> Any:
    """A deep copy, which stages are of the whole model. PyTorch's looks for data, where there is none."""
    twin: Tensor = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        twin = nn.Parameter(twin, tensor.requires_grad)
    memo[id(tensor)] = twin
    return twin


def _with_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    def outside(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return outside
