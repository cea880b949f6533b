"""Kernels: the attention of one block, and which of them computes a call.

    auto on CPU     cpu (aten flash)  -> reference
    auto on CUDA    cuda (aten flash) -> efficient (fp32, wide heads) -> reference
    by name only    cudnn (long blocks on Hopper)

Selection takes the first that refuses nothing; when none is left it raises, listing for each why. To add a
kernel, write a class with the members of `Kernel` (cpu.py is the one to copy) and pass an instance as
`kernel=` to `seqmesh.attention`; nothing is registered by name.
"""

from seqmesh.engine.kernels.cpu import CpuFlash
from seqmesh.engine.kernels.cuda import CudaFlash
from seqmesh.engine.kernels.cudnn import CudaCudnn
from seqmesh.engine.kernels.efficient import CudaEfficient
from seqmesh.engine.kernels.kernel import (
    BatchKernel,
    Kernel,
    Launch,
    LogitRule,
    Problem,
    choose,
    launches_of,
)
from seqmesh.engine.kernels.reference import Reference
from seqmesh.engine.kernels.tiles import Tile, TileShape

__all__ = [
    "BatchKernel",
    "Kernel",
    "Launch",
    "LogitRule",
    "Problem",
    "Tile",
    "TileShape",
    "available",
    "choose",
    "launches_of",
    "select",
]

_AUTOMATIC: tuple[Kernel, ...] = (CudaFlash(), CudaEfficient(), CpuFlash(), Reference())
_BY_NAME: tuple[Kernel, ...] = (CudaCudnn(),)


def available() -> tuple[Kernel, ...]:
    """All kernels that come with seqmesh: those that "auto" tries, fastest first, then those by name only."""
    return *_AUTOMATIC, *_BY_NAME


def select(kernel: str | Kernel, problem: Problem) -> Kernel:
    """The kernel to use.

    Args:
        kernel: "auto", the name of a kernel ("cuda", "cpu", ...), or a kernel of your own.
        problem: what it must support.

    Raises:
        ValueError: an unknown name, or no kernel left; the message lists every refusal.
    """
    return choose(kernel, problem, automatic=_AUTOMATIC, known=available())
