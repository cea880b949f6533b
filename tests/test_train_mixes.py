"""Every pair of settings together, trained: losses, norms and weights after three steps are one rank's.

The settings: six axes of 8 ranks, ZeRO, recomputation, micro-batches, the order of a pipeline, offload,
tiles, shared norms, one pool. `covering` picks few points so that any two settings that can go together do.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from typing import Any

import pytest
import torch
from meshes import mesh_of
from ranks import Ranks
from torch import Tensor

from seqmesh.parallel import ParallelDims
from seqmesh.parallel.gather import whole_weights
from seqmesh.train.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from seqmesh.train.data import Corpus
from seqmesh.train.setup import dims_of
from seqmesh.train.trainer import Trainer, holders

STEPS = 3
RANKS = 8
TEXT = Corpus(source="test", documents=tuple(bytes(range(1, 120)) * n for n in (1, 3, 2, 1, 4, 2, 1, 1)))
BASE = Config(
    mesh=MeshConfig(ring=1, ulysses=1),
    model=ModelConfig(hidden=32, layers=4, heads=8, kv_heads=2, intermediate=48),
    data=DataConfig(seq_len=101, sequences=8),
    train=TrainConfig(steps=STEPS, warmup=1, lr=1e-3),
)
Setting = tuple[str, Any]
Point = dict[str, Any]

TRAIN: dict[str, tuple[Any, ...]] = {
    "zero": (0, 1, 2, 3),
    "checkpointing": ("none", "selective", "full"),
    "micro_batch": (1, 2),
    "pipeline": ("1f1b", "interleaved", "zero-bubble"),
    "offload": ("none", "activations"),
    "tiling": ("none", "mlp"),
    "shard_norms": (False, True),
}


def config_of(point: Point) -> Config:
    """Raises ValueError if the point is not legal."""
    axes = {key: value for key, value in point.items() if key not in TRAIN}
    train = {key: value for key, value in point.items() if key in TRAIN}
    return replace(BASE, mesh=MeshConfig(**axes), train=replace(BASE.train, **train))


@cache
def legal() -> list[Point]:
    """Every point on 8 ranks that a recipe may ask for, axes of 1 and 2 (and 4 of tp, over 2 K/V heads)."""
    found = []
    axes = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
    degrees = [(1, 2)] * 5 + [(1, 2, 4)]
    for mesh in product(*degrees):
        if math.prod(mesh) != RANKS:
            continue
        for train in product(*TRAIN.values()):
            for pool in (False, True):
                point = {
                    **dict(zip(axes, mesh, strict=True)),
                    **dict(zip(TRAIN, train, strict=True)),
                    "pool": pool,
                }
                if pool and mesh[2] == 1:
                    continue
                try:
                    config_of(point)
                except ValueError:
                    continue
                found.append(point)
    return found


def pairs(point: Point) -> Iterator[frozenset[Setting]]:
    return map(frozenset, combinations(point.items(), 2))


@cache
def covering() -> list[Point]:
    """Points, the one with most new pairs first, until no legal pair of settings is left out."""
    left = {pair for point in legal() for pair in pairs(point)}
    chosen: list[Point] = []
    candidates = legal()
    while left:
        best = max(candidates, key=lambda point: sum(pair in left for pair in pairs(point)))
        chosen.append(best)
        left -= set(pairs(best))
        candidates = [point for point in candidates if any(pair in left for pair in pairs(point))]
    return chosen


def trained(config: Config) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses and norms of every step, and the weights after the last, which rank 0 has."""
    trainer = Trainer(config, TEXT, mesh_of(dims_of(config.mesh)), peak_flops_per_s=1.0)
    steps = [trainer.step() for _ in range(STEPS)]
    assert all(step.bytes_agree for step in steps)
    return [step.loss for step in steps], [step.grad_norm for step in steps], whole_weights(trainer.model)


@cache
def one_rank() -> tuple[list[float], list[float], dict[str, Tensor]]:
    return trained(BASE)


@pytest.mark.parametrize("point", covering(), ids=lambda point: config_text(point))
def test_a_mix_of_parallelisms_trains_the_model_that_one_rank_trains(ranks: Ranks, point: Point) -> None:
    losses, norms, weights = one_rank()
    found = ranks.run(RANKS, trained, config_of(point))
    for found_losses, found_norms, _ in found:
        assert found_losses == pytest.approx(losses, rel=1e-6)
        assert found_norms == pytest.approx(norms, rel=1e-5)
        assert found_norms == found[0][1]  # to the bit: ranks clip alike
    assert found[0][2].keys() == weights.keys()
    for name, weight in found[0][2].items():
        # AdamW divides a gradient by its own size: where one is nearly 0, its rounding is all that is left.
        torch.testing.assert_close(
            weight, weights[name], rtol=0, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert (weight - weights[name]).norm() <= 1e-4 * weights[name].norm()


def config_text(point: Point) -> str:
    """The settings that are not the default, as a test's name."""
    default = {"zero": None, "micro_batch": None, "pipeline": "1f1b", "checkpointing": "none"}
    shown = {key: value for key, value in point.items() if value not in (1, False, "none", default.get(key))}
    return " ".join(f"{key}={value}" for key, value in shown.items()) or "nothing"


def test_the_points_cover_every_pair_of_settings_that_a_recipe_may_ask_for() -> None:
    covered = {pair for point in covering() for pair in pairs(point)}
    assert covered == {pair for point in legal() for pair in pairs(point)}
    values = {setting for pair in covered for setting in pair}
    assert values >= {(key, value) for key, known in TRAIN.items() for value in known}
    assert len(covering()) <= 25


def test_ranks_that_hold_the_same_weights_are_known() -> None:
    """Replicas whole, shards apart: what facts.py compares."""
    assert holders(ParallelDims(ring=2, ulysses=2), 0) == [(0, 0)] * 4
    assert len(set(holders(ParallelDims(ring=2, ulysses=2), 3))) == 4
    replicated = holders(ParallelDims(dp_replicate=2, dp_shard=2), 2)
    assert replicated[:2] == replicated[2:]
    assert len(set(replicated)) == 2
    assert holders(ParallelDims(pp=2, tp=2), 0) == [(0, 0), (0, 1), (1, 0), (1, 1)]
