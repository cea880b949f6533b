"""Where each rank of a run is: the step and the stage of it, for the error that names a rank which is gone.

    local ranks    memory that is shared with the parent, which reads it when a rank fails
    torchrun's     the store through which ranks found each other; those that are left read it

    step 12: data -> forward and backward -> clip -> update -> facts -> checkpoint

A rank that was killed or hangs cannot say where; what it noted last can.
"""

import ctypes
import time
from collections.abc import Callable, Iterable
from multiprocessing.sharedctypes import RawArray
from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from seqmesh.processes import Place, one_line

GRACE_SECONDS = 2.0
"""After a rank's failure: time for the others to say what they saw."""
STAGES = ("start", "data", "forward and backward", "clip", "update", "facts", "checkpoint", "end")
"""In the order in which a step comes to them."""


Note = Callable[[int, str], None]
"""Takes the step and the stage that a rank has come to."""


def nowhere(_step: int, _stage: str) -> None:
    """A `Note` that is not kept."""


class Whereabouts(NamedTuple):
    """Where a rank was last."""

    step: int
    """From 1; 0 before the first."""
    stage: str

    @property
    def order(self) -> tuple[int, int]:
        """Larger for a rank that has come further."""
        return self.step, STAGES.index(self.stage)

    def __str__(self) -> str:
        """After "rank 3 was killed"."""
        if self.step == 0:
            return "before the first step"
        return f"in step {self.step} ({self.stage})"


class Board(Protocol):
    """Where ranks note where they are."""

    def note(self, rank: int, step: int, stage: str) -> None:
        """A rank has come to a stage."""

    def of(self, rank: int) -> Whereabouts:
        """What a rank noted last."""


def least_advanced(ranks: Iterable[int], board: Board) -> int:
    """The rank that others wait for, as far as a board can tell."""
    return min(ranks, key=lambda rank: (board.of(rank).order, rank))


class SharedBoard:
    """For ranks that are forked from the process that makes it."""

    def __init__(self, world: int) -> None:
        self._noted = RawArray(ctypes.c_longlong, 2 * world)

    def note(self, rank: int, step: int, stage: str) -> None:
        """A rank has come to a stage."""
        self._noted[2 * rank] = step
        self._noted[2 * rank + 1] = STAGES.index(stage)

    def of(self, rank: int) -> Whereabouts:
        """What a rank noted last."""
        return Whereabouts(self._noted[2 * rank], STAGES[self._noted[2 * rank + 1]])


class StoreBoard:
    """For ranks that share a store. A note is a message to it that nobody answers: it takes microseconds."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def note(self, rank: int, step: int, stage: str) -> None:
        """A rank has come to a stage."""
        self._store.set(f"at {rank}", f"{step} {STAGES.index(stage)}")

    def of(self, rank: int) -> Whereabouts:
        """What a rank noted last."""
        if not self._store.check([f"at {rank}"]):
            return Whereabouts(0, STAGES[0])
        step, stage = map(int, self._store.get(f"at {rank}").split())
        return Whereabouts(step, STAGES[stage])

    def gave_up(self, rank: int, error: str) -> None:
        """A rank ends with an error; empty if all that it knows is that others are gone."""
        self._store.set(f"gave up {rank}", error)

    def errors(self, world: int, patience_s: float) -> dict[int, str]:
        """What ranks gave up with, once all have or patience has ended; the others are gone, or hang."""
        deadline = time.monotonic() + patience_s
        while True:
            given = [rank for rank in range(world) if self._store.check([f"gave up {rank}"])]
            if len(given) == world or time.monotonic() > deadline:
                return {rank: self._store.get(f"gave up {rank}").decode() for rank in given}
            time.sleep(0.05)


def blame(error: BaseException, place: Place, board: Board) -> str:
    """Why one of torchrun's ranks ends, in one line that names the rank which failed first.

    Args:
        error: what this rank ends with.
        place: this rank's.
        board: of all ranks.
    """
    reason = one_line(error)
    try:
        if isinstance(board, StoreBoard):
            return _blame(error, place, board)
        return f"rank {place.rank} failed {board.of(place.rank)}: {reason}"
    except RuntimeError:  # the store is gone too, with the rank or the launcher that keeps it
        return f"rank {place.rank} failed: {reason}"


def _blame(error: BaseException, place: Place, board: StoreBoard) -> str:
    reason = one_line(error)
    mine = f"rank {place.rank} failed {board.of(place.rank)}: {reason}"
    # gloo tells of ranks that are gone by a plain RuntimeError with its name in it.
    has_lost_others = isinstance(error, dist.DistError) or "gloo" in str(error)
    board.gave_up(place.rank, "" if has_lost_others else reason)
    if not has_lost_others:
        return mine
    errors = board.errors(place.world, GRACE_SECONDS)
    for rank, text in errors.items():
        if text:
            return f"rank {rank} failed {board.of(rank)}: {text}"
    gone = set(range(place.world)) - errors.keys()
    if not gone:
        return mine
    first = least_advanced(gone, board)
    return f"rank {first} was killed or hangs {board.of(first)}; rank {place.rank} waited for it: {reason}"
