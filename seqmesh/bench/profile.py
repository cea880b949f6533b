"""A measured profile of this machine for `seqmesh plan --profile`: what its ranks reach, all of them at once.

    matrix products        FLOP/s, in fp32        -> with the kernel's rate the peak, of which all are shares
    attention kernel       at two block lengths   -> its rate on long blocks, and the length that runs at half of it
    copies                 bytes/s                -> memory
    all-to-all over gloo   two message sizes      -> latency and bytes/s of the links

    seqmesh bench --profile machine.toml --ranks 4
    seqmesh plan --model ... --gpu measured --gpus-per-node 4 --profile machine.toml --precision fp32

Ranks are processes of one thread on the CPU, as `seqmesh train` starts them. GPUs are not measured yet: write
their profile by hand (docs/planner.md has the form).
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from seqmesh.engine.kernels import Problem, select
from seqmesh.masks import Band
from seqmesh.processes import Workers
from seqmesh.provenance import commit, machine, this_command
from seqmesh.train.model import measure_matmul_flops_per_s

HEADS, HEAD_DIM = 4, 64
BLOCKS = (256, 2048)
"""Rows of the two full blocks."""
MESSAGES = (64 << 10, 8 << 20)
"""Bytes that a rank sends in the two all-to-alls."""
COPIED_FLOATS = 8 << 20
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One rank's rates, the median of a few rounds, while all ranks measure the same."""

    matmul: float
    """FLOP/s of large products."""
    forward: tuple[float, float]
    """FLOP/s of attention forward at the two block lengths."""
    backward: tuple[float, float]
    """FLOP/s of its backward, counted as 2.5 forwards."""
    copy: float
    """Bytes/s, read and written."""
    exchange: tuple[float, float]
    """Seconds of an all-to-all of the two sizes."""
    memory: int
    """Bytes of memory for each rank."""


def write_profile(path: Path, ranks: int) -> None:
    """Measure, and write the TOML file. Forks processes: call it before any tensor work.

    Raises:
        ValueError: the file cannot be written; before anything is measured.
    """
    if ranks < 2:
        raise ValueError(
            f"--ranks {ranks}: a profile measures links too, which a single rank has not; use at least 2"
        )
    try:
        path.touch()
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror}; choose another place") from None
    with Workers(lambda: _handler(ranks), world=ranks) as workers:
        measured: list[Measured] = workers.ask(None)
    path.write_text(to_toml(_slowest(measured), ranks), encoding="utf-8")


def _slowest(measured: list[Measured]) -> Measured:
    """A step waits for its slowest rank."""
    return Measured(
        matmul=min(m.matmul for m in measured),
        forward=(min(m.forward[0] for m in measured), min(m.forward[1] for m in measured)),
        backward=(min(m.backward[0] for m in measured), min(m.backward[1] for m in measured)),
        copy=min(m.copy for m in measured),
        exchange=(max(m.exchange[0] for m in measured), max(m.exchange[1] for m in measured)),
        memory=min(m.memory for m in measured),
    )


def to_toml(m: Measured, ranks: int) -> str:
    """The profile as a file that `seqmesh plan --profile` reads.

    Rates are in units of 10^12 and 10^9, per rank.
    """
    half_forward, long_forward = long_block_rate(m.forward)
    _, long_backward = long_block_rate(m.backward)
    latency, rate = link(m.exchange)
    peak = max(m.matmul, long_forward, long_backward)
    host = machine()
    source = f"seqmesh bench --profile, {ranks} ranks of one thread on {host['cores']} cores, {host['cpu']}, torch {host['torch']}, {commit()}"
    lines = [
        f"# Written by `{this_command()}`. Links are gloo's, of whatever class; offloading to a host means nothing here.",
        "[gpu.measured]",
        f"tflops_fp32 = {peak / 1e12:.6g}",
        f"memory_gb = {m.memory / 1e9:.6g}",
        f"memory_tb_per_s = {m.copy / 1e12:.6g}",
        *(f"{name}_gb_per_s = {rate / 1e9:.6g}" for name in ("scale_up", "pcie", "network")),
        f'source = "{source}"',
        "measured = true",
        "[gpu.measured.assumptions]",
        *(f"{name} = 1.0" for name in ("memory", "scale_up", "network", "pcie")),
        f"matmul = {m.matmul / peak:.4g}",
        f"attention_forward = {long_forward / peak:.4g}",
        f"attention_backward = {long_backward / peak:.4g}",
        f"attention_half_rows = {half_forward:.4g}",
        f"small_head = {HEAD_DIM}",
        "small_head_rate = 1.0",
        f"scale_up_latency = {latency:.4g}",
        f"network_latency = {latency:.4g}",
    ]
    return "\n".join(lines) + "\n"


def long_block_rate(rates: tuple[float, float]) -> tuple[float, float]:
    """(rows of half efficiency, FLOP/s of endless blocks) from the rates at BLOCKS: 1 / rate = (1 + half /
    rows) / endless.
    """
    short, long = (1 / rate for rate in rates)
    slope = max(0.0, (short - long) / (1 / BLOCKS[0] - 1 / BLOCKS[1]))
    endless = long - slope / BLOCKS[1]
    return slope / endless, 1 / endless


def link(seconds: tuple[float, float]) -> tuple[float, float]:
    """(latency, bytes/s) from the times of MESSAGES."""
    per_byte = max(1e-15, (seconds[1] - seconds[0]) / (MESSAGES[1] - MESSAGES[0]))
    return max(0.0, seconds[0] - per_byte * MESSAGES[0]), 1 / per_byte


def _handler(ranks: int) -> Callable[[Any], Measured]:
    def handle(_: Any) -> Measured:
        def together(run: Callable[[], float]) -> float:
            """The median of a few rounds that all ranks begin at once."""
            found = []
            for _ in range(ROUNDS):
                dist.barrier()
                found.append(run())
            return median(found)

        short, long = BLOCKS
        small, large = MESSAGES
        return Measured(
            matmul=together(measure_matmul_flops_per_s),
            forward=(
                together(lambda: _attention(short, backward=False)),
                together(lambda: _attention(long, backward=False)),
            ),
            backward=(
                together(lambda: _attention(short, backward=True)),
                together(lambda: _attention(long, backward=True)),
            ),
            copy=together(_copy),
            exchange=(
                together(lambda: _exchange(small, ranks)),
                together(lambda: _exchange(large, ranks)),
            ),
            memory=_memory() // ranks,
        )

    return handle


def _timed(run: Callable[[], Any], least: float = 0.1) -> float:
    """Seconds of one call, over as many as take `least` seconds, after one that is not counted."""
    run()
    calls, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < least:
        run()
        calls += 1
    return spent / calls


def _attention(rows: int, backward: bool) -> float:
    """FLOP/s of the kernel on one full block."""
    kernel = select("auto", Problem(device_type="cpu", dtype=torch.float32, head_dim=HEAD_DIM, softcap=None))
    q, k, v, grad = (torch.randn(1, HEADS, rows, HEAD_DIM) for _ in range(4))
    block, scale = Band(0, rows, 0, rows), HEAD_DIM**-0.5
    out, lse = kernel.forward(q, k, v, block, scale, None)
    flops = 4.0 * HEADS * rows * rows * HEAD_DIM
    if not backward:
        return flops / _timed(lambda: kernel.forward(q, k, v, block, scale, None))
    return 2.5 * flops / _timed(lambda: kernel.backward(grad, q, k, v, out, lse, block, scale, None))


def _copy() -> float:
    """Bytes/s of a copy larger than the caches: each byte is read and written."""
    a, b = torch.randn(COPIED_FLOATS), torch.empty(COPIED_FLOATS)
    return 2.0 * a.numel() * 4 / _timed(lambda: b.copy_(a))


def _exchange(sent: int, ranks: int) -> float:
    """Seconds of an all-to-all in which a rank sends so many bytes to others."""
    floats = sent // 4 // (ranks - 1) * ranks  # a part for each other rank, and one's own, which stays
    source, target = torch.zeros(floats), torch.empty(floats)
    repeats = 4
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_to_all_single(target, source)
    return (time.perf_counter() - start) / repeats


def _memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
