"""How fast one device computes, by size: attention by rows and head dim, matrix products, copies.

    1 / rate = (1 + half / size) / endless

Every curve is of this form, which the planner knows too: `endless` is the rate of the largest, and a size of
`half` runs at half of it. Rates are of the kernel that `kernel="auto"` takes, in the dtype that a device
trains in.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from seqmesh.engine.kernels import LogitRule, Problem, select
from seqmesh.masks import Band
from seqmesh.train import device as devices

BACKWARD_FORWARDS = 2.5
"""A backward's FLOPs over a forward's, as seqmesh/planner/cost/attention.py counts them."""
LEAST_SECONDS = {"cpu": 0.1, "cuda": 0.05}
"""Of each measurement."""


@dataclass(frozen=True, kw_only=True)
class CurveSizes:
    """What is measured on a kind of device."""

    dtype: torch.dtype
    heads: int
    head_dims: tuple[int, int]
    """The smaller first; the curve by rows is of the larger."""
    rows: tuple[int, ...]
    """Of full blocks, on both sides."""
    products: tuple[int, ...]
    """Sides of square matrices."""
    copied: int
    """Numbers of a copy: more than the caches hold."""


SIZES: Mapping[devices.Device, CurveSizes] = {
    "cpu": CurveSizes(
        dtype=torch.float32,
        heads=4,
        head_dims=(64, 128),
        rows=(128, 512, 1536),
        products=(128, 256, 768),
        copied=8 << 20,
    ),
    "cuda": CurveSizes(
        dtype=torch.bfloat16,
        heads=16,
        head_dims=(64, 128),
        rows=(256, 1024, 4096, 16384),
        products=(512, 1024, 2048, 4096, 8192),
        copied=256 << 20,
    ),
}


class Curve(NamedTuple):
    """A rate by size."""

    half: float
    """The size with half of it."""
    endless: float
    """The rate of the largest, per second."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured, each the median of a few rounds. FLOP/s and bytes/s."""

    products: dict[int, float]
    """By outputs of the product."""
    forward: dict[int, float]
    """By rows."""
    backward: dict[int, float]
    """By rows, counted as BACKWARD_FORWARDS forwards."""
    small_head: float
    """Rate of the smaller head dim over that of the larger, of both passes."""
    copy: float
    """Read and written."""


def fitted(rates: Mapping[int, float]) -> Curve:
    """The curve through the rates of two sizes or more, by least squares of relative errors."""
    # 1 / rate is a straight line in 1 / size. Each equation is divided by its left side.
    lines = [(rate, rate / size) for size, rate in rates.items()]
    aa, ab, bb = (sum(x[i] * x[j] for x in lines) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(x[i] for x in lines) for i in (0, 1))
    slope = (b * aa - a * ab) / (aa * bb - ab * ab)
    # Noise may make small ones look faster; then there is no half to speak of.
    slope = max(0.0, slope)
    at_no_size = (a - ab * slope) / aa
    return Curve(slope / at_no_size, 1 / at_no_size)


def measure(device: devices.Device, together: Callable[[Callable[[], float]], float]) -> Rates:
    """Measure this process's device.

    Args:
        device: "cpu" or "cuda".
        together: how a figure is made of a measurement that may be repeated.
    """
    sizes = SIZES[device]
    small, large = sizes.head_dims
    forward, backward = {}, {}
    for rows in sizes.rows:
        attend = _attention(device, sizes, rows, large)
        forward[rows] = together(attend.forward)
        backward[rows] = together(attend.backward)
    longest = sizes.rows[-1]
    attend = _attention(device, sizes, longest, small)
    passes = _of_both(together(attend.forward), together(attend.backward))
    return Rates(
        products={n * n: together(_product(device, sizes.dtype, n)) for n in sizes.products},
        forward=forward,
        backward=backward,
        small_head=passes / _of_both(forward[longest], backward[longest]),
        copy=together(_copy(device, sizes)),
    )


def of_both_passes(rates: Rates) -> Curve:
    """The curve of a forward and a backward together."""
    return fitted({rows: _of_both(rates.forward[rows], rates.backward[rows]) for rows in rates.forward})


def _of_both(forward: float, backward: float) -> float:
    """FLOP/s of a forward and a backward, one after the other."""
    return (1 + BACKWARD_FORWARDS) / (1 / forward + BACKWARD_FORWARDS / backward)


def timed(device: devices.Device, run: Callable[[], Any]) -> float:
    """Seconds of one call, over as many as take a while, after one that is not counted.

    They are given to a GPU all at once, as a program does: it waits for none of them.
    """
    run()
    calls = 1
    while True:
        devices.finish(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        devices.finish(device)
        spent = time.perf_counter() - start
        if spent >= LEAST_SECONDS[device]:
            return spent / calls
        calls *= 2


class _Passes(NamedTuple):
    """Measurements of FLOP/s."""

    forward: Callable[[], float]
    backward: Callable[[], float]


def _attention(device: devices.Device, sizes: CurveSizes, rows: int, head_dim: int) -> _Passes:
    """Of the kernel, on one full block."""
    q, k, v, grad = (
        torch.randn(1, sizes.heads, rows, head_dim, device=device, dtype=sizes.dtype) for _ in range(4)
    )
    kernel = select("auto", Problem(device_type=device, dtype=sizes.dtype, head_dim=head_dim, softcap=None))
    (tile,) = kernel.tiles(Band(0, rows, 0, rows))
    rule = LogitRule(scale=head_dim**-0.5)
    out, lse = kernel.forward(q, k, v, tile, rule)
    flops = 4.0 * sizes.heads * rows * rows * head_dim
    return _Passes(
        lambda: flops / timed(device, lambda: kernel.forward(q, k, v, tile, rule)),
        lambda: (
            BACKWARD_FORWARDS
            * flops
            / timed(device, lambda: kernel.backward(grad, q, k, v, out, lse, tile, rule))
        ),
    )


def _product(device: devices.Device, dtype: torch.dtype, n: int) -> Callable[[], float]:
    def measured() -> float:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)
        return 2.0 * n**3 / timed(device, lambda: torch.mm(a, b, out=out))

    return measured


def _copy(device: devices.Device, sizes: CurveSizes) -> Callable[[], float]:
    def measured() -> float:
        source = torch.randn(sizes.copied, device=device)
        target = torch.empty_like(source)
        return 2.0 * source.nbytes / timed(device, lambda: target.copy_(source))

    return measured


def host_copy(bytes_copied: int = 1 << 30) -> float:
    """Bytes/s from the GPU to pinned memory of the host, the slower of both ways."""
    on_gpu = torch.empty(bytes_copied, dtype=torch.uint8, device="cuda")
    on_host = torch.empty(bytes_copied, dtype=torch.uint8, pin_memory=True)
    ways: Sequence[Callable[[], Any]] = (
        lambda: on_host.copy_(on_gpu, non_blocking=True),
        lambda: on_gpu.copy_(on_host, non_blocking=True),
    )
    return bytes_copied / max(timed("cuda", way) for way in ways)
