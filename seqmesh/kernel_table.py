"""Which kernel computes what, on which device and in which dtype: asked of the kernels themselves.

    kernel x device x dtype x feature  ->  Problem  ->  kernel.refusal(problem)  ->  None, or the reason

Nothing is written down here that a kernel says itself, so the table cannot be out of date; docs/kernels.md is
generated from it. Asking computes nothing and needs no device: a laptop knows what a GPU kernel supports.

Sinks, grouped heads, batches and windows are asked of no kernel: the engine adds sinks after the merge, calls
a kernel once for each group of heads that it needs, and cuts a band into tiles that the kernel has.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

import torch

from seqmesh.engine.kernels import Kernel, Problem, available
from seqmesh.masks import Band


@dataclass(frozen=True, kw_only=True)
class Feature:
    """Something that a problem may ask for."""

    name: str
    asks: dict[str, Any]
    """Fields of `Problem` that say so."""


DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIMS = (8, 20, 64, 96, 128, 192, 256, 320)
"""Tried one by one."""
USUAL_HEAD_DIM = 64
WINDOW = Band(0, 4096, 0, 4096, lo=0, hi=1023)
"""A window of 1,024 tokens: how many calls does a kernel make of it?"""


DEVICES = (
    Feature(name="cpu", asks={"device_type": "cpu"}),
    Feature(name="cuda", asks={"device_type": "cuda"}),
    Feature(name="sm80", asks={"device_type": "cuda", "gpu": "sm80"}),
    Feature(name="sm90", asks={"device_type": "cuda", "gpu": "sm90"}),
    Feature(name="sm100", asks={"device_type": "cuda", "gpu": "sm100"}),
    Feature(name="rocm", asks={"device_type": "cuda", "gpu": "rocm"}),
)
"""Where a kernel may be asked to run."""
FEATURES = (
    Feature(name="attention", asks={}),
    *(Feature(name=f"head dim {dim}", asks={"head_dim": dim}) for dim in HEAD_DIMS),
    Feature(name="softcap", asks={"softcap": 30.0}),
    Feature(name="another value head dim", asks={"head_dim": 192, "value_head_dim": 128}),
)


@dataclass(frozen=True, kw_only=True)
class Capability:
    """Whether a kernel has a feature."""

    kernel: str
    device: str
    dtype: str
    feature: str
    refusal: str | None
    """Why not, in the kernel's words; None if it has it."""


def capabilities(kernels: Iterable[Kernel] | None = None) -> tuple[Capability, ...]:
    """What every kernel says about every device, dtype and feature.

    Args:
        kernels: those that come with seqmesh by default; pass your own to see what they say.
    """
    asked = available() if kernels is None else tuple(kernels)
    found: list[Capability] = []
    for kernel, device, dtype in product(asked, expressible(DEVICES), DTYPES):
        for feature in expressible(FEATURES):
            usual = {"head_dim": USUAL_HEAD_DIM, "softcap": None}
            problem = Problem(dtype=DTYPES[dtype], **{**usual, **device.asks, **feature.asks})
            found.append(
                Capability(
                    kernel=kernel.name,
                    device=device.name,
                    dtype=dtype,
                    feature=feature.name,
                    refusal=kernel.refusal(problem),
                )
            )
    return tuple(found)


def expressible(features: Iterable[Feature]) -> tuple[Feature, ...]:
    """Those that a problem has fields for."""
    words = {field.name for field in fields(Problem)}
    return tuple(feature for feature in features if feature.asks.keys() <= words)


def window_calls(kernel: Kernel) -> int:
    """Calls that a kernel makes of WINDOW: 1 where windows are native to it."""
    return len(kernel.tiles(WINDOW))


HEADER = ("kernel", "device", "dtypes", "head dims", "softcap", "a window of 1,024 over 4,096 rows")


def table(kernels: Sequence[Kernel] | None = None) -> list[tuple[str, ...]]:
    """In short: a header, then a row for a kernel and the devices on which it does the same."""
    asked = available() if kernels is None else kernels
    said = capabilities(asked)
    devices: dict[tuple[str, ...], list[str]] = {}
    for kernel, device in product(asked, expressible(DEVICES)):
        here = [one for one in said if (one.kernel, one.device) == (kernel.name, device.name)]
        dtypes = [one.dtype for one in here if one.feature == "attention" and one.refusal is None]
        if dtypes:
            calls = window_calls(kernel)
            window = "1 call" if calls == 1 else f"{calls} calls"
            cells = [_head_dims(here, dtypes), *(_dtypes_with(name, here, dtypes) for name in _optional())]
            row = (kernel.name, ", ".join(dtypes), *cells, window)
            devices.setdefault(row, []).append(device.name)
    return [_header(), *((row[0], ", ".join(names), *row[1:]) for row, names in devices.items())]


def refusals(kernels: Sequence[Kernel] | None = None) -> list[str]:
    """Every reason that a kernel gives, once: `cuda: it runs on cuda, not on cpu`."""
    lines = [f"{one.kernel}: {one.refusal}" for one in capabilities(kernels) if one.refusal is not None]
    return list(dict.fromkeys(lines))


def text(kernels: Sequence[Kernel] | None = None, *, as_markdown: bool = False) -> str:
    """The table and the refusals: for a terminal, or as they stand in docs/kernels.md."""
    header, *rows = table(kernels)
    if as_markdown:
        lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    else:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        aligned = [map(str.ljust, row, widths) for row in (header, *rows)]
        lines = ["  ".join(cells).rstrip() for cells in aligned]
    return "\n".join([*lines, "", *(f"- {refusal}" for refusal in refusals(kernels))])


def as_json() -> str:
    """Every single answer."""
    return json.dumps({"capabilities": [asdict(one) for one in capabilities()]}, indent=1)


def _optional() -> list[str]:
    """Features that have a column of their own."""
    return [
        feature.name
        for feature in expressible(FEATURES)
        if feature.name in ("softcap", "another value head dim")
    ]


def _header() -> tuple[str, ...]:
    return (*HEADER[:4], *_optional(), HEADER[-1])


def _head_dims(here: Sequence[Capability], dtypes: Sequence[str]) -> str:
    """Of those tried, in every dtype of the row."""
    fine = [dim for dim in HEAD_DIMS if _dtypes_with(f"head dim {dim}", here, dtypes) == "yes"]
    if len(fine) == len(HEAD_DIMS):
        return "any"
    return ", ".join(map(str, fine)) or "none"


def _dtypes_with(feature: str, here: Sequence[Capability], dtypes: Sequence[str]) -> str:
    """`yes`, `no`, or the dtypes in which a feature is there."""
    fine = [
        one.dtype for one in here if one.feature == feature and one.refusal is None and one.dtype in dtypes
    ]
    if len(fine) == len(dtypes):
        return "yes"
    return ", ".join(fine) or "no"
