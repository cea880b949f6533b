"""How fast attention over N ranks is, against plain attention in one process on the same cores.

Ratios within one run. The two sides take turns, and in every other pair the other side begins:

    one process, 2 threads    #######                #######         scaled_dot_product_attention
    N ranks, 1 thread each           ####### #######                 seqmesh.attention
                              `-- a pair --' `-- a pair --'

Both sides do one causal forward and backward of the same global problem. Each pair gives a ratio; its median
and range are reported. A call's time is from the first rank's start, after a barrier, to the last rank's end.
The ratio of CPU time, summed over the processes of a side, is reported too: other work on the machine moves
it less.

Bound: 2 ranks on 2 cores cannot beat 1.0 but for effects of thread scheduling, as the pairs computed are the
same.
Legend: b batch, s tokens, n local tokens, h heads, d head dim.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from seqmesh import Schedule, SequenceMesh, attention, masks
from seqmesh.bench.figures import Figure, Spread
from seqmesh.processes import Workers

SECTION = "causal forward + backward"
TWO_RANKS_TARGET = 1.05
FOUR_RANKS_TARGET = 1.10


class Degrees(NamedTuple):
    """A mesh."""

    ulysses: int
    ring: int

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.ulysses * self.ring

    def __str__(self) -> str:
        return f"{self.world} ranks (U={self.ulysses}, R={self.ring})"


MESHES = (Degrees(1, 2), Degrees(2, 1), Degrees(2, 2), Degrees(1, 4), Degrees(4, 1))


@dataclass(frozen=True, kw_only=True)
class TimedAttention:
    """Sizes of the attention that is timed, fp32."""

    tokens: int = 8192
    heads: int = 8
    head_dim: int = 64
    cores: int = 2
    """Threads of the process that is compared with."""
    repeats: int = 7
    """Pairs of timed calls per mesh, after one that is not counted."""


class Timing(NamedTuple):
    """One worker's part of a timed call."""

    start_s: float
    """Monotonic seconds: clocks of processes on one machine agree."""
    stop_s: float
    cpu_s: float


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One timed call of each side, one right after the other."""

    plain_s: float
    """Seconds of the one process."""
    wall_ratio: float
    """Seconds of the ranks over those."""
    cpu_ratio: float
    """The same of CPU time."""


def measure(timed: TimedAttention, meshes: Sequence[Degrees] = MESHES) -> Iterator[Figure]:
    """A figure per mesh, and one of the process it is compared with.

    Forks workers: call it before any tensor work.
    """
    # A smaller problem is too short a time to be judged.
    judged = timed.tokens >= TimedAttention().tokens
    with ExitStack() as stack:
        alone = stack.enter_context(Workers(partial(_single_process, timed), threads=timed.cores))
        ranks: dict[int, Workers] = {}
        for world in sorted({mesh.world for mesh in meshes}):
            prepare = partial(_one_rank, timed, [mesh for mesh in meshes if mesh.world == world])
            ranks[world] = stack.enter_context(Workers(prepare, world=world))
        baseline: list[float] = []
        for mesh in meshes:
            answers = in_turns(alone, ranks[mesh.world], mesh, timed.repeats)
            pairs = [_pair(plain, ours) for plain, ours in answers]
            baseline += [pair.plain_s for pair in pairs]
            walls = Spread.of([pair.wall_ratio for pair in pairs])
            cpus = Spread.of([pair.cpu_ratio for pair in pairs])
            yield _figure(mesh, walls, cpus, judged=judged)
    yield _baseline_figure(timed, Spread.of(baseline))


def in_turns(plain: Workers, ours: Workers, request: Any, repeats: int) -> list[tuple[Any, Any]]:
    """Answers of both sides, (plain's, ours'): whatever slows the machine down, or speeds it up, meets both.

    In every other pair the other side begins. One pair more is made before those that are returned, as the
    first call of a side fills caches and makes connections.
    """
    pairs = []
    for repeat in range(repeats + 1):
        order = (plain, ours) if repeat % 2 else (ours, plain)
        answers = {side: side.ask(request) for side in order}
        pairs.append((answers[plain], answers[ours]))
    return pairs[1:]


def _pair(plain: Sequence[Timing], ours: Sequence[Timing]) -> Pair:
    plain_s = wall_seconds(plain)
    plain_cpu_s, cpu_s = (sum(timing.cpu_s for timing in side) for side in (plain, ours))
    return Pair(plain_s=plain_s, wall_ratio=wall_seconds(ours) / plain_s, cpu_ratio=cpu_s / plain_cpu_s)


def _baseline_figure(timed: TimedAttention, seconds: Spread) -> Figure:
    return Figure(
        section=SECTION,
        what=f"one process, {timed.cores} threads, scaled_dot_product_attention: the 1.00",
        measured=seconds.text(2, " s"),
        target="",
        ok=None,
        exact=False,
        values=seconds.values("seconds"),
    )


def _figure(mesh: Degrees, wall: Spread, cpu: Spread, *, judged: bool) -> Figure:
    target = TWO_RANKS_TARGET if mesh.world <= 2 else FOUR_RANKS_TARGET
    return Figure(
        section=SECTION,
        what=f"{mesh}: time / one process",
        measured=f"{wall.text(3)}, CPU time {cpu.median:.3f}",
        target=f"<= {target}",
        ok=wall.median <= target if judged else None,
        exact=False,
        values=wall.values("wall_ratio") | cpu.values("cpu_ratio"),
    )


def wall_seconds(timings: Iterable[Timing]) -> float:
    """From the first worker's start to the last one's end."""
    found = list(timings)
    return max(timing.stop_s for timing in found) - min(timing.start_s for timing in found)


def clocked(run: Callable[[], Any]) -> Timing:
    """Run it on this worker's clocks."""
    cpu = time.process_time()
    start = time.monotonic()
    run()
    return Timing(start, time.monotonic(), time.process_time() - cpu)


def _random_inputs(shape: tuple[int, ...]) -> list[Tensor]:
    """Leaves q, k, v, and a gradient of the output."""
    return [torch.randn(shape, requires_grad=leaf) for leaf in (True, True, True, False)]


def _single_process(timed: TimedAttention) -> Callable[[Degrees], Timing]:
    """The side to compare with: (b, h, s, d) tensors, as this function prefers them."""
    q, k, v, grad = _random_inputs((1, timed.heads, timed.tokens, timed.head_dim))

    def run() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)

    def handle(_: Degrees) -> Timing:
        q.grad = k.grad = v.grad = None
        return clocked(run)

    return handle


def _one_rank(timed: TimedAttention, meshes: Sequence[Degrees]) -> Callable[[Degrees], Timing]:
    """Our side: this rank's part of the same problem on any of the meshes, (b, n, h, d)."""
    schedules: dict[Degrees, Schedule] = {}
    inputs: dict[Degrees, list[Tensor]] = {}
    for degrees in meshes:
        mesh = SequenceMesh.build(ulysses=degrees.ulysses, ring=degrees.ring)
        schedule = Schedule.build(masks.causal(timed.tokens), mesh, "zigzag")
        n = schedule.rows[mesh.ulysses_rank]
        schedules[degrees] = schedule
        inputs[degrees] = _random_inputs((1, n, timed.heads, timed.head_dim))

    def handle(degrees: Degrees) -> Timing:
        q, k, v, grad = inputs[degrees]
        schedule = schedules[degrees]
        q.grad = k.grad = v.grad = None
        dist.barrier()  # requests reach the ranks one after the other
        return clocked(lambda: attention(q, k, v, schedule).backward(grad))

    return handle
