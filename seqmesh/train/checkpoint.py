"""Checkpoints of a training run: saved by all ranks together, loaded on any mesh.

    model.<name>             a parameter by the model's own name, whatever stage, shard or copy a rank has
    optim.<name>.<key>       its optimiser states, such as exp_avg
    rng.<rank>               PyTorch's random state of each rank
    progress.json            steps taken, sequences consumed, recipe, fingerprint of the text, checksums

torch.distributed.checkpoint writes each shard once, spread over the ranks that have it, and on loading gives
every rank the parts that it asks for, so the mesh and ZeRO's stage may change in between. The text needs no
more than a count: its order follows from the seed.

    save    rank 0 makes step-N.tmp -> all write -> rank 0 writes progress.json, renames (step_folders.py)

Every failure becomes the same one-line ValueError on every rank, so that none waits for one that left. Ranks
must see one file system. Saving is synchronous: the next step starts when the checkpoint is complete.
"""

import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from seqmesh.parallel.model import ParallelModel
from seqmesh.parallel.zero1 import ShardedStates
from seqmesh.processes import one_line
from seqmesh.train import step_folders
from seqmesh.train.launch import agree

_PROGRESS = "progress.json"
_CHUNK_BYTES = 1 << 24
"""Of a file that is checksummed."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come, and what of."""

    step: int
    """Steps taken."""
    sequences: int
    """Packed sequences consumed, over all ranks."""
    recipe: str
    """The run's configuration, as recipe.dump writes it."""
    text: str
    """Fingerprint of the documents."""
    world: int
    """Ranks that saved."""


class Checkpoint:
    """A complete checkpoint: read to be resumed from or exported."""

    def __init__(self, folder: Path) -> None:
        """Read what describes it; weights stay on disk.

        Raises:
            ValueError: a file that is missing, cut short or no description.
        """
        self.folder = folder
        described = _read_json(folder / _PROGRESS)
        self.description = json.dumps(described).encode()
        """Equal for copies of one checkpoint alone."""
        try:
            self.checksums: dict[str, tuple[int, int]] = {
                name: (size, checksum) for name, (size, checksum) in described["files"].items()
            }
            self.progress = Progress(**described["progress"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _damaged(folder / _PROGRESS, "is not what was saved") from None
        for name, (size, _) in self.checksums.items():
            _check_size(folder / name, size)
        _check_sum(folder / ".metadata", self.checksums[".metadata"][1])
        self.metadata: Metadata = FileSystemReader(folder).read_metadata()

    def check_model(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse a model that it is not of.

        Args:
            shapes: of the model's parameters, by name.

        Raises:
            ValueError: the first parameter that differs.
        """
        saved = {name.removeprefix("model."): shape for name, shape in self._shapes("model.").items()}
        for name in sorted(saved.keys() | shapes.keys()):
            if saved.get(name) != shapes.get(name):
                raise ValueError(
                    f"{str(self.folder)!r} has {_shape_text(saved.get(name))} for {name} where the model has"
                    f" {_shape_text(shapes.get(name))}: it is another model's; resume the run that saved it"
                )

    def _shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        entries = self.metadata.state_dict_metadata.items()
        return {
            name: tuple(entry.size)
            for name, entry in entries
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def check_files(self, rank: int = 0, world: int = 1) -> None:
        """Read this rank's share of the files and compare their checksums.

        Raises:
            ValueError: a file that is not what was saved.
        """
        for name in sorted(self.checksums)[rank::world]:
            _check_sum(self.folder / name, self.checksums[name][1])

    def read_into(self, state: dict[str, Tensor], *, alone: bool = True) -> None:
        """Overwrite tensors, or this rank's shards of them, by name. A collective unless `alone`.

        Raises:
            ValueError: on all ranks alike, what cannot be read.
        """
        try:
            with _knowing_that_it_is_alone():
                load(dict(state), checkpoint_id=self.folder, no_dist=alone)
        except CheckpointException as failure:
            raise ValueError(f"cannot load {str(self.folder)!r}: {_first_cause(failure)}") from None

    def states_of(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """Empty optimiser states like those that were saved of a parameter, by key."""
        prefix = f"optim.{name}."
        found = {}
        for full, entry in self.metadata.state_dict_metadata.items():
            key = full.removeprefix(prefix)
            # Names may be others' prefixes, but keys have no dots.
            if not full.startswith(prefix) or "." in key:
                continue
            assert isinstance(entry, TensorStorageMetadata)
            dtype = entry.properties.dtype
            if tuple(entry.size) == tuple(parameter.shape):
                found[key] = torch.zeros_like(parameter, dtype=dtype)
            else:
                found[key] = torch.zeros(entry.size, dtype=dtype)
        return found


def save_checkpoint(
    run: Path, model: ParallelModel, optimizer: torch.optim.Optimizer, progress: Progress, keep: int
) -> Path:
    """Save a run after some steps, and remove older checkpoints. A collective over all ranks.

    Args:
        run: the run's folder, the same for every rank.
        model: what is trained.
        optimizer: made by `model.optimizer`.
        progress: how far it has come.
        keep: complete checkpoints that stay.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: on all ranks alike, it cannot be written; older ones are still there.
    """
    rank, world = _place(model)
    unfinished = step_folders.unfinished_of(run, progress.step)
    saving = _Saving(run, world)
    saving.together(lambda: step_folders.begin(run, progress.step), only=rank == 0)
    state: dict[str, Tensor] = _weights(model)
    for name, states in _states(model, optimizer).items():
        state |= {f"optim.{name}.{key}": value for key, value in states.items()}
    state[f"rng.{rank}"] = torch.get_rng_state()
    saving.write(state, unfinished)
    checksums = saving.gather(lambda: _checksums(unfinished, rank))

    def complete() -> None:
        _write_json(unfinished / _PROGRESS, {"progress": asdict(progress), "files": checksums})
        step_folders.finish(unfinished, keep)

    saving.together(complete, only=rank == 0)
    return step_folders.folder_of(run, progress.step)


class _Saving:
    """The parts of saving, each of which succeeds on all ranks or raises the same on all."""

    def __init__(self, run: Path, world: int) -> None:
        self.run = run
        self.world = world

    def together(self, work: Callable[[], object], *, only: bool = True) -> None:
        """Let the ranks with `only` work, the others wait."""
        mistake: str | None = None
        if only:
            try:
                work()
            except OSError as error:
                mistake = self._explain(f"{error.strerror} ({error.filename})")
        agree(mistake, self.world)

    def write(self, state: dict[str, Tensor], folder: Path) -> None:
        try:
            with _knowing_that_it_is_alone():
                save(dict(state), storage_writer=FileSystemWriter(folder), no_dist=self.world == 1)
        except CheckpointException as failure:
            raise ValueError(self._explain(_first_cause(failure))) from None

    def gather(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What each rank makes, joined."""
        mine: dict[str, Any] = {}
        self.together(lambda: mine.update(work()))
        everyone: list[Any] = [mine]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, mine)
        return {name: value for one in everyone for name, value in one.items()}

    def _explain(self, reason: str) -> str:
        left = step_folders.complete(self.run)
        resume = f"; {left[-1].name} is complete, resume from it" if left else ""
        return f"cannot save in {str(step_folders.home_of(self.run))!r}: {reason}; make room there{resume}"


def load_checkpoint(checkpoint: Checkpoint, model: ParallelModel, optimizer: torch.optim.Optimizer) -> None:
    """Give a new model and optimiser the weights and states that were saved. A collective over all ranks.

    Random states are given to as many ranks as saved them; other meshes keep their own.

    Raises:
        ValueError: on all ranks alike, a file that is damaged, or another model's checkpoint.
    """
    rank, world = _place(model)
    state: dict[str, Tensor] = _weights(model)
    mistake: str | None = None
    try:
        checkpoint.check_files(rank, world)
    except ValueError as error:
        mistake = str(error)
    agree(mistake, world)
    inner = _states_of_this_rank(optimizer)
    for name, parameter in _owned(model, inner):
        inner.state[parameter] = checkpoint.states_of(name, parameter.detach())
        state |= {f"optim.{name}.{key}": value for key, value in inner.state[parameter].items()}
    random_state = torch.get_rng_state()
    if checkpoint.progress.world == world:
        state[f"rng.{rank}"] = random_state
    checkpoint.read_into(state, alone=world == 1)
    torch.set_rng_state(random_state)


def _place(model: ParallelModel) -> tuple[int, int]:
    """This rank and how many there are."""
    return model.mesh.number, model.mesh.dims.world


def _weights(model: ParallelModel) -> dict[str, Tensor]:
    """What this rank has of the parameters; not copies."""
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def _states_of_this_rank(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """With zero=1, other ranks have the rest."""
    return optimizer.inner if isinstance(optimizer, ShardedStates) else optimizer


def _owned(model: ParallelModel, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that an optimiser updates, by name."""
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in owned]


def _states(model: ParallelModel, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    inner = _states_of_this_rank(optimizer)
    return {name: inner.state[parameter] for name, parameter in _owned(model, inner)}


@contextmanager
def _knowing_that_it_is_alone() -> Iterator[None]:
    """PyTorch warns of a single process even where it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _first_cause(failure: CheckpointException) -> str:
    """What went wrong on the lowest rank that failed."""
    rank = min(failure.failures)
    cause = failure.failures[rank][0]
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.strerror} on rank {rank}"
    return f"{one_line(cause)} on rank {rank}"


def _checksums(folder: Path, rank: int) -> dict[str, tuple[int, int]]:
    """Size in bytes and CRC-32 of the files that a rank wrote: its own, and rank 0 their description."""
    paths = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
    return {path.name: (path.stat().st_size, _crc32(path)) for path in paths}


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None
    if found != size:
        raise _damaged(path, f"has {found} bytes where {size} were saved")


def _check_sum(path: Path, checksum: int) -> None:
    try:
        found = _crc32(path)
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None
    if found != checksum:
        raise _damaged(path, "has another checksum than what was saved")


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{str(path)!r} {what}; restore the file, or remove its folder to use the checkpoint before it"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None
    except ValueError:
        raise _damaged(path, "is not what was saved") from None
    if not isinstance(found, dict):
        raise _damaged(path, "is not what was saved")
    return found


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"shape {shape}"
