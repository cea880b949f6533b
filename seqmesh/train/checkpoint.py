"""Checkpoints of a training run: saved by all ranks together (saving.py), loaded on any mesh.

    model.<name>             a parameter by the model's own name, whatever stage, shard or copy a rank has
    optim.<name>.<key>       its optimiser states, such as exp_avg
    rng.<rank>               PyTorch's random state of each rank
    progress.json            steps taken, sequences consumed, recipe, fingerprint of the text, checksums

torch.distributed.checkpoint writes each shard once, spread over the ranks that have it, and on loading gives
every rank the parts that it asks for, so the mesh and ZeRO's stage may change in between. The text needs no
more than a count: its order follows from the seed.

    save    rank 0 makes step-N.tmp -> all write -> rank 0 writes progress.json, renames (step_folders.py)

Every failure becomes the same one-line ValueError on every rank, so that none waits for one that left. Ranks
must see one file system.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from seqmesh.parallel.model import ParallelModel
from seqmesh.processes import one_line
from seqmesh.train.checkpoint_files import METADATA, PROGRESS, check_size, check_sum, damaged, read_json
from seqmesh.train.checkpoint_state import owned_by, states_of_this_rank, weights_of
from seqmesh.train.launch import agree


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
        described = read_json(folder / PROGRESS)
        self.description = json.dumps(described).encode()
        """Equal for copies of one checkpoint alone."""
        try:
            self.checksums: dict[str, tuple[int, int]] = {
                name: (size, checksum) for name, (size, checksum) in described["files"].items()
            }
            self.progress = Progress(**described["progress"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise damaged(folder / PROGRESS, "is not what was saved") from None
        for name, (size, _) in self.checksums.items():
            check_size(folder / name, size)
        check_sum(folder / METADATA, self.checksums[METADATA][1])
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
            check_sum(self.folder / name, self.checksums[name][1])

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


def load_checkpoint(checkpoint: Checkpoint, model: ParallelModel, optimizer: torch.optim.Optimizer) -> None:
    """Give a new model and optimiser the weights and states that were saved. A collective over all ranks.

    Random states are given to as many ranks as saved them; other meshes keep their own.

    Raises:
        ValueError: on all ranks alike, a file that is damaged, or another model's checkpoint.
    """
    rank, world = model.mesh.number, model.mesh.dims.world
    state: dict[str, Tensor] = weights_of(model)
    mistake: str | None = None
    try:
        checkpoint.check_files(rank, world)
    except ValueError as error:
        mistake = str(error)
    agree(mistake, world)
    inner = states_of_this_rank(optimizer)
    for name, parameter in owned_by(model, inner):
        inner.state[parameter] = checkpoint.states_of(name, parameter.detach())
        state |= {f"optim.{name}.{key}": value for key, value in inner.state[parameter].items()}
    random_state = torch.get_rng_state()
    if checkpoint.progress.world == world:
        state[f"rng.{rank}"] = random_state
    checkpoint.read_into(state, alone=world == 1)
    torch.set_rng_state(random_state)


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


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"shape {shape}"
