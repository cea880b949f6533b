"""Ranks that run cases: forked here, or those of torchrun that this process is one of.

    forked     parent  -- (number, case) -->  every rank  -- outcome of the rank whose turn it is -->  parent
    torchrun   every rank walks over the same cases; rank 0 reports

The ranks exchange their parts and one of them, another one each time, compares with the oracle. On CUDA all
ranks may share one device: gloo moves tensors through the host, while NCCL refuses two ranks on one GPU.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import activate_flash_attention_impl, list_flash_attention_impls

from seqmesh.engine.mesh import SequenceMesh
from seqmesh.processes import Place, Workers, connect, disconnect, one_line
from seqmesh.verify.attend import Part, assemble, attend
from seqmesh.verify.cases import AttentionCase
from seqmesh.verify.judge import CaseOutcome, judge
from seqmesh.verify.oracle import dense, make, one_device

JOIN_SECONDS = 60.0
"""A collective under torchrun that takes longer is an error."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """On which devices ranks run, and how they talk."""

    device_type: str
    """"cpu" or "cuda"."""
    world: int
    place: Place | None
    """This process under torchrun, where rank 0 gets the answers; else None: then ranks are forked, which
    must come before any tensor work."""
    nccl: bool = False
    """Whether CUDA tensors go through NCCL, which needs a GPU for each rank, and not through gloo."""

    flash: str | None = None
    """What takes the place of flash attention 2 behind PyTorch's operators: "FA3" or "FA4", or nothing."""

    @property
    def backend(self) -> str:
        """As PyTorch names it. Parts and outcomes are objects, which gloo gathers in any case."""
        return "cpu:gloo,cuda:nccl" if self.nccl else "gloo"

    def check(self) -> None:
        """Raises ValueError where there are no such devices. Asks for their number without using them."""
        if self.device_type != "cuda":
            return
        devices = torch.cuda.device_count()
        if not devices:
            raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
        known = list_flash_attention_impls()
        if self.flash is not None and self.flash not in known:
            raise ValueError(f"--flash {self.flash}: PyTorch knows {', '.join(known)}; use one of them")
        if self.nccl and self.place is None and devices < self.world:
            raise ValueError(
                f"--nccl: NCCL refuses two ranks on one GPU, and {self.world} ranks would share {devices};"
                " leave it out (gloo moves tensors through the host), or use fewer ranks"
            )


Work = Callable[[Any, int, torch.device], Any]
"""What all ranks do with a request and its number, on their devices: an answer on one rank, else None."""


def outcomes(cases: Sequence[AttentionCase], where: Where) -> Iterator[CaseOutcome]:
    """The outcome of every case, as it is known; of none on ranks other than 0 of torchrun.

    A rank that dies, or hangs, ends the walk with the outcome of the case that it was at.

    Raises:
        ValueError: there is no such device.
    """
    done = 0
    try:
        for outcome in on_ranks(judged, cases, where):
            done += 1
            yield outcome
    except (RuntimeError, TimeoutError) as error:
        yield CaseOutcome(case=cases[done], errors={}, failure=last_line(error))


def on_ranks(work: Work, requests: Sequence[Any], where: Where) -> Iterator[Any]:
    """Every rank does the work of every request, one after the other; what one of them answers.

    Raises:
        ValueError: there is no such device.
        RuntimeError: a rank failed or died.
        TimeoutError: a rank did not answer in time.
    """
    where.check()
    numbered = list(enumerate(requests))
    place = where.place
    if place is not None:
        connect(place, JOIN_SECONDS, where.backend)
        handle = _handler(work, where)
        for one in numbered:
            answers = _exchanged(handle(one))
            yield from (answer for answer in answers if answer is not None and place.rank == 0)
        disconnect()
        return

    def prepare() -> Callable[[tuple[int, Any]], Any]:
        return _handler(work, where)

    with Workers(prepare, world=where.world, backend=where.backend) as workers:
        for one in numbered:
            yield from (answer for answer in workers.ask(one) if answer is not None)


def last_line(error: BaseException) -> str:
    """Of an error that holds a rank's traceback: what it ended in."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _handler(work: Work, where: Where) -> Callable[[tuple[int, Any]], Any]:
    """What a rank does with a numbered request; prepared once its process group is up."""
    device = _device(where.device_type)
    if where.flash is not None:
        activate_flash_attention_impl(where.flash)
    return lambda one: work(one[1], one[0], device)


def _device(device_type: str) -> torch.device:
    """This rank's device: GPUs in turn, shared if there are fewer than ranks."""
    if device_type != "cuda":
        return torch.device(device_type)
    rank = dist.get_rank() if dist.is_initialized() else 0
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.init()  # or the device mesh would choose a device by LOCAL_RANK, which there may not be
    torch.cuda.set_device(device)
    return device


def device_name(device_type: str, flash: str | None = None) -> str:
    """What cases ran on. Asks the device: not before ranks are forked."""
    if device_type != "cuda":
        return device_type
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, flash attention {flash or 'FA2'}"


@cache
def mesh_of(ulysses: int, ring: int, device_type: str) -> SequenceMesh:
    """One mesh per shape and process: making process groups is slow, and they are never freed."""
    return SequenceMesh.build(ulysses=ulysses, ring=ring, device_type=device_type)


def judged(case: AttentionCase, turn: int, device: torch.device) -> CaseOutcome | None:
    """Run a case on all ranks and judge it on one of them, rank `turn` modulo the world; None on the others.

    A collective.
    """
    mesh = mesh_of(case.ulysses, case.ring, device.type)
    given = make(case)
    try:
        mine = attend(case, given, mesh, device)
    except Exception as error:  # whatever it is, it is the case's outcome; the next case may do better
        nothing = torch.empty(0, dtype=torch.int64)
        mine = Part(queries=nothing, keys=nothing, local={}, failure=one_line(error))
    parts = _exchanged(mine)
    if turn % mesh.size != mesh.rank:
        return None
    failures = [part.failure for part in parts if part.failure is not None]
    if failures:
        return CaseOutcome(case=case, errors={}, failure=failures[0])
    try:
        whole = assemble(case, parts)
        return judge(case, whole, one_device(case, given, device), dense(case, given))
    except Exception as error:
        return CaseOutcome(case=case, errors={}, failure=one_line(error))


def _exchanged(mine: Any) -> list[Any]:
    """What every rank has, by rank."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
