"""How fast attention over N ranks is, against plain attention in one process on the same cores.

Ratios within one run.

    one process, 2 threads    #######         #######         #######             scaled_dot_product_attention
    N ranks, 1 thread each           #######         #######         #######      seqmesh.attention
                              `-- a pair --'  `-- a pair --'                      in turns: first one side first, then the other

Both sides do one causal forward and backward of the same global problem. Each pair gives a ratio; its median
and range are reported. A call's time is from the first rank's start, after a barrier, to the last rank's end.
The ratio of CPU time, summed over the processes of a side, is reported too: other work on the machine moves
it less.

Bound: 2 ranks on 2 cores cannot beat 1.0 but for effects of thread scheduling, as the pairs computed are the
same.
Legend: b batch, s tokens, n local tokens, h heads, d head dim.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from seqmesh import Schedule, SequenceMesh, attention, masks
from seqmesh.bench.figures import Figure, Spread
from seqmesh.processes import Workers

SECTION = "causal forward + backward"
TWO_RANKS_TARGET, FOUR_RANKS_TARGET = 1.05, 1.15


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
class Problem:
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


def measure(problem: Problem, meshes: Sequence[Degrees] = MESHES) -> Iterator[Figure]:
    """A figure per mesh, and one of the process it is compared with.

    Forks workers: call it before any tensor work.
    """
    judged = problem.tokens >= Problem().tokens
    with ExitStack() as stack:
        alone = stack.enter_context(Workers(partial(_single_process, problem), threads=problem.cores))
        ranks = {
            world: stack.enter_context(
                Workers(partial(_one_rank, problem, [m for m in meshes if m.world == world]), world=world)
            )
            for world in sorted({mesh.world for mesh in meshes})
        }
        baseline: list[float] = []
        for mesh in meshes:
            walls, cpus = [], []
            for repeat in range(problem.repeats + 1):
                sides: list[tuple[Workers, Any]] = [(alone, None), (ranks[mesh.world], mesh)]
                timed = [_timed(*side) for side in (sides if repeat % 2 else reversed(sides))]
                (plain_s, plain_cpu_s), (ours_s, ours_cpu_s) = timed if repeat % 2 else reversed(timed)
                if repeat:
                    walls.append(ours_s / plain_s)
                    cpus.append(ours_cpu_s / plain_cpu_s)
                    baseline.append(plain_s)
            yield _figure(mesh, Spread.of(walls), Spread.of(cpus), judged=judged)
    seconds = Spread.of(baseline)
    what = f"one process, {problem.cores} threads, scaled_dot_product_attention: the 1.00"
    values = seconds.values("seconds")
    yield Figure(
        section=SECTION,
        what=what,
        measured=seconds.text(2, " s"),
        target="",
        ok=None,
        exact=False,
        values=values,
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


def _timed(workers: Workers, request: Any) -> tuple[float, float]:
    """Wall seconds from the first start to the last end, and CPU seconds of all processes."""
    timings: list[Timing] = workers.ask(request)
    wall = max(timing.stop_s for timing in timings) - min(timing.start_s for timing in timings)
    return wall, sum(timing.cpu_s for timing in timings)


def _clocked(run: Callable[[], Any]) -> Timing:
    cpu, start = time.process_time(), time.monotonic()
    run()
    return Timing(start, time.monotonic(), time.process_time() - cpu)


def _single_process(problem: Problem) -> Callable[[None], Timing]:
    """The side to compare with: (b, h, s, d) tensors, as this function prefers them."""
    shape = (1, problem.heads, problem.tokens, problem.head_dim)
    q, k, v, grad = (torch.randn(shape, requires_grad=leaf) for leaf in (True, True, True, False))

    def run() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)

    def handle(_: None) -> Timing:
        q.grad = k.grad = v.grad = None
        return _clocked(run)

    return handle


def _one_rank(problem: Problem, meshes: Sequence[Degrees]) -> Callable[[Degrees], Timing]:
    """Our side: this rank's part of the same problem on any of the meshes, (b, n, h, d)."""
    schedules = {
        m: Schedule.build(
            masks.causal(problem.tokens), SequenceMesh.build(ulysses=m.ulysses, ring=m.ring), "zigzag"
        )
        for m in meshes
    }
    inputs = {}
    for m, schedule in schedules.items():
        shape = (1, schedule.rows[schedule.mesh.ulysses_rank], problem.heads, problem.head_dim)
        inputs[m] = [torch.randn(shape, requires_grad=leaf) for leaf in (True, True, True, False)]

    def handle(mesh: Degrees) -> Timing:
        (q, k, v, grad), schedule = inputs[mesh], schedules[mesh]
        q.grad = k.grad = v.grad = None
        dist.barrier()
        return _clocked(lambda: attention(q, k, v, schedule).backward(grad))

    return handle
