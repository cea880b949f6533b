"""A ring without the other ranks: every exchange is a local copy of the same size.

    the engine  -- all-to-all -->  this group  -- copies of what is sent, until full -->  receive buffer

What arrives is finite and of the right shape, and it is the wrong rows: times are real, numbers are not. The
copies run on the device's current stream, in the order of the compute: they cost what writing the rows costs,
and no link.

Source: PyTorch takes process groups written in Python; functional collectives find them by name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d  # whose stubs lack most of what is used here
from torch.futures import Future

from seqmesh.bench.arrivals import fill
from seqmesh.engine.mesh import SequenceMesh

NAME = "seqmesh_local_copies"


class LocalCopies(dist.ProcessGroup):
    """The all-to-all of one rank, alone."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.bytes_sent = 0
        """Handed over so far, what stays on the rank included."""

    def all_to_all_single(
        self,
        received: Tensor,
        sent: Tensor,
        receive_sizes: list[int],
        send_sizes: list[int],
        options: Any = None,
    ) -> Any:
        """Fill the receive buffer with what is sent, again and again."""
        del receive_sizes, send_sizes, options
        self.bytes_sent += sent.nbytes
        fill(received, sent)
        done: Future[Tensor] = Future()
        done.set_result(received)
        return c10d._create_work_from_future(done)  # type: ignore[attr-defined]

    alltoall_base = all_to_all_single  # type: ignore[assignment]  # what PyTorch 2.11 calls it


@contextmanager
def alone(ring: int, ring_rank: int) -> Iterator[tuple[SequenceMesh, LocalCopies]]:
    """The mesh of one ring rank whose peers do not exist, and the group that stands for them."""
    group = LocalCopies(ring_rank, ring)
    c10d._register_process_group(NAME, group)  # type: ignore[arg-type]
    try:
        mesh = SequenceMesh(
            ulysses=1,
            ring=ring,
            ulysses_rank=0,
            ring_rank=ring_rank,
            ulysses_group=None,
            ring_group=NAME,
            device_mesh=None,
        )
        yield mesh, group
    finally:
        c10d._unregister_process_group(NAME)  # type: ignore[arg-type]
