"""What checkpoints and the check of bits cost: python tools/measure_faults.py [recipe.toml] [--key value]...

    blocked    seconds in which rank 0 takes no step because of a save: written while training goes on, and
               waited for, in turns
    check      seconds of a checked step over those of an unchecked one, in turns; at N = 20 a run takes
               (19 + that) / 20 of its time

Medians of several, with the machine and the commit. Local ranks, in a folder that is removed.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from seqmesh.processes import Place
from seqmesh.provenance import commit, machine
from seqmesh.train import setup
from seqmesh.train.data import read
from seqmesh.train.gathering import gather
from seqmesh.train.launch import run_local
from seqmesh.train.recipe import load, split_arguments
from seqmesh.train.trainer import Trainer

ROUNDS = 5
STEPS_BETWEEN = 3
EVERY = 20


def seconds(work: Callable[[], object]) -> float:
    """How long something takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def blocked(trainer: Trainer, run: Path, *, waits: bool) -> float:
    """A save, and steps until it is complete, as loop.py takes them."""
    trainer.step()
    gather(0.0, trainer.mesh.dims.world)  # what ranks wait for each other otherwise is not the save's
    total = seconds(lambda: trainer.save(run))
    steps = 0
    while not waits and steps < STEPS_BETWEEN:
        trainer.step()
        steps += 1
        if all(gather(trainer.saver.has_written(), trainer.mesh.dims.world)):
            break
    gather(0.0, trainer.mesh.dims.world)
    return total + seconds(trainer.saver.finish)


def checked(trainer: Trainer) -> float:
    """A checked step over the two unchecked ones around it."""
    around = [seconds(trainer.step)]
    check, trainer._is_checked = trainer._is_checked, lambda: True  # type: ignore[method-assign]
    mine = seconds(trainer.step)
    trainer._is_checked = check  # type: ignore[method-assign]
    return 2 * mine / (around[0] + seconds(trainer.step))


def main() -> None:
    """Measure, and print."""
    config = load(*split_arguments(sys.argv[1:]))
    config = replace(config, run=replace(config.run, check_every=10**9))
    corpus = read(config.data.path)
    found: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:

        def work(place: Place, emit: Callable[[Any], None]) -> None:
            torch.set_num_threads(config.run.threads)
            mesh = setup.dims_of(config.mesh).build(timeout=timedelta(seconds=config.run.timeout_s))
            trainer = Trainer(config, corpus, mesh, 1.0)
            trainer.step()
            run = Path(folder) / "run"
            blocked(trainer, run, waits=True)
            both = [
                (blocked(trainer, run, waits=False), blocked(trainer, run, waits=True)) for _ in range(ROUNDS)
            ]
            ratios = [checked(trainer) for _ in range(ROUNDS)]
            step = median(seconds(trainer.step) for _ in range(ROUNDS))
            if place.rank == 0:
                emit({"parameters": trainer.parameters, "step": step, "saves": both, "ratios": ratios})

        run_local(work, config.mesh.world, config.run.timeout_s, found.append, Path(folder))
    (one,) = found
    aside, waited = (median(times) for times in zip(*one["saves"], strict=True))
    ratio = median(one["ratios"])
    print(f"{one['parameters'] / 1e6:.1f} M parameters, {config.mesh.world} ranks, step {one['step']:.3f} s")
    print(f"blocked by a save: {aside:.3f} s, {waited:.3f} s if it is waited for: {aside / waited:.0%}")
    print(
        f"a checked step takes {ratio:.2f} of another; every {EVERY}th step:"
        f" {(EVERY - 1 + ratio) / EVERY - 1:.1%} more"
    )
    print(machine(), commit())


if __name__ == "__main__":
    main()
