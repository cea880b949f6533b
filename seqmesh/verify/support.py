"""What can be tried here: kernels and dtypes that refuse nothing of it, and the reasons of those that do."""

import torch

from seqmesh.engine.kernels import Kernel, Problem, available
from seqmesh.verify.cases import DTYPES, SHAPES, Support
from seqmesh.verify.oracle import DTYPES as TORCH_DTYPES

A_SOFTCAP = 2.0


def supported(device_type: str) -> list[Support]:
    """Every kernel with every dtype that it computes on a device."""
    found: list[Support] = []
    for kernel in available():
        for dtype in DTYPES:
            if _refusal(kernel, device_type, TORCH_DTYPES[dtype], None) is None:
                capped = _refusal(kernel, device_type, TORCH_DTYPES[dtype], A_SOFTCAP)
                found.append(
                    Support(kernel=kernel.name, dtype=dtype, device=device_type, softcap=capped is None)
                )
    return found


def left_out(device_type: str) -> list[str]:
    """In words, what is not tried: `cuda: it runs on cuda, not on cpu`."""
    lines: list[str] = []
    for kernel in available():
        for dtype in DTYPES:
            for softcap in (None, A_SOFTCAP):
                refusal = _refusal(kernel, device_type, TORCH_DTYPES[dtype], softcap)
                line = f"{kernel.name}: {refusal}"
                if refusal is not None and line not in lines:
                    lines.append(line)
    return lines


def _refusal(kernel: Kernel, device_type: str, dtype: torch.dtype, softcap: float | None) -> str | None:
    """Why a kernel cannot compute the cases' head dims."""
    for head_dim in sorted({shape.head_dim for shape in SHAPES}):
        problem = Problem(device_type=device_type, dtype=dtype, head_dim=head_dim, softcap=softcap)
        refusal = kernel.refusal(problem)
        if refusal is not None:
            return refusal
    return None
