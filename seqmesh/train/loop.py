"""A whole run of one rank: steps, checkpoints, a stop if one is asked for, what comes after the last step.

resume -> steps, checkpoints between them -> the model for plain transformers -> the first steps again,
                |                                                                on one rank
                `-> asked to stop: a checkpoint, and no more
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from seqmesh.parallel import ParallelDims
from seqmesh.parallel.gather import whole_weights
from seqmesh.processes import connect_alone, disconnect
from seqmesh.train import device as devices
from seqmesh.train import lora, setup
from seqmesh.train import model as models
from seqmesh.train.checkpoint import Checkpoint
from seqmesh.train.config import Config, MeshConfig
from seqmesh.train.data import Corpus, Tokenizer, tokenizer_of
from seqmesh.train.events import Compared, Event, Started, StepMetrics, Stopped
from seqmesh.train.gathering import gather, gather_numbers
from seqmesh.train.memory_use import memory_used
from seqmesh.train.stop import StopRequest
from seqmesh.train.trainer import Trainer
from seqmesh.train.whereabouts import Note, nowhere

Emit = Callable[[Event], None]


def train(
    config: Config,
    corpus: Corpus,
    folder: Path,
    emit: Emit,
    stop: StopRequest,
    checkpoint: Checkpoint | None = None,
    note: Note = nowhere,
) -> Stopped | None:
    """A whole run of one rank. The default process group, which several ranks have, is ended here.

    Args:
        config: the run.
        corpus: its text.
        folder: the run's, the same for every rank: checkpoints, and the model as rank 0 writes it at the end.
        emit: called on rank 0 with every event.
        stop: may be asked for at any time; the run ends after a step, with a checkpoint.
        checkpoint: to go on from; default: from the start.
        note: is told of every stage that this rank comes to.

    Returns:
        What stopped the run, the same on every rank; None at its end.
    """
    trainer = _trainer_of(config, corpus, note)
    mesh = trainer.mesh
    beginning, stopped = _take_steps(trainer, folder, emit, stop, checkpoint)
    note(trainer.steps_done, "end")
    memory = memory_used(trainer)
    weights = whole_weights(trainer.model) if stopped is None else {}
    is_done = mesh.number > 0 or stopped is not None
    del trainer
    disconnect()  # nobody waits, with whatever timeout, for rank 0's comparison
    if is_done:
        return stopped
    save(config, weights, folder / "checkpoint", tokenizer_of(config.data.tokenizer))
    emit(memory)
    if beginning:
        emit(compare_on_one_rank(config, corpus, beginning))
    return None


def _trainer_of(config: Config, corpus: Corpus, note: Note) -> Trainer:
    """The trainer, on this rank's threads and device."""
    torch.set_num_threads(config.run.threads)
    devices.claim(config.run.device, dist.get_rank() if config.mesh.world > 1 else 0)
    _connect_if_alone(config)
    timeout = timedelta(seconds=config.run.timeout_s)
    mesh = setup.dims_of(config.mesh).build(config.run.device, timeout)
    return Trainer(config, corpus, mesh, _measure_peak(config), note=note)


def _connect_if_alone(config: Config) -> None:
    """Make the process group of a rank alone, if it needs one; several are connected as they start."""
    if config.mesh.world == 1 and config.has_group:
        connect_alone(config.run.timeout_s)


def _take_steps(
    trainer: Trainer, folder: Path, emit: Emit, stop: StopRequest, checkpoint: Checkpoint | None
) -> tuple[list[StepMetrics], Stopped | None]:
    """All steps that are left of a run, or those until it is asked to stop, and a checkpoint.

    Returns:
        The run's first steps, to be repeated on one rank afterwards, and what stopped it.
    """
    if checkpoint is not None:
        trainer.resume(checkpoint)
    config = trainer.config.train
    every = trainer.config.run.checkpoint_every
    first_rank = trainer.mesh.number == 0
    started = _started(trainer)
    if first_rank:
        emit(started)
    beginning: list[StepMetrics] = []
    deadline = time.monotonic() + 60 * config.minutes if config.minutes else math.inf
    asked = 0
    while trainer.steps_done < config.steps:
        notes = _compare_notes(trainer, stop, deadline)
        asked = notes.asked
        if notes.all_have_written:
            trainer.saver.finish()
        if asked or not notes.time_is_left:
            break
        metrics = trainer.step()
        if first_rank:
            emit(metrics)
        if metrics.step <= config.compare_steps:
            beginning.append(metrics)
        if every and metrics.step % every == 0:
            trainer.save(folder)
    if trainer.steps_done:
        trainer.save(folder)
    trainer.saver.finish()
    # A run that was resumed has not seen them, or not all.
    is_whole = bool(beginning) and beginning[0].step == 1
    stopped = Stopped(step=trainer.steps_done, signal=asked) if asked else None
    return (beginning if is_whole else []), stopped


def _started(trainer: Trainer) -> Started:
    """What is known before the first step. A collective."""
    device, world = trainer.config.run.device, trainer.mesh.dims.world
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    available = min(gather(devices.available_bytes(device, ranks_here), world))
    return Started(
        device_name=devices.name_of(device),
        available_bytes=int(available),
        parameters=trainer.sizes.parameters,
        trained=trainer.sizes.trained,
        matmul_parameters=trainer.sizes.matmul_parameters,
        peak_flops_per_s=trainer.peak_flops_per_s,
    )


class _Notes(NamedTuple):
    """What ranks tell each other before a step, judged alike by all: they go on together, or none does."""

    asked: int
    """The signal that asked any of them to stop, which may have reached one alone; 0 if none did."""
    time_is_left: bool
    """By rank 0's clock: a rank that stopped by its own would leave the others waiting."""
    all_have_written: bool
    """Nobody is still writing the checkpoint that is under way."""


def _compare_notes(trainer: Trainer, stop: StopRequest, deadline: float) -> _Notes:
    mine = (stop.signal, time.monotonic() < deadline, trainer.saver.has_written())
    asked, time_is_left, written = zip(*gather_numbers(mine, trainer.mesh.dims.world), strict=True)
    return _Notes(int(max(asked)), bool(time_is_left[0]), all(written))


def _measure_peak(config: Config, rounds: int = 6) -> float:
    """Matmul FLOP/s of all ranks together in the run's precision, the best of a few rounds.

    All measure at once: on shared cores that is what they can have together.
    """
    ranks = config.mesh.world
    # CPUs without bf16 instructions would be far slower in it: their rate is fp32's, whatever is computed.
    is_half = config.run.device == "cuda" and config.train.precision == "bf16"
    dtype = torch.bfloat16 if is_half else torch.float32
    best = 0.0
    for _ in range(rounds):
        gather(0.0, ranks)  # start together
        rates = gather(devices.measure_matmul_flops_per_s(config.run.device, dtype), ranks)
        best = max(best, sum(rates))
    return best


def save(
    config: Config,
    weights: dict[str, torch.Tensor],
    folder: Path,
    tokenizer: Tokenizer,
    adapted: str = "",
) -> None:
    """A checkpoint that plain transformers loads: how the model was made parallel is not part of it.

    Of a model with adapters, a folder of those that peft loads.

    Args:
        config: the run.
        weights: of all its parameters, or of its adapters.
        folder: to be made, or empty.
        tokenizer: is written beside the model.
        adapted: folder of the model that adapters adapt; default: config.model.folder.
    """
    if config.lora.rank:
        lora.save(config.lora, adapted or config.model.folder, weights, folder)
        return
    with torch.device("meta"):
        model = models.build(config, tokenizer.vocabulary)
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save(folder)


def compare_on_one_rank(config: Config, corpus: Corpus, beginning: Sequence[StepMetrics]) -> Compared:
    """Repeat the first steps from the same seed on one rank, which exchanges nothing, and compare."""
    # The other ranks have ended: their cores are free.
    threads_of_all = config.mesh.world * config.run.threads
    torch.set_num_threads(max(config.run.threads, min(threads_of_all, os.cpu_count() or 1)))
    one_rank = replace(
        config,
        mesh=MeshConfig(ring=1, ulysses=1, layout=config.mesh.layout),
        run=replace(config.run, check_every=0),
        train=replace(
            config.train,
            zero=2 if config.train.precision == "bf16" else 0,
            offload="none",
            shard_norms=False,
            pipeline="1f1b",
            checkpointing="none",
            tiling="none",
            micro_batch=config.micro_batch,
        ),
    )
    _connect_if_alone(one_rank)
    alone = Trainer(one_rank, corpus, ParallelDims().build(config.run.device), peak_flops_per_s=1.0)
    repeated = [alone.step() for _ in beginning]
    disconnect()
    pairs = list(zip(beginning, repeated, strict=True))
    return Compared(
        losses=tuple(step.loss for step in repeated),
        grad_norms=tuple(step.grad_norm for step in repeated),
        largest_loss_difference=max(abs(a.loss - b.loss) for a, b in pairs),
        largest_grad_norm_difference=max(
            abs(a.grad_norm - b.grad_norm) / max(1.0, b.grad_norm) for a, b in pairs
        ),
    )
