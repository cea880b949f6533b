"""Local ranks of a training run: started, watched until they end, and blamed for what went wrong.

    parent  -- fork -->  rank 0, 1, 2, ...  -- events, failures -->  parent

The parent draws, writes and waits; it runs no tensor work, and forked ranks share the corpus that it has
read. It gets Ctrl-C and lets the ranks stop after their step (stop.py), or ends them if they do not. A rank
that dies ends the run: the error names the rank that failed first, not those that lost their connection.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from seqmesh.processes import (
    STOP_SECONDS,
    Body,
    Failure,
    LocalRank,
    Place,
    connect,
    end_if_orphaned,
    start_ranks,
    stop_ranks,
)
from seqmesh.train.fingerprint import fingerprint
from seqmesh.train.gathering import gather_objects
from seqmesh.train.stop import StopRequest
from seqmesh.train.whereabouts import GRACE_SECONDS, Board, least_advanced

LOOK_SECONDS = 0.2
"""How often the parent looks whether it was asked to stop, and whether the ranks take too long to."""

Work = Callable[[Place, Callable[[Any], None]], None]
"""What a rank does, given its place and a function that sends an event to the parent.

A ValueError is the user's mistake.
"""


class RankFailedError(Exception):
    """A rank failed or died, for a reason that is not the user's input. The message names it in one line."""


@dataclass(kw_only=True)
class _Watched:
    """A rank, and what became of it."""

    local: LocalRank
    failure: Failure | None = None

    @property
    def rank(self) -> int:
        return self.local.rank

    @property
    def exit_code(self) -> int | None:
        """None while it runs; the negative number of the signal that killed it."""
        return self.local.process.exitcode

    @property
    def failed(self) -> bool:
        return self.failure is not None or self.exit_code not in (None, 0)


def agree(mistake: str | None, world: int) -> None:
    """Raise the same ValueError on every rank if any found a mistake, so that none waits for one that left.

    Raises:
        ValueError: the mistake of the lowest rank that has one.
    """
    for found in gather_objects(mistake, world):
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
    everyone = gather_objects({name: fingerprint(parts) for name, (parts, _) in facts.items()}, world)
    for name, (_, remedy) in facts.items():
        for rank, found in enumerate(everyone):
            if found[name] != everyone[0][name]:
                raise ValueError(f"rank {rank} has another {name} than rank 0; {remedy}")


def agree_on_versions(world: int, mine: dict[str, str]) -> None:
    """Raise the same ValueError on every rank if a rank runs another version of something than rank 0.

    Args:
        world: number of ranks.
        mine: this rank's versions, by name.
    """
    everyone = gather_objects(mine, world)
    for rank, found in enumerate(everyone):
        for name, version in everyone[0].items():
            if found.get(name) != version:
                raise ValueError(
                    f"rank {rank} runs {name} {found.get(name)} where rank 0 runs {version}; install the same"
                    " versions on every machine"
                )


def run_local(
    work: Work,
    world: int,
    timeout_s: float,
    on_event: Callable[[Any], None],
    log_folder: Path,
    stop: StopRequest | None = None,
    board: Board | None = None,
) -> None:
    """Run `work` on forked ranks and handle what they send, until all have ended: none outlives this call.

    Args:
        work: what each rank does, once connected.
        world: number of ranks.
        timeout_s: timeout of the process group.
        on_event: called in this process with every event.
        log_folder: stdout and stderr of rank r go to rank<r>.txt there, and tracebacks.
        stop: what `work` looks at, where Ctrl-C and SIGTERM are noted.
        board: where ranks note where they are.

    Raises:
        ValueError: a rank raised one: the user's mistake.
        RankFailedError: a rank failed otherwise, was killed, or hung.
        KeyboardInterrupt: a second Ctrl-C, after all ranks have ended; SystemExit: a second SIGTERM.
    """
    stop = stop or StopRequest()
    body = _body(work, timeout_s, stop)
    with TemporaryDirectory(prefix="seqmesh-") as meeting, stop.listening(signal.SIGINT, signal.SIGTERM):
        ranks: list[LocalRank] = []
        try:
            start_ranks(ranks, body, world, f"file://{meeting}/store", log_folder)
            watched = [_Watched(local=rank) for rank in ranks]
            _watch(watched, on_event, stop, timeout_s)
            _raise_failure(watched, timeout_s, log_folder, board)
        finally:
            # What is left by now has failed, or had its time: nothing that it would do at SIGTERM is awaited.
            stop_ranks(ranks, patience_s=0.0)


def _body(work: Work, timeout_s: float, stop: StopRequest) -> Body:
    """What a rank does, in terms of its pipe."""
    parent = os.getpid()

    def body(place: Place, pipe: Connection) -> None:
        def send(event: Any) -> None:
            end_if_orphaned(parent)
            pipe.send(event)

        # Whoever ends a whole process group sends the ranks SIGTERM too: that is no more than asking.
        with stop.listening(signal.SIGTERM):
            connect(place, timeout_s)
            work(place, send)

    return body


def _watch(
    ranks: Sequence[_Watched], on_event: Callable[[Any], None], stop: StopRequest, timeout_s: float
) -> None:
    """Handle events until every rank has ended, or, after a failure, for the grace period.

    Raises:
        RankFailedError: ranks that were asked to stop did neither that nor fail.
    """
    open_pipes = {rank.local.pipe: rank for rank in ranks}
    deadline: float | None = None
    patience = _Patience(timeout_s)
    while open_pipes and (deadline is None or time.monotonic() < deadline):
        for pipe in wait(list(open_pipes), LOOK_SECONDS):
            assert isinstance(pipe, Connection)
            rank = open_pipes[pipe]
            if not _hear(rank, on_event):
                del open_pipes[pipe]
            patience.heard()
            # The others fail too, of lost connections: they are heard, but only the first failure is told.
            if rank.failed and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS
        if stop.signal and deadline is None and patience.is_over():
            raise RankFailedError(
                f"asked to stop, the ranks did not end their step in {patience.seconds:.0f} seconds;"
                " they were killed"
            )


def _hear(rank: _Watched, on_event: Callable[[Any], None]) -> bool:
    """Handle what a rank sent; False if that was its end."""
    try:
        event = rank.local.pipe.recv()
    except (EOFError, OSError):
        # The pipe ends a moment before the process does, and only then is there an exit code.
        rank.local.process.join(STOP_SECONDS)
        return False
    if isinstance(event, Failure):
        rank.failure = event
    else:
        on_event(event)
    return True


class _Patience:
    """How long ranks that were asked to stop may be silent: as long as ever before, and the timeout more.

    Every step ends with an event; the timeout is what saving may take.
    """

    def __init__(self, timeout_s: float) -> None:
        self.seconds = timeout_s
        self._timeout_s = timeout_s
        self._last = time.monotonic()
        self._asked: float | None = None

    def heard(self) -> None:
        """A rank has said something."""
        now = time.monotonic()
        if self._asked is None:
            self.seconds = max(self.seconds, now - self._last + self._timeout_s)
        self._last = now

    def is_over(self) -> bool:
        """Whether they had their time, counted from the first call of this."""
        now = time.monotonic()
        self._asked = self._asked or now
        return now - self._asked > self.seconds


def _raise_failure(
    ranks: Sequence[_Watched], timeout_s: float, log_folder: Path, board: Board | None
) -> None:
    """Name the rank that failed first, if any did.

    In this order: killed, wrong input, silent while others timed out, the earliest exception, an exit code.
    """
    failed = [rank for rank in ranks if rank.failed]
    if not failed:
        return
    for rank in failed:
        _raise_if_killed(rank, log_folder, board)
    told = [rank for rank in failed if rank.failure is not None]
    if not told:
        number = failed[0].rank
        raise RankFailedError(
            f"rank {number} ended with exit code {failed[0].exit_code}; see {_log(log_folder, number)}"
        )
    told.sort(key=_failed_at)
    for rank in told:
        assert rank.failure is not None
        if rank.failure.users_mistake:
            raise ValueError(rank.failure.message)
    first = told[0].failure
    assert first is not None
    # gloo reports a rank that hangs only by the time-out of those that wait for it: theirs is no fault.
    silent = [rank.rank for rank in ranks if not rank.failed and rank.local.process.is_alive()]
    if silent and "time" in first.message.lower():
        number = silent[0] if board is None else least_advanced(silent, board)
        raise RankFailedError(
            f"rank {number} did not answer for run.timeout_s={timeout_s:g} seconds{_where(number, board)};"
            " the other ranks were stopped"
        )
    number = told[0].rank
    raise RankFailedError(
        f"rank {number} failed{_where(number, board)}: {first.message};"
        f" traceback in {_log(log_folder, number)}"
    )


def _where(rank: int, board: Board | None) -> str:
    return "" if board is None else f" {board.of(rank)}"


def _failed_at(rank: _Watched) -> tuple[float, int]:
    """When a rank's exception was, those of one moment by rank."""
    assert rank.failure is not None
    return rank.failure.at, rank.rank


def _raise_if_killed(rank: _Watched, log_folder: Path, board: Board | None) -> None:
    if rank.exit_code is None or rank.exit_code >= 0:
        return
    name = signal.Signals(-rank.exit_code).name
    hint = " (out of memory?)" if name == "SIGKILL" else f"; see {_log(log_folder, rank.rank)}"
    where = _where(rank.rank, board)
    raise RankFailedError(f"rank {rank.rank} was killed by {name}{hint}{where}; the other ranks were stopped")


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.txt"
