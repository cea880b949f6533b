"""What a call of attention costs before any kernel runs: Python, dispatch, memory, and starting exchanges.

    a stub in place of the kernel     makes results of the right shape, computes nothing
    PyTorch's "fake" process group    moves nothing: one process is any rank of a large ring
    a schedule that was called before launches and plans are made once, in the first call

What is left is the time in which a GPU would wait for the host, forward and backward together. It is the
least of many calls, of CPU time: other work on the machine adds to a call and takes nothing away. The call of
a 1 x 1 mesh is compared with `scaled_dot_product_attention` of the same tiny tensors, in turns.

Legend: b batch, n local tokens, h heads, d head dim, R ring degree.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from seqmesh import Schedule, SequenceMesh, attention, masks
from seqmesh.bench.figures import Figure
from seqmesh.engine.kernels import Launch, LogitRule, Problem, Tile, TileShape
from seqmesh.engine.kernels.kernel import disjoint
from seqmesh.masks import Band, Mask
from seqmesh.processes import Workers

SECTION = "host time of one call, forward + backward, kernel and exchange replaced by nothing"
CALLS = 40
"""Of each, the least is taken; ten times as many of the smallest call."""
TOKENS = 1 << 20


class _Stub:
    """A kernel that makes results of the right shape. Blocks are native; as many as can go together."""

    name = "stub"

    def refusal(self, problem: Problem) -> str | None:
        """It takes anything."""
        del problem
        return None

    def tiles(self, block: Band) -> Sequence[Tile]:
        """Every block as it is."""
        return (Tile(block, TileShape.BAND),)

    def launches(self, tiles: Sequence[Tile]) -> Sequence[Launch]:
        """As few as go."""
        return [Launch.of(group) for group in disjoint(tiles)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, rule: LogitRule) -> tuple[Tensor, Tensor]:
        """Zeros."""
        del k, tile, rule
        return q.new_zeros((*q.shape[:3], v.shape[3])), q.new_zeros(q.shape[:3])

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: Tile,
        rule: LogitRule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Zeros."""
        del grad_out, out, lse, tile, rule
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)

    def forward_many(
        self, q: Tensor, k: Tensor, v: Tensor, launch: Launch, rule: LogitRule
    ) -> tuple[Tensor, Tensor]:
        """Zeros."""
        return self.forward(q, k, v, launch.tiles[0], rule)

    def backward_many(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        launch: Launch,
        rule: LogitRule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Zeros."""
        return self.backward(grad_out, q, k, v, out, lse, launch.tiles[0], rule)


class Ring(NamedTuple):
    """A rank of a ring, and the goal."""

    what: str
    mask: Mask
    layout: str
    ring: int
    goal_us: float


def rings(tokens: int = TOKENS) -> list[Ring]:
    """What is timed."""
    draw = random.Random(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(tokens - sum(lengths), int(draw.lognormvariate(6.5, 1.0)) + 1))
    packed = masks.documents(lengths)
    return [
        Ring("R = 8, causal, zigzag", masks.causal(tokens // 256), "zigzag", 8, 2_000.0),
        Ring("R = 64, causal, zigzag", masks.causal(tokens // 256), "zigzag", 64, 10_000.0),
        Ring(f"R = 64, {len(lengths):,} packed documents", packed, "auto", 64, 5_000.0),
    ]


ALONE_GOAL_US = 150.0
"""Beyond scaled_dot_product_attention's own time."""


def measure(cases: Sequence[Ring], calls: int = CALLS) -> Iterator[Figure]:
    """A figure for the 1 x 1 mesh and one per case. Forks a worker: call it before any tensor work."""
    with Workers(lambda: _handle, threads=1) as worker:
        ((plain, ours),) = worker.ask((None, 10 * calls))
        yield _figure(
            f"1 x 1 mesh, beyond scaled_dot_product_attention's own {plain:.0f} us",
            ours - plain,
            ALONE_GOAL_US,
        )
        for case in cases:
            yield _figure(case.what, worker.ask((case, calls))[0], case.goal_us)


def _figure(what: str, microseconds: float, goal: float) -> Figure:
    return Figure(
        section=SECTION,
        what=what,
        measured=f"{microseconds:,.0f} us",
        target=f"<= {goal:,.0f} us",
        ok=microseconds <= goal,
        exact=False,
        values={"microseconds": microseconds},
    )


def _handle(request: tuple[Ring | None, int]) -> Any:
    case, calls = request
    return _alone(calls) if case is None else _in_a_ring(case, calls)


def _alone(calls: int) -> tuple[float, float]:
    """Microseconds of PyTorch's attention and of ours, of the same tensors, in turns."""
    grad = torch.randn(1, 16, 2, 8)
    q, k, v = (torch.randn(1, 16, 2, 8, requires_grad=True) for _ in range(3))
    plain_q, plain_k, plain_v = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v))
    schedule = Schedule.build(masks.causal(16), SequenceMesh.build())

    def plain() -> None:
        out = F.scaled_dot_product_attention(plain_q, plain_k, plain_v, is_causal=True)
        out.backward(grad.transpose(1, 2))
        plain_q.grad = plain_k.grad = plain_v.grad = None

    def ours() -> None:
        attention(q, k, v, schedule).backward(grad)
        q.grad = k.grad = v.grad = None

    times = [(_microseconds(plain), _microseconds(ours)) for _ in range(calls)]
    return min(plain for plain, _ in times), min(ours for _, ours in times)


def _in_a_ring(case: Ring, calls: int) -> float:
    """Microseconds of one rank's call; its tensors have one head of dim 1, so that copies cost nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=case.ring // 3, world_size=case.ring)
    try:
        mesh = SequenceMesh.build(ring=case.ring)
        schedule = Schedule.build(case.mask, mesh, case.layout)
        rows = schedule.rows[0]
        q, k, v = (torch.zeros(1, rows, 1, 1, requires_grad=True) for _ in range(3))
        grad = torch.zeros(1, rows, 1, 1)
        stub = _Stub()

        def call() -> None:
            attention(q, k, v, schedule, kernel=stub, head_chunks=1).backward(grad)
            q.grad = k.grad = v.grad = None

        call()  # makes the plan
        return min(_microseconds(call) for _ in range(calls))
    finally:
        dist.destroy_process_group()


def _microseconds(run: Callable[[], None]) -> float:
    start = time.process_time_ns()
    run()
    return (time.process_time_ns() - start) / 1e3
