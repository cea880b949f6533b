"""What one attention costs besides time: extra memory, counted at the allocator, and bytes sent, counted at
the collective.

Memory is what is allocated at most beyond inputs, output and gradients, in units of this rank's K and V
together, so that one number fits every size, mesh and dtype. Bytes are compared with the schedule's, which
nobody sends to find out.

Legend: b batch, n local tokens, h query heads, g K/V heads, d head dim.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqmesh import Schedule, SequenceMesh, attention
from seqmesh.bench.figures import Figure
from seqmesh.bench.memory import peak_bytes
from seqmesh.engine.exchange import CountBytes
from seqmesh.masks import Mask, causal, documents, full
from seqmesh.processes import Workers

FORWARD_TARGET, BACKWARD_TARGET = 3.0, 6.0
MEMORY_REPEATS = 3
"""The least of so many is reported: gloo's thread lets go of a sent buffer a moment after the wait, later on
a busy machine.
"""
MEMORY_SECTION, BYTES_SECTION = (
    "extra memory of one attention, busiest rank, in units of local K + V",
    "bytes sent, all ranks",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention on a mesh."""

    mask: Mask
    name: str
    """Of the mask, for the table."""
    ulysses: int
    ring: int
    layout: str
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"U={self.ulysses}, R={self.ring}, {self.name}, {self.layout}, h{self.heads} g{self.kv_heads}"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Extra memory on one rank in units of its K and V together."""

    forward: float
    backward: float


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes that one rank sends: counted at the collective, and by the schedule."""

    forward: int
    forward_scheduled: int
    backward: int
    backward_scheduled: int


def memory_of(case: Case) -> Memory:
    """Extra memory of a case on this rank. A collective.

    The first call is not counted: it fills caches and makes connections.
    """
    schedule, (q, k, v), grad = _prepare(case)
    attention(q, k, v, schedule).backward(grad)
    found = [_memory_once(schedule, (q, k, v), grad) for _ in range(MEMORY_REPEATS)]
    return Memory(forward=min(m.forward for m in found), backward=min(m.backward for m in found))


def _memory_once(schedule: Schedule, leaves: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> Memory:
    q, k, v = leaves
    q.grad = k.grad = v.grad = None
    outputs: list[Tensor] = []
    forward = peak_bytes(lambda: outputs.append(attention(q, k, v, schedule)))
    backward = peak_bytes(
        lambda: attention(q, k, v, schedule).backward(grad)
    )  # of both: the forward's leftovers count here too
    out, unit = outputs[0].nbytes, k.nbytes + v.nbytes
    return Memory(
        forward=(forward - out) / unit, backward=(backward - out - q.nbytes - k.nbytes - v.nbytes) / unit
    )


def bytes_of(case: Case) -> Bytes:
    """Bytes of a case on this rank. A collective."""
    schedule, (q, k, v), grad = _prepare(case)
    with CountBytes() as forward:
        out = attention(q, k, v, schedule)
    with CountBytes() as backward:
        out.backward(grad)
    sizes = {"batch": case.batch, "heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim}
    traffic = schedule.traffic(**sizes, dtype=case.dtype)
    return Bytes(
        forward=forward.bytes_sent,
        forward_scheduled=traffic.forward_bytes,
        backward=backward.bytes_sent,
        backward_scheduled=traffic.backward_bytes,
    )


def _prepare(case: Case) -> tuple[Schedule, tuple[Tensor, Tensor, Tensor], Tensor]:
    """This rank's schedule, leaves q, k, v and a gradient of the output."""
    schedule = Schedule.build(
        case.mask, SequenceMesh.build(ulysses=case.ulysses, ring=case.ring), case.layout
    )
    n = schedule.rows[schedule.mesh.ulysses_rank]

    def normal(heads: int) -> Tensor:
        return torch.randn(case.batch, n, heads, case.head_dim, dtype=case.dtype)

    q, k, v = (normal(heads).requires_grad_() for heads in (case.heads, case.kv_heads, case.kv_heads))
    return schedule, (q, k, v), normal(case.heads)


def memory_cases(tokens: int, meshes: Iterable[tuple[int, int]]) -> list[Case]:
    """Causal zigzag and full contiguous, h = g, with `tokens` on each rank."""
    return [
        Case(mask=mask, name=name, layout=layout, ulysses=u, ring=r, heads=16, kv_heads=16, head_dim=128)
        for u, r in meshes
        for mask, name, layout in (
            (causal(tokens * u * r), "causal", "zigzag"),
            (full(tokens * u * r), "full", "contiguous"),
        )
    ]


def bytes_cases(tokens: int, meshes: Iterable[tuple[int, int]]) -> list[Case]:
    """Causal zigzag and contiguous documents of `tokens` in all, with grouped heads, two sequences a batch."""
    lengths = [tokens * part // 16 for part in (6, 1, 3, 1, 4)]
    packed = documents([*lengths, tokens - sum(lengths)])
    return [
        Case(
            mask=mask, name=name, layout=layout, ulysses=u, ring=r, heads=8, kv_heads=2, head_dim=64, batch=2
        )
        for u, r in meshes
        for mask, name, layout in ((causal(tokens), "causal", "zigzag"), (packed, "documents", "contiguous"))
    ]


def measure(memory: Sequence[Case], bytes_sent: Sequence[Case]) -> Iterator[Figure]:
    """A figure per case. Forks workers, one group per number of ranks: call it before any tensor work."""
    with ExitStack() as stack:
        worlds = sorted({case.ulysses * case.ring for case in (*memory, *bytes_sent)})
        ranks = {world: stack.enter_context(Workers(lambda: _handle, world=world)) for world in worlds}
        for case in memory:
            yield _memory_figure(case, ranks[case.ulysses * case.ring].ask((memory_of, case)))
        for case in bytes_sent:
            yield _bytes_figure(case, ranks[case.ulysses * case.ring].ask((bytes_of, case)))


def _handle(request: tuple[Callable[[Case], Any], Case]) -> Any:
    function, case = request
    return function(case)


def _memory_figure(case: Case, found: Sequence[Memory]) -> Figure:
    """The busiest rank's."""
    forward, backward = max(m.forward for m in found), max(m.backward for m in found)
    return Figure(
        section=MEMORY_SECTION,
        what=str(case),
        measured=f"forward {forward:.2f}, backward {backward:.2f}",
        target=f"<= {FORWARD_TARGET:g}, <= {BACKWARD_TARGET:g}",
        ok=forward <= FORWARD_TARGET and backward <= BACKWARD_TARGET,
        exact=True,
        values={"forward_kv_units": forward, "backward_kv_units": backward},
    )


def _bytes_figure(case: Case, found: Sequence[Bytes]) -> Figure:
    """All ranks together; reached if every rank agrees with its schedule."""
    forward, backward = sum(b.forward for b in found), sum(b.backward for b in found)
    forward_scheduled, backward_scheduled = (
        sum(b.forward_scheduled for b in found),
        sum(b.backward_scheduled for b in found),
    )
    return Figure(
        section=BYTES_SECTION,
        what=str(case),
        measured=f"forward {forward:,}, backward {backward:,}",
        target=f"{forward_scheduled:,}, {backward_scheduled:,}",
        ok=all((b.forward, b.backward) == (b.forward_scheduled, b.backward_scheduled) for b in found),
        exact=True,
        values={
            "forward_bytes": forward,
            "backward_bytes": backward,
            "forward_bytes_scheduled": forward_scheduled,
            "backward_bytes_scheduled": backward_scheduled,
        },
    )
