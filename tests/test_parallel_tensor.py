"""Tensor parallelism with sequences, data and ZeRO: training equals that of one rank."""

from typing import Any

import pytest
from parallel_runs import Run, build, check, mesh_of, micro_batch, on_mesh
from ranks import Ranks
from torch.distributed.tensor import DTensor

from seqmesh.parallel import ParallelDims, ParallelPlan, loss, parallelize, shard_batch

MIXES: dict[str, Run] = {
    "tp alone": Run(dims=ParallelDims(tp=4), kv_heads=4),
    "ring, zero 3": Run(dims=ParallelDims(ring=2, tp=2), micro_batches=2),
    "ulysses, zero 2": Run(dims=ParallelDims(ulysses=2, tp=2), plan=ParallelPlan(zero=2), micro_batches=2),
    "data, tied": Run(dims=ParallelDims(dp_shard=2, tp=2), tied=True),
    "one K/V head": Run(dims=ParallelDims(ring=2, tp=2), kv_heads=1, micro_batches=2),
    "zero 1": Run(dims=ParallelDims(ring=2, tp=2), plan=ParallelPlan(zero=1)),
    "zero 0": Run(dims=ParallelDims(dp_shard=2, tp=2), plan=ParallelPlan(zero=0)),
    "norms of heads": Run(dims=ParallelDims(ring=2, tp=2), kind="qwen3", micro_batches=3),
    "norms of few K/V heads": Run(dims=ParallelDims(tp=4), kind="qwen3", micro_batches=2),
    "biases": Run(dims=ParallelDims(tp=4), kind="qwen2"),
    "experts": Run(dims=ParallelDims(ring=2, tp=2), kind="mixtral", micro_batches=2),
    "recomputed": Run(dims=ParallelDims(ring=2, tp=2), plan=ParallelPlan(recompute="full", mlp_rows=5)),
    "selective": Run(dims=ParallelDims(ulysses=2, tp=2), plan=ParallelPlan(recompute="selective")),
}
SHARED_ROWS: dict[str, Run] = {
    "ring": Run(dims=ParallelDims(ring=2, tp=2), plan=ParallelPlan(shard_norms=True), micro_batches=3),
    "tied": Run(dims=ParallelDims(dp_shard=2, tp=2), plan=ParallelPlan(shard_norms=True), tied=True),
    "few K/V heads": Run(
        dims=ParallelDims(tp=4), plan=ParallelPlan(shard_norms=True), kind="qwen3", micro_batches=2
    ),
    "biases": Run(dims=ParallelDims(tp=4), kind="qwen2", plan=ParallelPlan(shard_norms=True)),
    "recomputed, tiles": Run(
        dims=ParallelDims(ulysses=2, tp=2), plan=ParallelPlan(shard_norms=True, recompute="full", mlp_rows=3)
    ),
    "selective": Run(
        dims=ParallelDims(ring=2, tp=2), plan=ParallelPlan(shard_norms=True, recompute="selective")
    ),
    "stages": Run(
        dims=ParallelDims(pp=2, tp=2),
        plan=ParallelPlan(shard_norms=True, pipeline="interleaved"),
        layers=4,
        micro_batches=4,
    ),
}


@pytest.mark.parametrize("name", SHARED_ROWS)
def test_ranks_that_share_the_rows_of_norms_too(ranks: Ranks, name: str) -> None:
    check(ranks.run(4, on_mesh, SHARED_ROWS[name]), SHARED_ROWS[name])


def kept_between_layers(shard_norms: bool) -> int:
    """On one rank: rows of what a layer gets."""
    mesh = mesh_of(ParallelDims(tp=4))
    plan = ParallelPlan(shard_norms=shard_norms)
    model = parallelize(build("llama", False, 2, 2), mesh, plan)
    seen = []
    model.parts[0].anatomy.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    loss(model, shard_batch(micro_batch(0, 0), mesh)).backward()
    return seen[0]


def test_layers_keep_a_share_of_the_rows(ranks: Ranks) -> None:
    assert set(ranks.run(4, kept_between_layers, False)) == {41}
    assert set(ranks.run(4, kept_between_layers, True)) == {11}


@pytest.mark.parametrize("name", MIXES)
def test_training_equals_that_of_one_rank(ranks: Ranks, name: str) -> None:
    check(ranks.run(4, on_mesh, MIXES[name]), MIXES[name])


def test_replicas_of_shards_of_shards(ranks: Ranks) -> None:
    run = Run(dims=ParallelDims(dp_replicate=2, ring=2, tp=2))
    check(ranks.run(8, on_mesh, run), run)


def placements() -> dict[str, Any]:
    model = parallelize(build("llama", False, 1, 2), mesh_of(ParallelDims(ring=2, tp=2)))
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        found[name] = parameter.to_local().numel() / parameter.numel()
    return found


def test_matrices_and_the_vocabulary_are_shared_and_norms_are_not(ranks: Ranks) -> None:
    for found in ranks.run(4, placements):
        for name, share in found.items():
            assert share == (0.5 if "norm" in name else 0.25), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dims": ParallelDims(tp=4), "kv_heads": 3}, "tp=4 with the 3 K/V heads"),
        (
            {"dims": ParallelDims(tp=2, ring=2), "kind": "mixtral", "plan": ParallelPlan(shard_norms=True)},
            "of style 'packed_colwise', whose rows cannot be shared",
        ),
        ({"dims": ParallelDims(ulysses=4, tp=2)}, "ulysses=4 with 2 query heads on each rank of tp=2"),
    ],
)
def test_what_does_not_divide_is_refused(ranks: Ranks, given: dict[str, Any], message: str) -> None:
    run = Run(**given)
    for found in ranks.run(run.dims.world, refusal, run):
        assert message in found


def refusal(run: Run) -> str:
    model = build(run.kind, run.tied, run.layers, 2)
    model.config.num_key_value_heads = run.kv_heads
    try:
        parallelize(model, mesh_of(run.dims), run.plan)
    except ValueError as error:
        return str(error)
    return ""
