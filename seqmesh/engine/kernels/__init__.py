"""Kernels: the attention of one block, (out, lse), and its gradients. The protocol and the selection.

A kernel declares what it supports by *refusing* the rest with a reason. Selection takes the first that
refuses nothing; when none is left it raises, listing for each why. No kernel may invent a log-sum-exp, ignore
an argument or fall back silently.

    auto on CPU:   cpu (aten flash) -> reference        auto on CUDA:   cuda (aten flash) -> reference

Legend: b batch, h query heads, g K/V heads, nq and nk rows of the block, d head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from seqmesh.masks import Band


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a kernel is asked to support."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    softcap: float | None


class Kernel(Protocol):
    """The attention of one block. Stateless; queries and keys are already cut to the block's rows."""

    name: str
    """How users ask for it."""

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot compute a problem, or None if it can."""
        ...

    def tiles(self, block: Band) -> Sequence[Band]:
        """Disjoint bands with the pairs of `block`, each computable in one call."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of one tile.

        Args:
            q: (b, h, nq, d), any strides with a unit last one.
            k: (b, g, nk, d); v: likewise. g divides h.
            band: one of `tiles`; nq and nk are its sides.
            scale: factor of the logits.
            softcap: c for logits c tanh(logits / c), or None.

        Returns:
            out (b, h, nq, d) in the input's dtype (a kernel may keep fp32), lse (b, h, nq): natural log, fp32
            (fp64 for fp64).
        """
        ...

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        band: Band,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of one tile, given the *global* out (b, h, nq, d) and lse (b, h, nq) of its query rows.

        Returns:
            dq (b, h, nq, d), dk and dv (b, g, nk, d); their sums over all tiles are the gradients.
        """
        ...


def available() -> tuple[Kernel, ...]:
    """All kernels that come with seqmesh, fastest first."""
    from seqmesh.engine.kernels.cpu import CpuFlash
    from seqmesh.engine.kernels.cuda import CudaFlash
    from seqmesh.engine.kernels.reference import Reference

    return CudaFlash(), CpuFlash(), Reference()


def select(kernel: "str | Kernel", problem: Problem) -> Kernel:
    """The kernel to use.

    Args:
        kernel: "auto", the name of a kernel ("cuda", "cpu", "reference"), or a kernel of your own.
        problem: what it must support.

    Raises:
        ValueError: an unknown name, or no kernel left; the message lists every refusal.
    """
    if not isinstance(kernel, str) and not hasattr(kernel, "refusal"):
        raise ValueError(
            f"kernel={kernel!r} is neither a name nor a Kernel; use 'auto', a name, or an object with the members of Kernel"
        )
    kernels = available() if isinstance(kernel, str) else (kernel,)
    names = [known.name for known in kernels]
    if isinstance(kernel, str) and kernel != "auto":
        if kernel not in names:
            raise ValueError(
                f"kernel={kernel!r} is unknown; use 'auto', {', '.join(map(repr, names))}, or pass a Kernel object"
            )
        kernels = tuple(known for known in kernels if known.name == kernel)
    refusals = []
    for candidate in kernels:
        refusal = candidate.refusal(problem)
        if refusal is None:
            return candidate
        refusals.append(f"{candidate.name}: {refusal}")
    raise ValueError(
        f"no kernel computes {problem}; refused by {'; '.join(refusals)}. Change the inputs or pass another kernel"
    )
