"""Checkpoints are written while training goes on.

    main thread   begin: plan, copy to the host         step, step, step   complete: checksums joined, renamed
    a thread                 write, to disk, checksums ...                  |
                                                        every rank has written

The thread talks to no other rank. Ranks compare notes between steps anyway (loop.py): once all have written,
they complete the checkpoint together, in their main threads, so that no two collectives ever cross. At most
one checkpoint is under way: the next one, and the end of a run, wait for it.

torch.distributed.checkpoint says who writes what and how: its plan is made once and used again as long as
what is saved has the same shape. Every failure becomes the same one-line ValueError on every rank, so that
none waits for one that left: when the checkpoint is completed, which is at the next one at the latest.

Memory: each rank keeps a copy of what it writes on the host, from its first checkpoint on.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from seqmesh.parallel.model import ParallelModel
from seqmesh.processes import one_line
from seqmesh.train import step_folders
from seqmesh.train.checkpoint import Progress
from seqmesh.train.checkpoint_files import PROGRESS, checksums_of, write_json
from seqmesh.train.checkpoint_state import states_of, weights_of
from seqmesh.train.gathering import gather, gather_objects
from seqmesh.train.launch import agree


class _Copied(DefaultSavePlanner):
    """Gives what was copied when the checkpoint began, whatever the tensors are by now."""

    def __init__(self, copies: dict[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._copies[write_item.index]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Who writes what. Equal as long as what is saved has the same shape."""

    asked: SavePlan
    """What this rank has."""
    mine: SavePlan
    """What it writes of that: of copies one rank writes one."""
    metadata: Metadata


@dataclass(frozen=True, kw_only=True)
class _UnderWay:
    """A checkpoint that is being written."""

    run: Path
    progress: Progress
    keep: int
    plan: _Plan
    written: "Future[_Written]"


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What a rank has written."""

    places: list[WriteResult]
    """What is where, for PyTorch's description."""
    checksums: dict[str, tuple[int, int]]


class Saver:
    """Saves the checkpoints of a run, as one of its ranks. All ranks call it together."""

    def __init__(self, model: ParallelModel, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._rank = model.mesh.number
        self._world = model.mesh.dims.world
        self._plan: _Plan | None = None
        self._copies: dict[MetadataIndex, Tensor] = {}
        self._under_way: _UnderWay | None = None

    def begin(self, run: Path, progress: Progress, keep: int) -> None:
        """Copy the state of a run after some steps, and begin to write it. A collective over all ranks.

        Args:
            run: the run's folder, the same for every rank.
            progress: how far it has come.
            keep: complete checkpoints that stay.

        Raises:
            ValueError: on all ranks alike, this checkpoint or the one before cannot be written; older ones
                are still there.
        """
        self.finish()
        folder = step_folders.unfinished_of(run, progress.step)
        self._together(run, lambda: step_folders.begin(run, progress.step), only=self._rank == 0)
        writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
        writer.set_up_storage_writer(self._rank == 0, rank=self._rank, use_collectives=True)
        plan = self._planned(self._state(), writer)
        written: Future[_Written] = Future()
        self._under_way = _UnderWay(run=run, progress=progress, keep=keep, plan=plan, written=written)
        arguments = (written, writer, plan.mine, self._copies, folder, self._rank)
        # A daemon: a process that fails does not wait for a disk.
        Thread(target=_write, args=arguments, name="checkpoint", daemon=True).start()

    def has_written(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._under_way is None or self._under_way.written.done()

    def finish(self) -> None:
        """Wait for the checkpoint that is under way, and complete it. A collective over all ranks.

        Raises:
            ValueError: on all ranks alike, it cannot be written; older ones are still there.
        """
        if self._under_way is None:
            return
        done, self._under_way = self._under_way, None
        checksums: dict[str, tuple[int, int]] = {}
        places: list[list[WriteResult]] = []
        for written in self._all_written(done):
            checksums |= written.checksums
            places.append(written.places)
        folder = step_folders.unfinished_of(done.run, done.progress.step)

        def complete() -> None:
            FileSystemWriter(folder).finish(done.plan.metadata, places)
            described = checksums | checksums_of(folder)
            write_json(folder / PROGRESS, {"progress": asdict(done.progress), "files": described})
            step_folders.finish(folder, done.keep)

        self._together(done.run, complete, only=self._rank == 0)

    def _state(self) -> dict[str, Tensor]:
        """Everything that this rank has of the run, by name; not copies."""
        state = weights_of(self._model)
        for name, states in states_of(self._model, self._optimizer).items():
            state |= {f"optim.{name}.{key}": value for key, value in states.items()}
        state[f"rng.{self._rank}"] = torch.get_rng_state()
        return state

    def _planned(self, state: dict[str, Tensor], writer: FileSystemWriter) -> _Plan:
        """Who writes what; what this rank writes is copied on the way."""
        planner = DefaultSavePlanner()
        planner.set_up_planner(dict(state), is_coordinator=self._rank == 0)
        asked = planner.create_local_plan()
        is_other = self._plan is None or asked != self._plan.asked
        if any(gather(is_other, self._world)) or self._plan is None:
            plans, metadata = planner.create_global_plan(gather_objects(asked, self._world))
            mine = writer.prepare_global_plan(plans)[self._rank]
            self._plan = _Plan(asked=asked, mine=mine, metadata=metadata)
            self._copies = {}
        planner.finish_plan(self._plan.mine)
        for item in self._plan.mine.items:
            self._copy(item.index, planner.resolve_data(item))
        return self._plan

    def _copy(self, index: MetadataIndex, tensor: Any) -> None:
        """Into the buffer of the last checkpoint: new memory takes twice as long."""
        assert isinstance(tensor, Tensor)
        if index not in self._copies:
            self._copies[index] = torch.empty(tensor.shape, dtype=tensor.dtype)
        self._copies[index].copy_(tensor)

    def _all_written(self, done: _UnderWay) -> list[_Written]:
        """What every rank has written, by rank."""
        mine: list[_Written] = []
        self._together(done.run, lambda: mine.append(done.written.result()))
        found: list[_Written] = gather_objects(mine[0], self._world)
        return found

    def _together(self, run: Path, work: Callable[[], object], *, only: bool = True) -> None:
        """Let the ranks with `only` work, the others wait: it succeeds on all or raises the same on all."""
        mistake: str | None = None
        if only:
            try:
                work()
            except Exception as error:  # whatever it is, the others wait to hear of it
                mistake = _explain(run, error, self._rank)
        agree(mistake, self._world)


def _write(
    written: "Future[_Written]",
    writer: FileSystemWriter,
    plan: SavePlan,
    copies: dict[MetadataIndex, Tensor],
    folder: Path,
    rank: int,
) -> None:
    """What the thread does. It ends with a result or an exception, whatever happens."""
    try:
        places = writer.write_data(plan, _Copied(copies)).value()
        written.set_result(_Written(places=places, checksums=checksums_of(folder, rank)))
    except BaseException as error:
        written.set_exception(error)


def _explain(run: Path, error: Exception, rank: int) -> str:
    reason = one_line(error)
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror if error.filename is None else f"{error.strerror} ({error.filename})"
    left = step_folders.complete(run) if step_folders.home_of(run).is_dir() else []
    resume = f"; {left[-1].name} is complete, resume from it" if left else ""
    home = str(step_folders.home_of(run))
    return f"cannot save in {home!r}: {reason} on rank {rank}; make room there{resume}"
