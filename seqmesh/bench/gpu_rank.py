"""What splitting costs: the exact work of ONE rank of an R-rank ring, in a single process on one device.

    one rank      all blocks of its schedule, merges, gradients sent home; exchanges are local copies
    one call      causal attention of as many (query, key) pairs in one block, by the same kernel
    share         pairs per second of the first over those of the second: what survives splitting

Both do forward and backward, in turns. The rank is the busiest of its ring, with `tokens` tokens of its own:
the whole sequence is R times as long. No link is measured, and nothing is hidden behind one.

    seqmesh bench gpu-rank                                    bf16 on one GPU, R = 2 to 64
    seqmesh bench gpu-rank --device cpu --tokens 512          fp32

Beside the share stands the planner's, which is of the kernel alone: blocks that are short on a side are
slower by a rule (`attention_half_rows` of its assumptions); merges, copies and launches are not in it.

Legend: b batch, n local tokens, h query heads, g K/V heads, d head dim, R ring degree.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from seqmesh import Schedule, SequenceMesh, attention, layouts, masks
from seqmesh.bench.figures import Spread
from seqmesh.bench.local_copies import alone
from seqmesh.bench.report import header, opened, write_json
from seqmesh.bench.schedules import Tail, given_tail
from seqmesh.engine.merge import merges_in_one_launch
from seqmesh.layouts import Layout, load
from seqmesh.masks import Mask
from seqmesh.planner.cost.ring_load import ring_load
from seqmesh.planner.inputs.assumptions import Assumptions

RINGS = (2, 4, 8, 16, 32, 64)
TOKENS = {"cuda": 8192, "cpu": 512}
"""Of one rank."""
REPEATS = 5
"""Pairs of timed calls, after one that is not counted."""


@dataclass(frozen=True, kw_only=True)
class RankWork:
    """What is timed."""

    device: str
    tokens: int
    rings: tuple[int, ...] = RINGS
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    repeats: int = REPEATS

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no ring has."""
        if self.device not in TOKENS:
            raise ValueError(f"--device {self.device}: a rank is timed on cuda or cpu; use one of them")
        if self.tokens < 2 or min(self.rings, default=0) < 2:
            raise ValueError(
                f"--tokens {self.tokens}, --rings {self.rings}: use 2 tokens and 2 ranks at least"
            )

    @property
    def dtype(self) -> torch.dtype:
        """What a device trains in."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """One ring degree and mask."""

    mask: str
    layout: str
    ring: int
    tokens: int
    """Of this rank."""
    pairs: int
    blocks: int
    rank_ms: float
    host_ms: float
    """Until all of the rank's work was given to the device: near `rank_ms`, the device waits for the host."""
    call_ms: float
    """Of the one call, scaled to as many pairs."""
    share: Spread
    predicted: float
    """The planner's, of the kernel alone."""


def work_of(device: str, tokens: int | None, rings: str | None) -> RankWork:
    """What the command line asks for.

    Raises:
        ValueError: a device or sizes that cannot be timed.
    """
    try:
        degrees = RINGS if rings is None else tuple(int(part) for part in rings.split(","))
    except ValueError:
        raise ValueError(f"--rings {rings}: write ring degrees with commas, such as 2,8,64") from None
    chosen = TOKENS.get(device, 2) if tokens is None else tokens
    return RankWork(device=device, tokens=chosen, rings=degrees)


def run_gpu_rank(work: RankWork, json_path: Path | None) -> int:
    """Time and print everything: the exit code.

    Raises:
        ValueError: there is no such device, or json_path cannot be written; before anything is timed.
    """
    if work.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench gpu-rank: PyTorch sees no CUDA device here; use --device cpu")
    merges = "in one launch" if merges_in_one_launch(torch.device(work.device)) else "in plain operations"
    about = {**header(), "device": device_name(work.device), "merges": merges, "work": _in_words(work)}
    console = opened(about, json_path)
    found = list(measure(work))
    console.print(table(found))
    console.print("share: pairs/s of the rank over those of one causal call; planner: of the kernel alone")
    write_json({**about, "shares": [asdict(one) for one in found]}, json_path)
    return 0


def measure(work: RankWork) -> Iterator[RankShare]:
    """Every ring degree of causal zigzag, packed documents and a window."""
    for name in ("causal", "documents", "window"):
        for ring in work.rings:
            mask, layout = _problem(name, work.tokens, ring)
            yield _measured(name, mask, layout, work)


def _problem(name: str, tokens: int, ring: int) -> tuple[Mask, Layout]:
    """A mask over tokens x ring, and its layout."""
    s = tokens * ring
    if name == "causal":
        return masks.causal(s), layouts.zigzag(s, ring)
    if name == "window":
        return masks.sliding_window(s, max(1, tokens // 2)), layouts.contiguous(s, ring)
    # Some dozens of documents on a rank, the longest of them longer than a rank.
    packed = masks.documents(given_tail(Tail(mu=6.5, sigma=1.5, tokens=s, ring=ring), seed=0))
    return packed, layouts.balanced(packed, ring)


def _measured(name: str, mask: Mask, layout: Layout, work: RankWork) -> RankShare:
    areas = load.areas(mask, layout)
    busiest = max(range(layout.ring), key=areas.__getitem__)
    with alone(layout.ring, busiest) as (mesh, group):
        schedule = Schedule.build(mask, mesh, layout)
        pairs = schedule.ring.area
        side = max(1, isqrt(2 * pairs))
        call = Schedule.build(masks.causal(side), SequenceMesh.alone(), "contiguous")
        rank_run, call_run = _Run(schedule, work), _Run(call, work)
        rank_run.once()  # not counted: it fills caches, and shows that nothing is NaN, which may be slow
        rank_run.check_finite()
        sent = group.bytes_sent
        traffic = schedule.traffic(
            batch=1, heads=work.heads, kv_heads=work.kv_heads, head_dim=work.head_dim, dtype=work.dtype
        )
        assert sent == traffic.forward_bytes + traffic.backward_bytes, "an exchange went past the copies"
        call_run.once()
        times = [_in_turns(rank_run, call_run, repeat) for repeat in range(work.repeats)]
    per_pair = pairs / call.mask.area
    return RankShare(
        mask=name,
        layout=layout.name,
        ring=layout.ring,
        tokens=layout.counts[busiest],
        pairs=pairs,
        blocks=sum(len(stage.blocks) for stage in schedule.ring.stages),
        rank_ms=1000 * Spread.of([rank.seconds for rank, _ in times]).median,
        host_ms=1000 * Spread.of([rank.host_seconds for rank, _ in times]).median,
        call_ms=1000 * per_pair * Spread.of([call.seconds for _, call in times]).median,
        share=Spread.of([per_pair * call.seconds / rank.seconds for rank, call in times]),
        predicted=_predicted(mask, layout.name, layout.ring, side),
    )


def _predicted(mask: Mask, layout: str, ring: int, side: int) -> float:
    """The planner's pairs per second of the busiest rank over those of one causal call."""
    half_rows = Assumptions().attention_half_rows
    speeds: list[float] = []
    for of, name, degree in ((mask, layout, ring), (masks.causal(side), "contiguous", 1)):
        (found,) = ring_load(of, name, degree, half_rows)
        pairs = sum(stage.count * stage.pairs for stage in found.stages)
        speeds.append(pairs / sum(stage.count * stage.slow_pairs for stage in found.stages))
    split, whole = speeds
    return split / whole


class _Once(NamedTuple):
    """What one forward and backward took."""

    seconds: float
    host_seconds: float
    """Until the last operation was given to the device."""


class _Run:
    """Forward and backward of one schedule on random inputs, timed."""

    def __init__(self, schedule: Schedule, work: RankWork) -> None:
        n = schedule.rows[0]

        def normal(heads: int) -> Tensor:
            return torch.randn(1, n, heads, work.head_dim, dtype=work.dtype, device=work.device)

        self._schedule = schedule
        self._q = normal(work.heads).requires_grad_()
        self._k = normal(work.kv_heads).requires_grad_()
        self._v = normal(work.kv_heads).requires_grad_()
        self._grad = normal(work.heads)
        self._out: Tensor | None = None

    def once(self) -> _Once:
        """Do it."""
        self._q.grad = self._k.grad = self._v.grad = None
        self._wait()
        start = time.perf_counter()
        self._out = attention(self._q, self._k, self._v, self._schedule)
        self._out.backward(self._grad)
        given = time.perf_counter() - start
        self._wait()
        return _Once(time.perf_counter() - start, given)

    def check_finite(self) -> None:
        """Raises RuntimeError if a number is none: times of NaN and infinity are not those of numbers."""
        for x in (self._out, self._q.grad, self._k.grad, self._v.grad):
            if x is None or not bool(x.isfinite().all()):
                raise RuntimeError(
                    "the rank's output or gradients are not finite; its times would mean nothing"
                )

    def _wait(self) -> None:
        if self._grad.is_cuda:
            torch.cuda.synchronize()


def _in_turns(rank_run: _Run, call_run: _Run, repeat: int) -> tuple[_Once, _Once]:
    """Both, the other one first in every other pair: what slows the device down meets both."""
    if repeat % 2:
        call = call_run.once()
        return rank_run.once(), call
    return rank_run.once(), call_run.once()


def table(found: Sequence[RankShare]) -> Table:
    """A row per mask and ring degree."""
    columns = (
        "mask",
        "layout",
        "R",
        "tokens of the rank",
        "pairs",
        "blocks",
        "rank",
        "of it host",
        "one call",
        "share",
        "planner",
    )
    made = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for one in found:
        cells: list[Any] = [one.mask, one.layout, one.ring, f"{one.tokens:,}", f"{one.pairs:,}", one.blocks]
        cells += [
            f"{one.rank_ms:.1f} ms",
            f"{one.host_ms:.1f} ms",
            f"{one.call_ms:.1f} ms",
            one.share.text(2),
            f"{one.predicted:.2f}",
        ]
        made.add_row(*map(str, cells))
    return made


def device_name(device: str) -> str:
    """As the header of a benchmark names it."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _in_words(work: RankWork) -> str:
    return (
        f"forward + backward, {str(work.dtype).removeprefix('torch.')}, {work.tokens:,} tokens a rank,"
        f" h {work.heads}, g {work.kv_heads}, d {work.head_dim}"
    )
