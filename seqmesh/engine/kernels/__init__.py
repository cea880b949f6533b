"""Kernels: the attention of one block, and which of them computes a call.

    auto on CPU     cpu (aten flash)  -> reference
    auto on CUDA    cuda (aten flash) -> reference
    by name only    efficient (fp32 on CUDA), cudnn (long blocks on Hopper): no GPU has run them yet

Selection takes the first that refuses nothing; when none is left it raises, listing for each why. To add a
kernel, write a class with the members of `Kernel` (cpu.py is the one to copy) and pass an instance as
`kernel=` to `seqmesh.attention`; nothing is registered by name.
"""

from seqmesh.engine.kernels.cpu import CpuFlash
from seqmesh.engine.kernels.cuda import CudaFlash
from seqmesh.engine.kernels.cudnn import CudaCudnn
from seqmesh.engine.kernels.efficient import CudaEfficient
from seqmesh.engine.kernels.kernel import BatchKernel, Kernel, Launch, LogitRule, Problem, launches_of
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
    "launches_of",
    "select",
]

_AUTOMATIC: tuple[Kernel, ...] = (CudaFlash(), CpuFlash(), Reference())
_BY_NAME: tuple[Kernel, ...] = (CudaEfficient(), CudaCudnn())


def available() -> tuple[Kernel, ...]:
    """All kernels that come with seqmesh: those that "auto" tries, fastest first, then those by name only."""
    return *_AUTOMATIC, *_BY_NAME


def select(kernel: str | Kernel, problem: Problem) -> Kernel:
    """The kernel to use.

    Args:
        kernel: "auto", the name of a kernel ("cuda", "cpu", "reference"), or a kernel of your own.
        problem: what it must support.

    Raises:
        ValueError: an unknown name, or no kernel left; the message lists every refusal.
    """
    refusals = []
    for candidate in _candidates(kernel):
        refusal = candidate.refusal(problem)
        if refusal is None:
            return candidate
        refusals.append(f"{candidate.name}: {refusal}")
    raise ValueError(
        f"no kernel computes {problem}; refused by {'; '.join(refusals)}."
        " Change the inputs or pass another kernel"
    )


def _candidates(kernel: str | Kernel) -> tuple[Kernel, ...]:
    """What `kernel=` allows, in the order of preference."""
    if not isinstance(kernel, str):
        if not hasattr(kernel, "refusal"):
            raise ValueError(
                f"kernel={kernel!r} is neither a name nor a Kernel;"
                " use 'auto', a name, or an object with the members of Kernel"
            )
        return (kernel,)
    if kernel == "auto":
        return _AUTOMATIC
    known = available()
    named = tuple(one for one in known if one.name == kernel)
    if not named:
        names = ", ".join(repr(one.name) for one in known)
        raise ValueError(f"kernel={kernel!r} is unknown; use 'auto', {names}, or pass a Kernel object")
    return named
