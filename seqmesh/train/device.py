"""Where a run computes: CPU ranks over gloo, or a GPU for each rank over NCCL.

One GPU has run it (docs/gpu.md), several have not.

What ranks tell each other in numbers and objects goes over gloo in both cases.
"""

import os
import resource
import sys
import time
from pathlib import Path
from typing import Literal

import torch

Device = Literal["cpu", "cuda"]


def check(device: Device) -> None:
    """Raise ValueError where there are no such devices. Asks for their number without using them."""
    if device == "cuda" and not torch.cuda.device_count():
        raise ValueError('run.device="cuda", but PyTorch sees no CUDA device here; use run.device="cpu"')


def claim(device: Device, rank: int) -> None:
    """Take this rank's GPU: that of LOCAL_RANK, which a launcher sets, or of its rank on one machine.

    Raises:
        ValueError: more ranks on this machine than GPUs, two of which NCCL does not let share one.
    """
    if device != "cuda":
        return
    place, there = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
    if place >= there:
        raise ValueError(
            f'run.device="cuda": rank {rank} is number {place} on its machine, which has {there} GPUs; start'
            " a rank for each GPU, on more machines with torchrun"
        )
    torch.cuda.set_device(place)


def peak_memory_bytes(device: Device) -> int:
    """High-water mark of this process: resident set on CPU, what tensors took on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes(device: Device) -> int:
    """What this process has now: its resident set on CPU, what tensors take on a GPU."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # no Linux
        return peak_memory_bytes(device)
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes(device: Device, ranks_here: int) -> int:
    """What this rank can use: what its GPU has free, or its share of what the machine has."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(free)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        there = kib * 1024
    except (OSError, StopIteration):  # no Linux
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return there // ranks_here


def name_of(device: Device) -> str:
    """As PyTorch calls it."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def measure_matmul_flops_per_s(
    device: Device = "cpu", dtype: torch.dtype = torch.float32, *, seconds: float = 0.15
) -> float:
    """Matmul FLOP/s of this process, with its threads or on its GPU, over about `seconds`."""
    size = 768 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    torch.mm(a, b, out=out)  # the first call starts threads and is not counted
    calls = 0
    finish(device)
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        torch.mm(a, b, out=out)
        finish(device)
        calls += 1
    return 2.0 * size**3 * calls / spent


def finish(device: Device) -> None:
    """Wait for what a GPU was given to do."""
    if device == "cuda":
        torch.cuda.synchronize()
