"""Ranks as processes of this machine: forked, connected, one pipe each to the parent.

    start_ranks    parent  -- fork -->  rank 0, 1, 2, ...       file rendezvous, logs in a folder
    Workers        parent  -- request -->  every rank  -- answers -->  parent       a pool that waits for more
    in_a_child     parent  -- fork -->  child  -- answer -->  parent     a call of which nothing stays

The parent must not have run tensor work before it forks, nor have a GPU: neither OpenMP nor CUDA survives a
fork. Ranks ignore Ctrl-C: the parent gets it and ends them. No rank outlives its parent, whatever kills it.

Trade-off: fork starts 4 ranks in 0.3 s where spawn takes 15 s, and exists on Linux and macOS only.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
STOP_SECONDS = 3.0
"""Between asking a rank to end and killing it."""
REQUEST_SECONDS = 120.0
"""A request to workers, or a collective in it, that takes longer is an error."""
LOOK_UP_SECONDS = 5.0
"""How often an idle worker checks that its parent is alive."""

LOADED_ON_USE = ("torch.distributed.tensor", "torch._dynamo")
"""What PyTorch would load at a mesh's first use, in every rank anew, for 1.5 s each.

Loaded once, before the fork.
"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One of several processes, and where it meets the others."""

    rank: int
    world: int
    rendezvous: str
    """init_method of the process group: file://... or env://."""
    attempt: int = 0
    """How often all ranks were started before: they must not find what those left."""


def place_from(environment: Mapping[str, str]) -> Place | None:
    """This process's place when torchrun (or alike) started it, None when ranks are ours to start."""
    if not environment.keys() >= {"RANK", "WORLD_SIZE"}:
        return None
    return Place(rank=int(environment["RANK"]), world=int(environment["WORLD_SIZE"]), rendezvous="env://")


@dataclass(frozen=True, kw_only=True)
class LocalRank:
    """The parent's view of a rank."""

    rank: int
    process: BaseProcess
    pipe: Connection


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The exception that ended a rank: the last thing that it sends."""

    message: str
    """In one line."""
    trace: str
    users_mistake: bool
    """It was a ValueError, which are written for users."""
    at: float
    """Monotonic seconds: clocks of processes on one machine agree."""

    @staticmethod
    def of(error: BaseException) -> "Failure":
        """Of the exception that is being handled."""
        return Failure(
            message=one_line(error),
            trace=traceback.format_exc(),
            users_mistake=isinstance(error, ValueError),
            at=monotonic(),
        )


Body = Callable[[Place, Connection], None]
"""What a rank does, given its place and its end of the pipe.

If it raises, a `Failure` is sent and the exit code is 1.
"""


def connect(place: Place, timeout_s: float, backend: str | None = None) -> Store | None:
    """Set up the default process group, if there is more than one rank.

    Its backend is, by default, gloo for tensors on CPU and NCCL for those on CUDA, where there is any. The
    timeout is explicit: a hung rank must not mean half an hour of silence.

    Returns:
        The store through which ranks found each other; None for a rank alone.
    """
    if place.world == 1:
        return None
    timeout = timedelta(seconds=timeout_s)
    found: Store
    found, _, _ = next(rendezvous(place.rendezvous, place.rank, place.world, timeout=timeout))
    found.set_timeout(timeout)
    # torchrun keeps one store for all its restarts: addresses of ranks that are gone must not be found.
    store = PrefixStore(f"attempt {place.attempt}", found)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout)
    return store


def connect_alone(timeout_s: float) -> None:
    """Set up a process group of this process alone, for what cannot do without one."""
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(store=HashStore(), rank=0, world_size=1, timeout=timeout)


def disconnect() -> None:
    """End the default process group, if there is one: its threads may abort a process that exits with it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def start_ranks(ranks: list[LocalRank], body: Body, world: int, rendezvous: str, logs: Path) -> None:
    """Fork `world` ranks.

    They are appended to `ranks` one by one, so that the caller can stop what an exception left.

    Args:
        ranks: where they are appended.
        body: what each does.
        world: number of ranks.
        rendezvous: init_method of their process group.
        logs: a folder; stdout and stderr of rank r go to rank<r>.txt in it.
    """
    for name in LOADED_ON_USE:
        import_module(name)
    context = multiprocessing.get_context("fork")
    parent = os.getpid()
    # No Ctrl-C until each rank ignores it and `ranks` is complete.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for rank in range(world):
            ours, theirs = context.Pipe()
            place = Place(rank=rank, world=world, rendezvous=rendezvous)
            arguments = (body, place, theirs, logs / f"rank{rank}.txt", parent)
            process = context.Process(target=_rank_main, args=arguments, name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends when the rank does
            ranks.append(LocalRank(rank=rank, process=process, pipe=ours))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _rank_main(body: Body, place: Place, pipe: Connection, log: Path, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        body(place, pipe)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        end_if_orphaned(parent)
        pipe.send(Failure.of(error))
        # Not through interpreter shutdown: a process group that lost a peer may wait there.
        os._exit(1)


def end_if_orphaned(parent: int) -> None:
    """End this process if its parent was killed: nobody reads what it would say."""
    if os.getppid() != parent:
        os._exit(1)


def stop_ranks(ranks: Sequence[LocalRank], patience_s: float = STOP_SECONDS) -> None:
    """End every rank that still runs. Ctrl-C is ignored meanwhile: it could only leave some behind.

    Args:
        ranks: may have ended already.
        patience_s: seconds between asking them and killing them.
    """
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for rank in ranks:
            rank.process.terminate()
        deadline = monotonic() + patience_s
        for rank in ranks:
            rank.process.join(max(0.0, deadline - monotonic()))
            if rank.process.is_alive():
                rank.process.kill()
                rank.process.join()
            rank.pipe.close()
    finally:
        signal.signal(signal.SIGINT, previous)


def in_a_child(work: Callable[[], T]) -> T:
    """What `work` returns, called in a forked process: what it loads, patches or claims ends with that.

    Raises:
        ValueError: `work` raised it.
        ChildError: it raised another error, or the process died.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer_once, args=(work, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        answer, failure = ours.recv()
    except EOFError:
        child.join()
        raise ChildError(f"its process ended with exit code {child.exitcode}") from None
    child.join()
    if failure is not None:
        raise (ValueError if failure.users_mistake else ChildError)(failure.message)
    return answer  # type: ignore[no-any-return]


def _answer_once(work: Callable[[], Any], pipe: Connection) -> None:
    answer, failure = None, None
    try:
        answer = work()
    except Exception as error:
        failure = Failure.of(error)
    pipe.send((answer, failure))
    pipe.close()


class ChildError(RuntimeError):
    """What a call in a child came to."""


def first_line(error: BaseException) -> str:
    """What another library's exception begins with, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """An exception as one line: ValueErrors are written for users, others need their type's name."""
    text = " ".join(str(error).split("\n")[0].split()) or "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


Handler = Callable[[Any], Any]
"""Turns a request into the answer; requests and answers must be picklable."""


class Workers:
    """A pool of ranks that answer requests: each keeps what it needs ready, and sleeps between two requests.

    A context manager: no worker outlives it. A worker without a request blocks on its pipe, so two pools can
    be measured in turns without disturbing each other.
    """

    def __init__(
        self, prepare: Callable[[], Handler], *, world: int = 1, threads: int = 1, backend: str = "gloo"
    ) -> None:
        """Start them.

        Args:
            prepare: runs once in each, when its process group is up (a single worker has none).
            world: number of workers.
            threads: CPU threads of each.
            backend: of their process group, as PyTorch names it.
        """
        self._folder = TemporaryDirectory(prefix="seqmesh-workers-")
        folder = Path(self._folder.name)
        self._ranks: list[LocalRank] = []
        parent = os.getpid()

        def body(place: Place, pipe: Connection) -> None:
            _answer_requests(prepare, place, pipe, threads, parent, backend)

        start_ranks(self._ranks, body, world, f"file://{folder / 'store'}", folder)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop_ranks(self._ranks)
        self._folder.cleanup()

    def ask(self, request: Any) -> list[Any]:
        """The answer of every worker, by rank.

        Raises:
            RuntimeError: a worker failed or died; with its traceback.
            TimeoutError: a worker did not answer in time.
        """
        for rank in self._ranks:
            rank.pipe.send(request)
        answers: dict[int, Any] = {}
        waiting = {rank.pipe: rank for rank in self._ranks}
        while waiting:
            # Twice: a collective that hangs ends in the workers first, whose error says more.
            ready = set(wait(list(waiting), 2 * REQUEST_SECONDS))
            if not ready:
                late = sorted(rank.rank for rank in waiting.values())
                raise TimeoutError(f"workers {late} did not answer in {2 * REQUEST_SECONDS:g} s")
            for pipe, rank in list(waiting.items()):
                if pipe in ready:
                    answers[rank.rank] = self._answer(rank)
                    del waiting[pipe]
        return [answers[rank.rank] for rank in self._ranks]

    def _answer(self, rank: LocalRank) -> Any:
        """What a worker sent."""
        who = f"worker {rank.rank} of {len(self._ranks)}"
        try:
            answer = rank.pipe.recv()
        except EOFError:
            raise RuntimeError(f"{who}: the process died") from None
        if isinstance(answer, Failure):
            raise RuntimeError(f"{who}: {answer.trace}")
        return answer


def _answer_requests(
    prepare: Callable[[], Handler], place: Place, pipe: Connection, threads: int, parent: int, backend: str
) -> None:
    torch.set_num_threads(threads)
    connect(place, REQUEST_SECONDS, backend)
    handle = prepare()
    while True:
        while not pipe.poll(LOOK_UP_SECONDS):
            end_if_orphaned(parent)
        try:
            request = pipe.recv()
        except EOFError:  # the parent is gone
            os._exit(0)
        pipe.send(handle(request))
