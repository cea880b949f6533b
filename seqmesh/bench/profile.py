"""A measured profile of this machine for `seqmesh plan --profile`: what its ranks reach, all of them at once.

    matrix products        FLOP/s, in fp32        -> with the kernel's rates the peak, of which all are shares
    attention kernel       at two block lengths   -> its rate on long blocks, the length with half of it
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

from seqmesh.engine.kernels import LogitRule, Problem, select
from seqmesh.masks import Band
from seqmesh.processes import Workers
from seqmesh.provenance import commit, machine, this_command
from seqmesh.train.device import measure_matmul_flops_per_s

HEADS = 4
HEAD_DIM = 64
BLOCKS = (256, 2048)
"""Rows of the two full blocks."""
MESSAGES = (64 << 10, 8 << 20)
"""Bytes that a rank sends in the two all-to-alls."""
COPIED_FLOATS = 8 << 20
ROUNDS = 5
BACKWARD_FORWARDS = 2.5
"""A backward's FLOPs over a forward's, as seqmesh/planner/cost/attention.py counts them."""


@dataclass(frozen=True, kw_only=True)
class RankRates:
    """One rank's rates, each the median of a few rounds, while all ranks measure the same."""

    matmul: float
    """FLOP/s of large products."""
    forward: tuple[float, float]
    """FLOP/s of attention forward at the two block lengths."""
    backward: tuple[float, float]
    """FLOP/s of its backward, counted as BACKWARD_FORWARDS forwards."""
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
        of_ranks: list[RankRates] = workers.ask(None)
    path.write_text(to_toml(_slowest(of_ranks), ranks), encoding="utf-8")


def _slowest(of_ranks: list[RankRates]) -> RankRates:
    """A step waits for its slowest rank."""
    return RankRates(
        matmul=min(rank.matmul for rank in of_ranks),
        forward=_of_both_sizes(min, [rank.forward for rank in of_ranks]),
        backward=_of_both_sizes(min, [rank.backward for rank in of_ranks]),
        copy=min(rank.copy for rank in of_ranks),
        exchange=_of_both_sizes(max, [rank.exchange for rank in of_ranks]),  # seconds: the most are slowest
        memory=min(rank.memory for rank in of_ranks),
    )


def _of_both_sizes(
    choose: Callable[[list[float]], float], found: list[tuple[float, float]]
) -> tuple[float, float]:
    return choose([small for small, _ in found]), choose([large for _, large in found])


def to_toml(rates: RankRates, ranks: int) -> str:
    """The profile as a file that `seqmesh plan --profile` reads.

    Rates are in units of 10^12 and 10^9, per rank.
    """
    half_forward, long_forward = long_block_rate(rates.forward)
    _, long_backward = long_block_rate(rates.backward)
    latency, rate = link(rates.exchange)
    # The planner's rates are shares of the peak: it must be the largest of them.
    peak = max(rates.matmul, long_forward, long_backward)
    host = machine()
    source = (
        f"seqmesh bench --profile, {ranks} ranks of one thread on {host['cores']} cores, {host['cpu']},"
        f" torch {host['torch']}, {commit()}"
    )
    lines = [
        f"# Written by `{this_command()}`."
        " Links are gloo's, of whatever class; offloading to a host means nothing here.",
        "[gpu.measured]",
        f"tflops_fp32 = {peak / 1e12:.6g}",
        f"memory_gb = {rates.memory / 1e9:.6g}",
        f"memory_tb_per_s = {rates.copy / 1e12:.6g}",
        *(f"{name}_gb_per_s = {rate / 1e9:.6g}" for name in ("scale_up", "pcie", "network")),
        f'source = "{source}"',
        "measured = true",
        "[gpu.measured.assumptions]",
        *(f"{name} = 1.0" for name in ("memory", "scale_up", "network", "pcie")),
        f"matmul = {rates.matmul / peak:.4g}",
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
    """Rows of a block that runs at half its rate, and FLOP/s of endless blocks, from the rates at BLOCKS.

    The model: 1 / rate = (1 + half / rows) / endless, a straight line in 1 / rows through two points.
    """
    short, long = (1 / rate for rate in rates)
    # Noise may make the short block look faster; then there is no half to speak of.
    slope = max(0.0, (short - long) / (1 / BLOCKS[0] - 1 / BLOCKS[1]))
    endless = long - slope / BLOCKS[1]
    return slope / endless, 1 / endless


def link(seconds: tuple[float, float]) -> tuple[float, float]:
    """Latency in seconds and bytes/s, from the times of MESSAGES.

    The model: time = latency + bytes / rate, a straight line in bytes through two points.
    """
    small_s, large_s = seconds
    # Noise may make the large message look faster: a link without latency or of an endless rate then.
    per_byte = max(1e-15, (large_s - small_s) / (MESSAGES[1] - MESSAGES[0]))
    latency = max(0.0, small_s - per_byte * MESSAGES[0])
    return latency, 1 / per_byte


def _handler(ranks: int) -> Callable[[Any], RankRates]:
    def handle(_: Any) -> RankRates:
        short, long = BLOCKS
        small, large = MESSAGES
        return RankRates(
            matmul=_together(measure_matmul_flops_per_s),
            forward=(
                _together(lambda: _attention(short, backward=False)),
                _together(lambda: _attention(long, backward=False)),
            ),
            backward=(
                _together(lambda: _attention(short, backward=True)),
                _together(lambda: _attention(long, backward=True)),
            ),
            copy=_together(_copy),
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


def _timed(run: Callable[[], Any], least: float = 0.1) -> float:
    """Seconds of one call, over as many as take `least` seconds, after one that is not counted."""
    run()
    calls = 0
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < least:
        run()
        calls += 1
    return spent / calls


def _attention(rows: int, backward: bool) -> float:
    """FLOP/s of the kernel on one full block."""
    kernel = select("auto", Problem(device_type="cpu", dtype=torch.float32, head_dim=HEAD_DIM, softcap=None))
    q, k, v, grad = (torch.randn(1, HEADS, rows, HEAD_DIM) for _ in range(4))
    (tile,) = kernel.tiles(Band(0, rows, 0, rows))
    rule = LogitRule(scale=HEAD_DIM**-0.5)
    out, lse = kernel.forward(q, k, v, tile, rule)
    flops = 4.0 * HEADS * rows * rows * HEAD_DIM
    if not backward:
        return flops / _timed(lambda: kernel.forward(q, k, v, tile, rule))
    return BACKWARD_FORWARDS * flops / _timed(lambda: kernel.backward(grad, q, k, v, out, lse, tile, rule))


def _copy() -> float:
    """Bytes/s of a copy larger than the caches: each byte is read and written."""
    source = torch.randn(COPIED_FLOATS)
    target = torch.empty(COPIED_FLOATS)
    return 2.0 * source.nbytes / _timed(lambda: target.copy_(source))


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
