"""What can be tried here: kernels and dtypes that refuse nothing of it, and the reasons of those that do."""

from dataclasses import fields
from typing import Any

from seqmesh.engine.kernels import Kernel, Problem, available
from seqmesh.verify.cases import DTYPES, SHAPES, Support
from seqmesh.verify.oracle import DTYPES as TORCH_DTYPES

WANTS: dict[str, dict[str, Any]] = {"softcap": {"softcap": 2.0}, "value_head_dim": {"value_head_dim": 24}}
"""Of a problem, beyond the plain one."""


def supported(device_type: str) -> list[Support]:
    """Every kernel with every dtype that it computes on a device."""
    found: list[Support] = []
    for kernel in available():
        for dtype in DTYPES:
            if _refusal(kernel, device_type, dtype, {}) is None:
                has = {
                    want: _refusal(kernel, device_type, dtype, asks) is None for want, asks in WANTS.items()
                }
                found.append(Support(kernel=kernel.name, dtype=dtype, device=device_type, **has))
    return found


def left_out(device_type: str) -> list[str]:
    """In words, what is not tried: `cuda: it runs on cuda, not on cpu`."""
    lines: list[str] = []
    for kernel in available():
        for dtype in DTYPES:
            for asks in ({}, *WANTS.values()):
                refusal = _refusal(kernel, device_type, dtype, asks)
                line = f"{kernel.name}: {refusal}"
                if refusal is not None and line not in lines:
                    lines.append(line)
    return lines


def _refusal(kernel: Kernel, device_type: str, dtype: str, asks: dict[str, Any]) -> str | None:
    """Why a kernel cannot compute the cases' head dims with what is asked for."""
    if not asks.keys() <= {field.name for field in fields(Problem)}:
        return "a problem cannot ask for a " + " or ".join(asks).replace("_", " ")
    for head_dim in sorted({shape.head_dim for shape in SHAPES}):
        plain = {"device_type": device_type, "dtype": TORCH_DTYPES[dtype], "head_dim": head_dim}
        refusal = kernel.refusal(Problem(**{"softcap": None, **plain, **asks}))
        if refusal is not None:
            return refusal
    return None
