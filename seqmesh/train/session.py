"""One run from configuration to report: check everything, make the folder, start or join the ranks, report.

Whatever can be wrong with the input is found before a rank starts, or, under torchrun, told to every rank, so
that all of them end with the same line and none waits for another.
"""

import math
import shlex
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from seqmesh import processes
from seqmesh.parallel.adapters import what_trains
from seqmesh.processes import Place, connect, disconnect, in_a_child, one_line
from seqmesh.provenance import this_command, versions
from seqmesh.train import device as devices
from seqmesh.train import folder as models
from seqmesh.train import setup, step_folders
from seqmesh.train.checkpoint import Checkpoint
from seqmesh.train.config import AUTO, Config
from seqmesh.train.data import Corpus, check_enough, copy_in, read, tokenizer_of
from seqmesh.train.events import StepMetrics, Stopped
from seqmesh.train.expected import Expected, Foresight
from seqmesh.train.launch import RankFailedError, agree, agree_on, agree_on_versions, run_local
from seqmesh.train.loop import train
from seqmesh.train.metrics_log import read_metrics
from seqmesh.train.paths import expanded
from seqmesh.train.recipe import dump
from seqmesh.train.report import Report
from seqmesh.train.reporter import Reporter, token_ids
from seqmesh.train.resume import check_same_model, check_same_training
from seqmesh.train.start import describe_start
from seqmesh.train.stop import StoppedError, StopRequest
from seqmesh.train.whereabouts import Board, SharedBoard, StoreBoard, blame


def place_from(environment: Mapping[str, str], config: Config) -> Place | None:
    """This process's place when torchrun (or alike) started it, None when ranks are ours to start.

    Raises:
        ValueError: the launcher's world is not ulysses x ring.
    """
    place = processes.place_from(environment)
    if place is None:
        return None
    world, mesh = place.world, config.mesh
    if world != mesh.world:
        raise ValueError(
            f"{' x '.join(f'mesh.{axis}={n}' for axis, n in mesh.degrees.items() if n > 1) or 'no degree'}"
            f" needs {mesh.world} ranks"
            f" but the launcher started {world};"
            f" start {mesh.world}, or choose degrees whose product is {world}"
        )
    # Each of several machines counts its own restarts; there, a new store for every one keeps attempts apart
    # (recipes/launch/torchrun.sh).
    is_one_machine = environment.get("GROUP_WORLD_SIZE") == "1"
    attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)) if is_one_machine else 0
    return replace(place, attempt=attempt)


def run(config: Config, place: Place | None, foresight: Foresight | None = None) -> Report | None:
    """Train, and report in the process that observes: the parent of local ranks, or rank 0.

    Args:
        config: the run.
        place: this rank's, if a launcher started it.
        foresight: says what a step will hold, send and take; default: nobody does.

    Returns:
        The report; None on the other ranks.

    Raises:
        ValueError: input that cannot be run, in one line.
        RankFailedError: a rank failed.
        StoppedError: the run was asked to stop.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config, may_be_begun = _resolved(config)
    if place is None:
        return _run_local(config, may_be_begun, foresight)
    return _run_joined(config, place, may_be_begun, foresight)


def _resolved(config: Config) -> tuple[Config, bool]:
    """What run.resume="auto" is now: the run's own folder if it has a checkpoint, else nothing.

    Returns:
        The configuration, and whether the folder may be that of a run which saved nothing.
    """
    if config.run.resume != AUTO:
        return config, False
    has_saved = bool(step_folders.complete(_expanded(config.run.folder, "--folder")))
    resume = config.run.folder if has_saved else ""
    return replace(config, run=replace(config.run, resume=resume)), True


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """What a run begins with."""

    corpus: Corpus
    parameters: int
    """Of the model."""
    trained: int
    """Of these, those that train."""
    checkpoint: Checkpoint | None = None
    """What it is resumed from."""
    expected: Expected | None = None
    """Of a step, in the process that observes."""
    foresight: Foresight | None = None
    """There, too."""

    def earlier(self) -> list[StepMetrics]:
        """The steps taken before."""
        if self.checkpoint is None:
            return []
        return read_metrics(step_folders.run_of(self.checkpoint.folder), self.checkpoint.progress.step)


def _prepare(config: Config) -> _Prepared:
    """Everything that can be wrong without a rank, checked."""
    devices.check(config.run.device)
    # For a GPU in a child: packages of kernels that a model imports may claim it (flash-linear-attention),
    # and then no rank can be forked.
    check = partial(setup.check, config)
    shapes = in_a_child(check) if config.run.device == "cuda" else check()
    data = config.data
    corpus = read(data.path, field=data.field, tokenizer=data.tokenizer, cache=data.cache)
    check_enough(corpus, data.seq_len)
    trained = what_trains(shapes)
    prepared = _Prepared(corpus=corpus, parameters=_count(shapes), trained=_count(trained))
    if not config.run.resume:
        return prepared
    checkpoint = Checkpoint(step_folders.newest(_expanded(config.run.resume, "--resume")))
    check_same_training(config, corpus, checkpoint.progress)
    check_same_model(config, step_folders.run_of(checkpoint.folder))
    checkpoint.check_model(trained)
    return replace(prepared, checkpoint=checkpoint)


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def _expecting(config: Config, prepared: _Prepared, foresight: Foresight | None) -> _Prepared:
    """Trace a step, where that is asked for. Takes seconds, and is over before a rank starts or joins."""
    if foresight is None:
        return prepared
    if config.run.profile:
        # Read now: a run that went to its end must not lose its report to a profile that cannot be read.
        foresight.predict(config, token_ids(config, prepared.corpus), "")
    expected = foresight.expect(config, token_ids(config, prepared.corpus)) if config.run.trace else None
    return replace(prepared, expected=expected, foresight=foresight)


def dry_run(config: Config, foresight: Foresight) -> str:
    """What a run would say at its start: nothing is made, and no rank or device is needed.

    Raises:
        ValueError: input that cannot be run, in one line; a step that cannot be traced.
    """
    transformers_logging.set_verbosity_error()
    on_any_machine = replace(config, run=replace(config.run, device="cpu"))
    prepared = _prepare(on_any_machine)
    expected = foresight.expect(config, token_ids(config, prepared.corpus))
    if expected.unknown:
        raise ValueError(
            f"a step of it cannot be traced: {expected.unknown}; start the run without --dry-run, which says"
            " what it holds as it goes"
        )
    return "\n".join(describe_start(config, prepared.parameters, expected, trained=prepared.trained))


def _expanded(folder: str, option: str) -> Path:
    return expanded(folder, f"run.{option[2:]}=", option)


def _make_folder(config: Config, may_be_begun: bool) -> Path:
    """The run's folder: new or empty, as results of two runs must not mix, or that of the resumed run."""
    # Without what another run from this recipe should not take over.
    recipe = dump(replace(config, run=replace(config.run, folder="", resume="")))
    given = config.run.folder or config.run.resume or f"runs/{time.strftime('%Y%m%d-%H%M%S')}"
    folder = _expanded(given, "--folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_resumed = config.run.resume and folder.samefile(_expanded(config.run.resume, "--resume"))
        is_begun = may_be_begun and _text_of(folder / "config.toml") == recipe
        if any(folder.iterdir()) and not (is_resumed or is_begun):
            raise ValueError(
                f"run.folder={str(folder)!r} is not empty; choose a new folder with --folder, or remove it"
            )
        (folder / "config.toml").write_text(recipe, encoding="utf-8")
        if config.data.tokenizer:
            tokenizer_of(config.data.tokenizer).save(copy_in(folder))
        if config.model.folder:
            models.copy(config.model.folder, folder)
    except OSError as error:
        raise ValueError(
            f"cannot make run.folder={str(folder)!r}: {error.strerror}; choose another with --folder"
        ) from None
    return folder


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _agree_on_run(config: Config, prepared: _Prepared) -> None:
    """Ranks with other recipes or texts would train a model that is nobody's, without an error."""
    agree_on_versions(config.mesh.world, versions())
    recipe = dump(replace(config, run=replace(config.run, folder="", resume=""))).encode()
    text = prepared.corpus.fingerprint.encode()
    model = models.described(config.model.folder).encode() if config.model.folder else b""
    found = b"" if prepared.checkpoint is None else prepared.checkpoint.description
    agree_on(
        config.mesh.world,
        configuration=([recipe], "start every rank with the same recipe and options (run.folder apart)"),
        text=([text], f"put the same files at data.path={config.data.path!r} for every rank"),
        model=([model], f"put the same files at model.folder={config.model.folder!r} for every rank"),
        checkpoint=([found], f"let every rank see the same folder at run.resume={config.run.resume!r}"),
    )


def _told_by_rank_0(folder: Path, world: int) -> Path:
    """Rank 0's folder, on every rank."""
    told = [str(folder.absolute())]
    if world > 1:
        dist.broadcast_object_list(told)
    return Path(told[0])


def _reporter(config: Config, prepared: _Prepared, folder: Path) -> Reporter:
    return Reporter(
        config,
        prepared.corpus,
        folder,
        this_command(),
        prepared.earlier(),
        prepared.expected,
        prepared.foresight,
    )


def _run_local(config: Config, may_be_begun: bool, foresight: Foresight | None) -> Report:
    prepared = _expecting(config, _prepare(config), foresight)
    folder = _make_folder(config, may_be_begun)
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)

    stop = StopRequest()
    board = SharedBoard(config.mesh.world)

    def work(place: Place, emit: Callable[[Any], None]) -> None:
        _agree_on_run(config, prepared)
        note = partial(board.note, place.rank)
        stopped = train(config, prepared.corpus, folder, emit, stop, prepared.checkpoint, note)
        if place.rank == 0 and stopped is not None:
            emit(stopped)

    with _reporter(config, prepared, folder) as reporter:
        try:
            run_local(work, config.mesh.world, config.run.timeout_s, reporter.handle, logs, stop, board)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"after {len(reporter.steps)} steps; {_how_to_go_on(folder)}") from None
        except RankFailedError as error:
            raise RankFailedError(f"{error}; {_how_to_go_on(folder)}") from None
    if reporter.stopped is not None:
        raise _stopped(reporter.stopped, folder)
    return reporter.finish()


def _how_to_go_on(folder: Path) -> str:
    """From the newest checkpoint, if there is one."""
    saved = step_folders.complete(folder)
    if not saved:
        return f"nothing is saved but metrics in {folder}"
    recipe = shlex.quote(str(folder / "config.toml"))
    return f"{saved[-1].name} is saved: seqmesh train {recipe} --resume {shlex.quote(str(folder))}"


def _stopped(event: Stopped, folder: Path) -> StoppedError:
    who = "Ctrl-C" if event.signal == signal.SIGINT else signal.Signals(event.signal).name
    return StoppedError(event.signal, f"stopped by {who} after {event.step} steps; {_how_to_go_on(folder)}")


def _join(place: Place, timeout_s: float) -> Board:
    try:
        store = connect(place, timeout_s)
    except ValueError as error:  # PyTorch's, for missing or malformed MASTER_ADDR and MASTER_PORT
        raise ValueError(
            f"{one_line(error)}; start the ranks with torchrun, or unset RANK and WORLD_SIZE to train locally"
        ) from None
    return SharedBoard(place.world) if store is None else StoreBoard(store)


def _run_joined(
    config: Config, place: Place, may_be_begun: bool, foresight: Foresight | None
) -> Report | None:
    prepared: _Prepared | None = None
    folder = Path()
    mistake: str | None = None
    try:
        prepared = _prepare(config)
        if place.rank == 0:
            prepared = _expecting(config, prepared, foresight)
            folder = _make_folder(config, may_be_begun)
    except (ValueError, OSError) as error:
        mistake = one_line(error)  # told to all ranks below, once they are connected
    board: Board = SharedBoard(place.world)
    try:
        # Joining comes second: whatever a rank has found wrong, the others wait for it there.
        board = _join(place, config.run.timeout_s)
        agree(mistake, place.world)
        assert prepared is not None
        _agree_on_run(config, prepared)
        told = _told_by_rank_0(folder, place.world)
        return _train_joined(config, prepared, told if place.rank else folder, place, board)
    except ValueError:
        disconnect()  # or the exit code may be hidden
        raise
    except (RuntimeError, ArithmeticError) as error:
        # The launcher terminates the ranks that are left: not before they have said which one is missing.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RankFailedError(blame(error, place, board)) from error


def _train_joined(
    config: Config, prepared: _Prepared, folder: Path, place: Place, board: Board
) -> Report | None:
    """Train as one of torchrun's ranks, of which rank 0 reports.

    Raises:
        StoppedError: on all ranks, the run was asked to stop.
    """
    stop = StopRequest()
    corpus, checkpoint = prepared.corpus, prepared.checkpoint
    note = partial(board.note, place.rank)
    with stop.listening(signal.SIGINT, signal.SIGTERM):
        if place.rank:
            stopped = train(config, corpus, folder, lambda _: None, stop, checkpoint, note)
            if stopped is not None:
                raise StoppedError(stopped.signal, "")
            return None
        with _reporter(config, prepared, folder) as reporter:
            stopped = train(config, corpus, folder, reporter.handle, stop, checkpoint, note)
        if stopped is not None:
            raise _stopped(stopped, folder)
    return reporter.finish()
