"""One run from configuration to report: check everything, make the folder, start or join the ranks, report.

Whatever can be wrong with the input is found before a rank starts, or, under torchrun, told to every rank, so
that all of them end with the same line and none waits for another.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from seqmesh.processes import Place, connect, one_line
from seqmesh.provenance import this_command
from seqmesh.train import device as devices
from seqmesh.train import setup
from seqmesh.train.config import Config
from seqmesh.train.data import Corpus, micro_batches, read
from seqmesh.train.launch import RankFailedError, agree, agree_on, run_local
from seqmesh.train.recipe import dump
from seqmesh.train.report import Report, Reporter
from seqmesh.train.trainer import train


def place_from(environment: Mapping[str, str], config: Config) -> Place | None:
    """This process's place when torchrun (or alike) started it, None when ranks are ours to start.

    Raises:
        ValueError: the launcher's world is not ulysses x ring.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    rank = int(environment["RANK"])
    world = int(environment["WORLD_SIZE"])
    mesh = config.mesh
    if world != mesh.world:
        raise ValueError(
            f"{' x '.join(f'mesh.{axis}={n}' for axis, n in mesh.degrees.items() if n > 1) or 'no degree'}"
            f" needs {mesh.world} ranks"
            f" but the launcher started {world};"
            f" start {mesh.world}, or choose degrees whose product is {world}"
        )
    return Place(rank=rank, world=world, rendezvous="env://")


def run(config: Config, place: Place | None) -> Report | None:
    """Train, and report in the process that observes: the parent of local ranks, or rank 0.

    Returns:
        The report; None on the other ranks.

    Raises:
        ValueError: input that cannot be run, in one line.
        RankFailedError: a rank failed.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if place is None:
        return _run_local(config)
    return _run_joined(config, place)


def _prepare(config: Config) -> Corpus:
    """Everything that can be wrong without a rank, checked."""
    devices.check(config.run.device)
    setup.check(config)
    corpus = read(config.data.path)
    micro_batches(corpus, seq_len=config.data.seq_len, sequences=config.micro_batch, seed=config.train.seed)
    return corpus


def _make_folder(config: Config) -> Path:
    """The run's folder, new or empty: results of two runs must not mix."""
    folder = Path(config.run.folder or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ValueError(
                f"run.folder={str(folder)!r} is not empty; choose a new folder with --folder, or remove it"
            )
        (folder / "config.toml").write_text(dump(config), encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"cannot make run.folder={str(folder)!r}: {error.strerror}; choose another with --folder"
        ) from None
    except RuntimeError:  # of expanduser
        raise ValueError(
            f"run.folder={str(folder)!r} names a home folder that does not exist; write --folder in full"
        ) from None
    return folder


def _agree_on_run(config: Config, corpus: Corpus) -> None:
    """Ranks with other recipes or texts would train a model that is nobody's, without an error."""
    recipe = dump(replace(config, run=replace(config.run, folder=""))).encode()
    agree_on(
        config.mesh.world,
        configuration=([recipe], "start every rank with the same recipe and options (run.folder apart)"),
        text=(corpus.documents, f"put the same files at data.path={config.data.path!r} for every rank"),
    )


def _run_local(config: Config) -> Report:
    corpus = _prepare(config)
    folder = _make_folder(config)
    logs = folder / "logs"
    logs.mkdir()

    def work(_: Place, emit: Callable[[Any], None]) -> None:
        _agree_on_run(config, corpus)
        train(config, corpus, folder, emit)

    with Reporter(config, corpus, folder, this_command()) as reporter:
        try:
            run_local(work, config.mesh.world, config.run.timeout_s, reporter.handle, logs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"after {len(reporter.steps)} steps; their metrics are in {folder}"
            ) from None
    return reporter.finish()


def _join(place: Place, timeout_s: float) -> None:
    try:
        connect(place, timeout_s)
    except ValueError as error:  # PyTorch's, for missing or malformed MASTER_ADDR and MASTER_PORT
        raise ValueError(
            f"{one_line(error)}; start the ranks with torchrun, or unset RANK and WORLD_SIZE to train locally"
        ) from None


def _run_joined(config: Config, place: Place) -> Report | None:
    corpus: Corpus | None = None
    folder = Path()
    mistake: str | None = None
    try:
        corpus = _prepare(config)
        if place.rank == 0:
            folder = _make_folder(config)
    except (ValueError, OSError) as error:
        mistake = one_line(error)  # told to all ranks below, once they are connected
    try:
        # Joining comes second: whatever a rank has found wrong, the others wait for it there.
        _join(place, config.run.timeout_s)
        agree(mistake, place.world)
        assert corpus is not None
        _agree_on_run(config, corpus)
        if place.rank:
            train(config, corpus, folder, lambda _: None)
            return None
        with Reporter(config, corpus, folder, this_command()) as reporter:
            train(config, corpus, folder, reporter.handle)
    except ValueError:
        if dist.is_initialized():
            # or its threads may abort the process as it exits, which would hide the exit code
            dist.destroy_process_group()
        raise
    except (RuntimeError, ArithmeticError) as error:
        raise RankFailedError(f"rank {place.rank} failed: {one_line(error)}") from error
    return reporter.finish()
