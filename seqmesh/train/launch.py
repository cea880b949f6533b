"""Ranks: started here on this machine, or joined when a launcher such as torchrun has started them.

    parent  -- fork -->  rank 0, 1, 2, ...      file rendezvous, gloo, 1 pipe each:  events and failures  -->  parent

The parent draws, writes and waits; it runs no tensor work before it forks, which is what makes fork safe next to OpenMP, and
forked ranks share the corpus it has read. Ranks ignore Ctrl-C: the parent gets it, ends them and leaves one line on the screen.
A rank that dies ends the run: the error names the rank that failed first, not those that lost their connection to it.

Trade-off: fork starts 4 ranks in 0.3 s where spawn takes 15 s, and exists on Linux and macOS only.
Where it sits: below train/session.py, which says what a rank does. No environment is read here.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist

GRACE_SECONDS = 2.0
"""After a rank's failure: time for the others to say what they saw, before they are ended."""
STOP_SECONDS = 3.0
"""Between asking a rank to end and killing it."""

LOADED_ON_USE = ("torch.distributed.tensor", "torch._dynamo")
"""What PyTorch would load at a mesh's first use, in every rank anew, for 1.5 s each: loaded once, before the fork."""

Work = Callable[["Place", Callable[[Any], None]], None]
"""What a rank does, given its place and a function that sends an event to the parent. A ValueError is the user's mistake."""


class RankFailedError(Exception):
    """A rank failed or died, for a reason that is not the user's input. The message names it in one line."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One of the run's processes and where it meets the others."""

    rank: int
    world: int
    rendezvous: str
    """init_method of the process group: file://... or env://."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """An exception of a rank."""

    message: str
    users_mistake: bool
    at: float
    """Monotonic seconds: clocks of processes on one machine agree."""


@dataclass(kw_only=True)
class _Rank:
    """The parent's view of a rank."""

    rank: int
    process: BaseProcess
    pipe: Connection
    failure: _Failure | None = None

    @property
    def failed(self) -> bool:
        return self.failure is not None or self.process.exitcode not in (None, 0)


def connect(place: Place, timeout_s: float) -> None:
    """Set up the default process group (gloo) with an explicit timeout: a hung rank must not mean half an hour of silence."""
    if place.world > 1:
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", init_method=place.rendezvous, rank=place.rank, world_size=place.world, timeout=timeout)


def agree(mistake: str | None, world: int) -> None:
    """Raise the same ValueError on every rank if any rank found a mistake, so that no rank waits for one that has left.

    Raises:
        ValueError: the mistake of the lowest rank that has one.
    """
    mistakes: list[str | None] = [mistake]
    if world > 1:
        mistakes = [None] * world
        dist.all_gather_object(mistakes, mistake)
    for found in mistakes:
        if found is not None:
            raise ValueError(found)


def agree_on(world: int, **facts: tuple[Iterable[bytes], str]) -> None:
    """Raise the same ValueError on every rank if a rank has other facts than rank 0.

    Args:
        world: number of ranks.
        facts: name of each fact -> its content, in parts that are told apart, and the remedy if ranks differ.

    Raises:
        ValueError: the first fact that differs and the first rank where it does.
    """
    mine = {name: _fingerprint(parts) for name, (parts, _) in facts.items()}
    everyone: list[dict[str, str]] = [mine]
    if world > 1:
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, mine)
        everyone = gathered
    for name, (_, remedy) in facts.items():
        for rank, found in enumerate(everyone):
            if found[name] != everyone[0][name]:
                raise ValueError(f"rank {rank} has another {name} than rank 0; {remedy}")


def _fingerprint(parts: Iterable[bytes]) -> str:
    """sha256 of the parts and their lengths: moving bytes from one part to the next changes it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def run_local(work: Work, world: int, timeout_s: float, on_event: Callable[[Any], None], log_folder: Path) -> None:
    """Run `work` on `world` forked ranks and handle what they send, until all have ended. No rank outlives this call.

    Args:
        work: what each rank does, once connected.
        world: number of ranks.
        timeout_s: timeout of the process group.
        on_event: called in this process with every event.
        log_folder: stdout and stderr of rank r go to rank<r>.txt there, and tracebacks.

    Raises:
        ValueError: a rank raised one: the user's mistake.
        RankFailedError: a rank failed otherwise, was killed, or hung.
        KeyboardInterrupt: Ctrl-C, after all ranks have ended.
    """
    for name in LOADED_ON_USE:
        import_module(name)
    with TemporaryDirectory(prefix="seqmesh-") as meeting:
        ranks: list[_Rank] = []
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            _start(ranks, work, world, timeout_s, f"file://{meeting}/store", log_folder)
            _watch(ranks, on_event)
            _raise_failure(ranks, timeout_s, log_folder)
        finally:
            _stop(ranks)
            signal.signal(signal.SIGTERM, previous)


def _start(ranks: list[_Rank], work: Work, world: int, timeout_s: float, rendezvous: str, log_folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    parent = os.getpid()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until each rank ignores it and `ranks` is complete
    try:
        for rank in range(world):
            receive, send = context.Pipe(duplex=False)
            place = Place(rank=rank, world=world, rendezvous=rendezvous)
            log = log_folder / f"rank{rank}.txt"
            process = context.Process(target=_rank_main, args=(work, place, timeout_s, send, log, parent), name=f"rank {rank}", daemon=True)
            process.start()
            send.close()  # so that the pipe ends when the rank does
            ranks.append(_Rank(rank=rank, process=process, pipe=receive))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _rank_main(work: Work, place: Place, timeout_s: float, pipe: Connection, log: Path, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    def send(event: Any) -> None:
        if os.getppid() != parent:
            os._exit(1)  # the parent was killed: nobody reads, and no rank may stay behind
        pipe.send(event)

    try:
        connect(place, timeout_s)
        work(place, send)
    except BaseException as error:
        traceback.print_exc()
        send(_Failure(message=one_line(error), users_mistake=isinstance(error, ValueError), at=time.monotonic()))
        sys.stderr.flush()
        os._exit(1)  # not through interpreter shutdown: a process group that lost a peer may wait there


def one_line(error: BaseException) -> str:
    """An exception as one line: ValueErrors are written for users, others need their type's name."""
    text = " ".join(str(error).split("\n")[0].split()) or "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _watch(ranks: Sequence[_Rank], on_event: Callable[[Any], None]) -> None:
    """Handle events until every rank has ended, or, after a failure, for the grace period."""
    open_pipes = {rank.pipe: rank for rank in ranks}
    deadline: float | None = None
    while open_pipes and (deadline is None or time.monotonic() < deadline):
        for pipe in wait(list(open_pipes), None if deadline is None else max(0.0, deadline - time.monotonic())):
            assert isinstance(pipe, Connection)
            rank = open_pipes[pipe]
            try:
                event = pipe.recv()
            except (EOFError, OSError):
                del open_pipes[pipe]
                rank.process.join(STOP_SECONDS)
            else:
                if isinstance(event, _Failure):
                    rank.failure = event
                else:
                    on_event(event)
            if rank.failed and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS


def _raise_failure(ranks: Sequence[_Rank], timeout_s: float, log_folder: Path) -> None:
    """Name the rank that failed first: killed, wrong input, silent while others timed out, or the earliest exception."""
    if not any(rank.failed for rank in ranks):
        return
    for rank in ranks:
        if rank.process.exitcode is not None and rank.process.exitcode < 0:
            name = signal.Signals(-rank.process.exitcode).name
            hint = " (out of memory?)" if name == "SIGKILL" else f"; see {log_folder / f'rank{rank.rank}.txt'}"
            raise RankFailedError(f"rank {rank.rank} was killed by {name}{hint}; the other ranks were stopped")
    failures = sorted((rank.failure.at, rank.rank, rank.failure) for rank in ranks if rank.failure is not None)
    for _, _, failure in failures:
        if failure.users_mistake:
            raise ValueError(failure.message)
    silent = [rank.rank for rank in ranks if not rank.failed and rank.process.is_alive()]
    if silent and failures and "time" in failures[0][2].message.lower():
        raise RankFailedError(f"rank {silent[0]} did not answer for run.timeout_s={timeout_s:g} seconds; the other ranks were stopped")
    if not failures:
        rank = next(rank for rank in ranks if rank.failed)
        raise RankFailedError(f"rank {rank.rank} ended with exit code {rank.process.exitcode}; see {log_folder / f'rank{rank.rank}.txt'}")
    _, number, failure = failures[0]
    raise RankFailedError(f"rank {number} failed: {failure.message}; traceback in {log_folder / f'rank{number}.txt'}")


def _stop(ranks: Sequence[_Rank]) -> None:
    """End every rank that still runs. Ctrl-C is ignored meanwhile: it could only leave some behind."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for rank in ranks:
            rank.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for rank in ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
            if rank.process.is_alive():
                rank.process.kill()
                rank.process.join()
            rank.pipe.close()
    finally:
        signal.signal(signal.SIGINT, previous)
