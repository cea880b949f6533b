"""Where a rank's time goes in a step, and what it sends: counted where PyTorch calls collectives.

    data       text read, packed, sharded, scheduled
    waiting    in collectives and for messages that are not there yet: what is exposed of communication, and
               of ranks that are slower
    compute    the rest

Waiting is host time. On CPU that is all there is; on a GPU the host runs ahead, waits in a collective for
nothing but its launch, and for the GPU where it reads a number: there, waiting says little.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

from seqmesh.parallel import ParallelMesh
from seqmesh.parallel.traffic import CountTraffic, is_collective

AXES = ("pp", "dp_replicate", "ring", "ulysses", "sequence", "tp", "fsdp", "replicas", "rest")
"""What bytes are told apart by: axes of the mesh, and three flattened ones (parallel/dims.py)."""


class WatchCosts(CountTraffic):
    """Counts bytes by process group, and seconds in collectives, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting_seconds = 0.0
        self._undone = ExitStack()

    def __enter__(self) -> "WatchCosts":
        waits = dist.Work.wait

        def timed(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return waits(work, *args, **kwargs)
            finally:
                self.waiting_seconds += time.perf_counter() - start

        # Callers of collectives wait on what they get, outside of any operator.
        dist.Work.wait = timed  # type: ignore[method-assign, assignment]
        self._undone.callback(setattr, dist.Work, "wait", waits)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._undone.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_collective(func):
            return func(*args, **(kwargs or {}))
        start = time.perf_counter()
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.waiting_seconds += time.perf_counter() - start

    def by_known_axis(self, mesh: ParallelMesh) -> dict[str, int]:
        """Bytes by each of `AXES`."""
        found = dict.fromkeys(AXES, 0)
        for axis, sent in self.by_axis(mesh).items():
            found[axis if axis in found else "rest"] += sent
        return found


class RankCosts(NamedTuple):
    """One rank's part of what a step costs."""

    data_seconds: float
    waiting_seconds: float
    sent: dict[str, int]
    """Bytes by each of `AXES`."""

    def numbers(self) -> list[float]:
        """As one row of fp64, which has whole numbers up to 2^53."""
        return [self.data_seconds, self.waiting_seconds, *map(float, self.sent.values())]

    @staticmethod
    def of(numbers: Sequence[float]) -> "RankCosts":
        """The way back."""
        data, waiting, *sent = numbers
        return RankCosts(data, waiting, dict(zip(AXES, map(int, sent), strict=True)))


def mean_seconds(costs: Sequence[RankCosts]) -> tuple[float, float]:
    """Of data and waiting, over ranks."""
    count = len(costs)
    return sum(one.data_seconds for one in costs) / count, sum(one.waiting_seconds for one in costs) / count


def all_sent(costs: Sequence[RankCosts]) -> dict[str, int]:
    """Bytes of all ranks by axis, without zeros."""
    sums = {axis: sum(one.sent[axis] for one in costs) for axis in AXES}
    return {axis: sent for axis, sent in sums.items() if sent}
