"""Forked helper processes for measurements: each keeps what it measures ready, runs one request at a time, and sleeps in between.

    parent  -- request -->  worker 0, 1, ... (one gloo group if there are several)  -- answers -->  parent

Side by side in one run means that the other side is idle while one is timed: a worker without a request blocks on its pipe.

Trade-off: fork starts 4 ranks in 0.3 s where spawn takes 15 s, and exists on Linux and macOS only. The parent must not have run
tensor work before: OpenMP does not survive a fork.
Where it sits: bench. `train/launch.py` starts the ranks of a training run, which stream events instead of answering requests.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 120.0
"""A request, or a collective in it, that takes longer is an error."""
STOP_SECONDS = 3.0
"""Between asking a worker to end and killing it."""
LOOK_UP_SECONDS = 5.0
"""How often an idle worker checks that its parent is alive."""

LOADED_ON_USE = ("torch.distributed.tensor", "torch._dynamo")
"""What PyTorch would load at a mesh's first use, in every worker anew, for 1.5 s each: loaded once, before the fork."""

Handler = Callable[[Any], Any]
"""What a worker answers to a request; both must be picklable."""


class Workers:
    """`world` processes of `threads` threads. A context manager: no worker outlives it."""

    def __init__(self, prepare: Callable[[], Handler], *, world: int = 1, threads: int = 1) -> None:
        """Start them. `prepare` runs once in each, when its process group is up (a single worker has none)."""
        for name in LOADED_ON_USE:
            import_module(name)
        self._folder = TemporaryDirectory(prefix="seqmesh-bench-")
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        context = multiprocessing.get_context("fork")
        for rank in range(world):
            ours, theirs = context.Pipe()
            place = _Place(rank=rank, world=world, threads=threads, folder=Path(self._folder.name), parent=os.getpid())
            process = context.Process(target=_worker, args=(prepare, place, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join(STOP_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    def ask(self, request: Any) -> list[Any]:
        """The answer of every worker, by rank.

        Raises:
            RuntimeError: a worker failed or died; with its traceback.
            TimeoutError: a worker did not answer in time.
        """
        for pipe in self._pipes:
            pipe.send(request)
        answers: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            ready = set(wait(list(waiting), 2 * TIMEOUT_SECONDS))
            if not ready:
                raise TimeoutError(f"workers {sorted(waiting.values())} did not answer in {2 * TIMEOUT_SECONDS:g} s")
            for pipe in [pipe for pipe in waiting if pipe in ready]:
                rank = waiting.pop(pipe)
                try:
                    ok, answers[rank] = pipe.recv()
                except EOFError:
                    ok, answers[rank] = False, "the process died"
                if not ok:
                    raise RuntimeError(f"worker {rank} of {len(self._pipes)}: {answers[rank]}")
        return [answers[rank] for rank in range(len(self._pipes))]


@dataclass(frozen=True, kw_only=True)
class _Place:
    """What a worker knows about itself."""

    rank: int
    world: int
    threads: int
    folder: Path
    parent: int


def _worker(prepare: Callable[[], Handler], place: _Place, pipe: Connection) -> None:
    # The profiler that counts memory prints a line per use; failures go through the pipe.
    os.dup2(os.open(place.folder / f"rank{place.rank}.txt", os.O_CREAT | os.O_WRONLY), 2)
    torch.set_num_threads(place.threads)
    try:
        if place.world > 1:
            meeting, timeout = f"file://{place.folder / 'store'}", timedelta(seconds=TIMEOUT_SECONDS)
            dist.init_process_group("gloo", init_method=meeting, rank=place.rank, world_size=place.world, timeout=timeout)
        handle = prepare()
        while True:
            while not pipe.poll(LOOK_UP_SECONDS):
                if os.getppid() != place.parent:
                    os._exit(1)
            pipe.send((True, handle(pipe.recv())))
    except EOFError:
        os._exit(0)
    except BaseException as error:
        pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        os._exit(1)  # not through interpreter shutdown: a process group that lost a peer may wait there
