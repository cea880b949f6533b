"""What one attention costs besides time: extra memory and bytes sent, counted where they arise.

Memory is counted at the allocator, bytes at the collective. Memory is what is allocated at most beyond
inputs, output and gradients, in units of this rank's q, k, v and output together, so that one number fits
every size, mesh, dtype and number of heads. Bytes are compared with the schedule's.

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

FORWARD_TARGET = 1.5
"""Extra memory of a forward, in units of local q, k, v and output together."""
BACKWARD_TARGET = 3.0
"""The same of a forward and its backward."""
MEMORY_REPEATS = 3
"""The least of so many is reported.

gloo's thread lets go of a sent buffer a moment after the wait, later on a busy machine.
"""
MEMORY_SECTION = "extra memory of one attention, busiest rank, in units of local q + k + v + out"
BYTES_SECTION = "bytes sent, all ranks"


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

    @property
    def world(self) -> int:
        """Ranks of the mesh."""
        return self.ulysses * self.ring

    def __str__(self) -> str:
        return f"U={self.ulysses}, R={self.ring}, {self.name}, {self.layout}, h{self.heads} g{self.kv_heads}"


@dataclass(frozen=True, kw_only=True)
class ExtraMemory:
    """Extra memory on one rank in units of its q, k, v and output together."""

    forward: float
    """Beyond inputs and output."""
    backward: float
    """Of a forward and its backward, beyond inputs, output and gradients."""


@dataclass(frozen=True, kw_only=True)
class SentBytes:
    """Bytes that one rank sends: counted at the collective, and by the schedule."""

    forward: int
    forward_scheduled: int
    backward: int
    backward_scheduled: int

    @property
    def agree(self) -> bool:
        """Whether both counts are the scheduled ones."""
        return self.forward == self.forward_scheduled and self.backward == self.backward_scheduled


def memory_of(case: Case) -> ExtraMemory:
    """Extra memory of a case on this rank. A collective.

    The first call is not counted: it fills caches and makes connections.
    """
    schedule, (q, k, v), grad = _prepare(case)
    attention(q, k, v, schedule).backward(grad)
    found = [_memory_once(schedule, (q, k, v), grad) for _ in range(MEMORY_REPEATS)]
    return ExtraMemory(forward=min(m.forward for m in found), backward=min(m.backward for m in found))


def _memory_once(schedule: Schedule, leaves: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> ExtraMemory:
    q, k, v = leaves
    q.grad = k.grad = v.grad = None
    outputs: list[Tensor] = []
    forward = peak_bytes(lambda: outputs.append(attention(q, k, v, schedule)))
    # Of both: what the forward leaves for the backward counts here too.
    backward = peak_bytes(lambda: attention(q, k, v, schedule).backward(grad))
    out = outputs[0].nbytes
    gradients = q.nbytes + k.nbytes + v.nbytes
    unit = q.nbytes + k.nbytes + v.nbytes + out
    return ExtraMemory(forward=(forward - out) / unit, backward=(backward - out - gradients) / unit)


def bytes_of(case: Case) -> SentBytes:
    """Bytes of a case on this rank. A collective."""
    schedule, (q, k, v), grad = _prepare(case)
    with CountBytes() as forward:
        out = attention(q, k, v, schedule)
    with CountBytes() as backward:
        out.backward(grad)
    traffic = schedule.traffic(
        batch=case.batch,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
    )
    return SentBytes(
        forward=forward.bytes_sent,
        forward_scheduled=traffic.forward_bytes,
        backward=backward.bytes_sent,
        backward_scheduled=traffic.backward_bytes,
    )


def _prepare(case: Case) -> tuple[Schedule, tuple[Tensor, Tensor, Tensor], Tensor]:
    """This rank's schedule, leaves q, k, v and a gradient of the output."""
    mesh = SequenceMesh.build(ulysses=case.ulysses, ring=case.ring)
    schedule = Schedule.build(case.mask, mesh, case.layout)
    n = schedule.rows[mesh.ulysses_rank]

    def normal(heads: int) -> Tensor:
        return torch.randn(case.batch, n, heads, case.head_dim, dtype=case.dtype)

    q = normal(case.heads).requires_grad_()
    k = normal(case.kv_heads).requires_grad_()
    v = normal(case.kv_heads).requires_grad_()
    return schedule, (q, k, v), normal(case.heads)


def memory_cases(tokens: int, meshes: Iterable[tuple[int, int]]) -> list[Case]:
    """Causal zigzag and full contiguous, h = g, with `tokens` on each rank."""
    cases: list[Case] = []
    for ulysses, ring in meshes:
        s = tokens * ulysses * ring
        for mask, name, layout in ((causal(s), "causal", "zigzag"), (full(s), "full", "contiguous")):
            cases.append(
                Case(
                    mask=mask,
                    name=name,
                    layout=layout,
                    ulysses=ulysses,
                    ring=ring,
                    heads=16,
                    kv_heads=16,
                    head_dim=128,
                )
            )
    return cases


def bytes_cases(tokens: int, meshes: Iterable[tuple[int, int]]) -> list[Case]:
    """Causal zigzag and contiguous documents of `tokens` in all: grouped heads, two sequences a batch."""
    lengths = [tokens * part // 16 for part in (6, 1, 3, 1, 4)]
    packed = documents([*lengths, tokens - sum(lengths)])
    cases: list[Case] = []
    for ulysses, ring in meshes:
        for mask, name, layout in ((causal(tokens), "causal", "zigzag"), (packed, "documents", "contiguous")):
            cases.append(
                Case(
                    mask=mask,
                    name=name,
                    layout=layout,
                    ulysses=ulysses,
                    ring=ring,
                    heads=8,
                    kv_heads=2,
                    head_dim=64,
                    batch=2,
                )
            )
    return cases


def measure(memory: Sequence[Case], bytes_sent: Sequence[Case]) -> Iterator[Figure]:
    """A figure per case. Forks workers, one group per number of ranks: call it before any tensor work."""
    with ExitStack() as stack:
        ranks: dict[int, Workers] = {}
        for world in sorted({case.world for case in (*memory, *bytes_sent)}):
            ranks[world] = stack.enter_context(Workers(lambda: _handle, world=world))
        for case in memory:
            yield _memory_figure(case, ranks[case.world].ask((memory_of, case)))
        for case in bytes_sent:
            yield _bytes_figure(case, ranks[case.world].ask((bytes_of, case)))


def _handle(request: tuple[Callable[[Case], Any], Case]) -> Any:
    function, case = request
    return function(case)


def _memory_figure(case: Case, found: Sequence[ExtraMemory]) -> Figure:
    """The busiest rank's."""
    forward = max(rank.forward for rank in found)
    backward = max(rank.backward for rank in found)
    return Figure(
        section=MEMORY_SECTION,
        what=str(case),
        measured=f"forward {forward:.2f}, backward {backward:.2f}",
        target=f"<= {FORWARD_TARGET:g}, <= {BACKWARD_TARGET:g}",
        ok=forward <= FORWARD_TARGET and backward <= BACKWARD_TARGET,
        exact=True,
        values={"forward_units": forward, "backward_units": backward},
    )


def _bytes_figure(case: Case, found: Sequence[SentBytes]) -> Figure:
    """All ranks together; reached if every rank agrees with its schedule."""
    forward = sum(rank.forward for rank in found)
    backward = sum(rank.backward for rank in found)
    forward_scheduled = sum(rank.forward_scheduled for rank in found)
    backward_scheduled = sum(rank.backward_scheduled for rank in found)
    return Figure(
        section=BYTES_SECTION,
        what=str(case),
        measured=f"forward {forward:,}, backward {backward:,}",
        target=f"{forward_scheduled:,}, {backward_scheduled:,}",
        ok=all(rank.agree for rank in found),
        exact=True,
        values={
            "forward_bytes": forward,
            "backward_bytes": backward,
            "forward_bytes_scheduled": forward_scheduled,
            "backward_bytes_scheduled": backward_scheduled,
        },
    )
