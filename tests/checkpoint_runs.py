"""Runs of a `Trainer` on the ranks of a pool that save and resume, for the tests of checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from meshes import mesh_of
from torch import Tensor

from seqmesh.parallel.gather import whole_weights
from seqmesh.train import step_folders
from seqmesh.train.checkpoint import Checkpoint
from seqmesh.train.config import Config, DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from seqmesh.train.data import Corpus
from seqmesh.train.setup import dims_of
from seqmesh.train.trainer import Trainer

STEPS = 4
SAVED = 2
"""Steps before the checkpoint."""
# An epoch has 16 sequences, two steps: what is resumed begins with another epoch's order.
TEXT = Corpus(source="test", documents=tuple(bytes(range(1, 120)) * n for n in (1, 3, 2, 1, 4, 2, 1, 1)))
BASE = Config(
    mesh=MeshConfig(ring=1, ulysses=1),
    model=ModelConfig(hidden=32, layers=4, heads=8, kv_heads=2, intermediate=48),
    data=DataConfig(seq_len=101, sequences=8),
    train=TrainConfig(steps=STEPS, warmup=1, lr=1e-3),
    run=RunConfig(keep=2),
)
TRAIN_KEYS = ("zero", "checkpointing", "micro_batch", "pipeline", "shard_norms", "offload", "tiling")


class Trained(NamedTuple):
    """The steps that a rank took, and on rank 0 the weights after the last."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def config_of(**settings: Any) -> Config:
    axes = {key: value for key, value in settings.items() if key not in TRAIN_KEYS}
    train = {key: value for key, value in settings.items() if key in TRAIN_KEYS}
    mesh = MeshConfig(**({"ring": 1, "ulysses": 1} | axes))
    return replace(BASE, mesh=mesh, train=replace(BASE.train, **train))


def trainer_of(config: Config) -> Trainer:
    return Trainer(config, TEXT, mesh_of(dims_of(config.mesh)), peak_flops_per_s=1.0)


def finished(trainer: Trainer) -> Trained:
    """The steps that are left."""
    steps = [trainer.step() for _ in range(STEPS - trainer.steps_done)]
    trainer.saver.finish()
    weights = {name: weight.clone() for name, weight in whole_weights(trainer.model).items()}
    return Trained([step.loss for step in steps], [step.grad_norm for step in steps], weights)


def undisturbed(config: Config, run: Path) -> Trained:
    """All steps, with a checkpoint after `SAVED` of them; returned are those that come after it."""
    trainer = trainer_of(config)
    for _ in range(SAVED):
        trainer.step()
    trainer.save(run)
    return finished(trainer)


def resumed(config: Config, run: Path) -> Trained:
    """The steps after the newest checkpoint, by a trainer that has seen nothing before."""
    trainer = trainer_of(config)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.fill_(7.0)  # nothing of the start may be left
    trainer.resume(Checkpoint(step_folders.newest(run)))
    return finished(trainer)
