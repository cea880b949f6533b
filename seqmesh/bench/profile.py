"""A measured profile of this machine for `seqmesh plan --profile`: what its ranks or its GPU reach.

    matrix products        by size                  -> FLOP/s of large ones, the outputs with half of it
    attention              by rows and head dim     -> its rates on long blocks, the rows with half of them
    copies                 bytes/s                  -> memory; on a GPU the host's link too
    all-to-all over gloo   two message sizes        -> latency and bytes/s of the links, of CPU ranks

    seqmesh bench --profile machine.toml                        one GPU, in bf16, where there is one
    seqmesh plan --gpu measured --profile machine.toml --model ...
    seqmesh bench --profile machine.toml --device cpu --ranks 4
    seqmesh plan --gpu measured --gpus-per-node 4 --profile machine.toml --precision fp32 --model ...

CPU ranks are processes of one thread, all of which measure at once, as `seqmesh train` starts them. A GPU is
measured alone: its links are those of the GPU that it is `like`.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from seqmesh.bench import curves
from seqmesh.bench.curves import SIZES, Rates
from seqmesh.foresee import known_as
from seqmesh.planner.inputs.hardware import known_gpus, load_gpu
from seqmesh.processes import Workers
from seqmesh.provenance import commit, machine, this_command
from seqmesh.train.device import Device

MESSAGES = (64 << 10, 8 << 20)
"""Bytes that a rank sends in the two all-to-alls."""
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class RankRates:
    """One CPU rank's rates, while all ranks measure the same."""

    compute: Rates
    exchange: tuple[float, float]
    """Seconds of an all-to-all of the two sizes."""
    memory: int
    """Bytes of memory for each rank."""


@dataclass(frozen=True, kw_only=True)
class GpuRates:
    """A GPU's rates."""

    name: str
    """As PyTorch calls it."""
    like: str
    """The planner's GPU whose links are taken."""
    compute: Rates
    host_copy: float
    """Bytes/s."""
    memory: int
    """Bytes, as PyTorch reports them."""


def write_profile(path: Path, device: str | None = None, ranks: int | None = None, like: str = "") -> None:
    """Measure, and write the TOML file. Forks processes on CPU: call it before any tensor work.

    Args:
        path: of the file.
        device: "cuda" or "cpu"; default: a GPU if there is one.
        ranks: of the CPU, measured at once; default: 4.
        like: the planner's name of the GPU whose links are taken; default: found by PyTorch's name.

    Raises:
        ValueError: something that cannot be measured, or the file cannot be written; before anything is.
    """
    has_gpu = torch.cuda.device_count() > 0
    chosen = device or ("cuda" if has_gpu else "cpu")
    if chosen not in SIZES:
        raise ValueError(f"--device {chosen}: a profile is of cuda or cpu; use one of them")
    if chosen == "cuda":
        if not has_gpu:
            raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
        if ranks is not None:
            raise ValueError(f"--ranks {ranks}: a GPU is measured alone; leave it out, or use --device cpu")
        name = torch.cuda.get_device_name()
        found = _like(name, like)
        _touch(path)
        path.write_text(gpu_toml(_measured_gpu(name, found)), encoding="utf-8")
        return
    if like:
        raise ValueError(f"--gpu {like}: CPU ranks have links of their own; leave it out")
    world = 4 if ranks is None else ranks
    if world < 2:
        raise ValueError(
            f"--ranks {world}: a profile measures links too, which a single rank has not; use at least 2"
        )
    _touch(path)
    with Workers(lambda: _handler(world), world=world) as workers:
        of_ranks: list[RankRates] = workers.ask(None)
    path.write_text(to_toml(slowest(of_ranks), world), encoding="utf-8")


def _touch(path: Path) -> None:
    try:
        path.touch()
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror}; choose another place") from None


def _like(name: str, asked: str) -> str:
    found = asked or known_as(name)
    if not found:
        raise ValueError(
            f"the planner does not know {name!r}, whose links one GPU cannot measure; pass --gpu with one"
            f" whose links are like its own: {', '.join(known_gpus())}"
        )
    return load_gpu(found).name


def slowest(of_ranks: list[RankRates]) -> RankRates:
    """A step waits for its slowest rank."""

    def least(of: Callable[[Rates], dict[int, float]]) -> dict[int, float]:
        curves_of_ranks = [of(rank.compute) for rank in of_ranks]
        return {size: min(curve[size] for curve in curves_of_ranks) for size in curves_of_ranks[0]}

    small, large = ([rank.exchange[i] for rank in of_ranks] for i in (0, 1))
    compute = replace(
        of_ranks[0].compute,
        products=least(lambda rates: rates.products),
        forward=least(lambda rates: rates.forward),
        backward=least(lambda rates: rates.backward),
        small_head=min(rank.compute.small_head for rank in of_ranks),
        copy=min(rank.compute.copy for rank in of_ranks),
    )
    # Seconds: the most are slowest.
    exchange = max(small), max(large)
    return RankRates(compute=compute, exchange=exchange, memory=min(rank.memory for rank in of_ranks))


def to_toml(rates: RankRates, ranks: int) -> str:
    """The profile of CPU ranks as a file that `seqmesh plan --profile` reads.

    Rates are in units of 10^12 and 10^9, per rank.
    """
    latency, rate = link(rates.exchange)
    host = machine()
    source = (
        f"seqmesh bench --profile, {ranks} ranks of one thread on {host['cores']} cores, {host['cpu']},"
        f" torch {host['torch']}, {commit()}"
    )
    peak, assumptions = _assumptions(rates.compute, "cpu")
    lines = [
        f"# Written by `{this_command()}`."
        " Links are gloo's, of whatever class; offloading to a host means nothing here.",
        "[gpu.measured]",
        f"tflops_fp32 = {peak / 1e12:.6g}",
        f"memory_gb = {rates.memory / 1e9:.6g}",
        f"memory_tb_per_s = {rates.compute.copy / 1e12:.6g}",
        *(f"{name}_gb_per_s = {rate / 1e9:.6g}" for name in ("scale_up", "pcie", "network")),
        f'source = "{source}"',
        "measured = true",
        "[gpu.measured.assumptions]",
        *(f"{name} = 1.0" for name in ("memory", "scale_up", "network", "pcie")),
        *assumptions,
        f"scale_up_latency = {latency:.4g}",
        f"network_latency = {latency:.4g}",
    ]
    return "\n".join(lines) + "\n"


def gpu_toml(rates: GpuRates) -> str:
    """The profile of a GPU, the same. Links are those of the GPU that it is like."""
    peak, assumptions = _assumptions(rates.compute, "cuda")
    source = f"seqmesh bench --profile, {rates.name}, torch {machine()['torch']}, {commit()}"
    lines = [
        f"# Written by `{this_command()}`. Links are those of {rates.like}, which are not measured.",
        "[gpu.measured]",
        f'like = "{rates.like}"',
        f"tflops = {peak / 1e12:.6g}",
        f"memory_gib = {rates.memory / 2**30:.6g}",
        f"reported_gib = {rates.memory / 2**30:.6g}",
        f"memory_tb_per_s = {rates.compute.copy / 1e12:.6g}",
        f"pcie_gb_per_s = {rates.host_copy / 1e9:.6g}",
        f'source = "{source}"',
        "measured = true",
        "[gpu.measured.assumptions]",
        *(f"{name} = 1.0" for name in ("memory", "host_copy")),
        *assumptions,
    ]
    return "\n".join(lines) + "\n"


def _assumptions(rates: Rates, device: Device) -> tuple[float, list[str]]:
    """FLOP/s of which all rates are shares, and these as lines."""
    products, attention = curves.fitted(rates.products), curves.of_both_passes(rates)
    longest = max(rates.forward)
    idle = 1 + attention.half / longest
    forward, backward = idle * rates.forward[longest], idle * rates.backward[longest]
    # The planner's rates are shares of the peak: it must be the largest of them.
    peak = max(products.endless, forward, backward)
    small, _ = SIZES[device].head_dims
    return peak, [
        f"matmul = {products.endless / peak:.4g}",
        f"matmul_half_outputs = {products.half:.4g}",
        f"attention_forward = {forward / peak:.4g}",
        f"attention_backward = {backward / peak:.4g}",
        f"attention_half_rows = {attention.half:.4g}",
        f"small_head = {small}",
        f"small_head_rate = {min(1.0, rates.small_head):.4g}",
    ]


def link(seconds: tuple[float, float]) -> tuple[float, float]:
    """Latency in seconds and bytes/s, from the times of MESSAGES.

    The model: time = latency + bytes / rate, a straight line in bytes through two points.
    """
    small_s, large_s = seconds
    # Noise may make the large message look faster: a link without latency or of an endless rate then.
    per_byte = max(1e-15, (large_s - small_s) / (MESSAGES[1] - MESSAGES[0]))
    latency = max(0.0, small_s - per_byte * MESSAGES[0])
    return latency, 1 / per_byte


def _measured_gpu(name: str, like: str) -> GpuRates:
    def repeated(run: Callable[[], float]) -> float:
        return median(run() for _ in range(ROUNDS))

    compute = curves.measure("cuda", repeated)
    return GpuRates(
        name=name,
        like=like,
        compute=compute,
        host_copy=repeated(curves.host_copy),
        memory=torch.cuda.get_device_properties(0).total_memory,
    )


def _handler(ranks: int) -> Callable[[Any], RankRates]:
    def handle(_: Any) -> RankRates:
        small, large = MESSAGES
        return RankRates(
            compute=curves.measure("cpu", _together),
            exchange=(
                _together(lambda: _exchange(small, ranks)),
                _together(lambda: _exchange(large, ranks)),
            ),
            memory=_machine_memory() // ranks,
        )

    return handle


def _together(run: Callable[[], float]) -> float:
    """The median of a few rounds that all ranks begin at once: they share caches, memory and links."""
    found: list[float] = []
    for _ in range(ROUNDS):
        dist.barrier()
        found.append(run())
    return median(found)


def _exchange(sent: int, ranks: int) -> float:
    """Seconds of an all-to-all in which a rank sends so many bytes to others."""
    floats = sent // 4 // (ranks - 1) * ranks  # a part for each other rank, and one's own, which stays
    source = torch.zeros(floats)
    target = torch.empty(floats)
    repeats = 4
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_to_all_single(target, source)
    return (time.perf_counter() - start) / repeats


def _machine_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
