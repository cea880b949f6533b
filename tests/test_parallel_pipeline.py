"""Pipelines of stages, with every other parallelism: training equals that of one rank."""

from typing import Any

import pytest
import torch
from parallel_runs import Run, build, check, mesh_of, micro_batch, on_mesh
from ranks import Ranks
from transformers import AutoConfig, AutoModelForCausalLM

from seqmesh.parallel import (
    ParallelDims,
    ParallelPlan,
    loss,
    parallelize,
    shard_micro_batches,
)

WITH_RING = ParallelDims(pp=2, ring=2)
FOUR = {"layers": 4, "micro_batches": 4}


@pytest.mark.parametrize(
    ("order", "zero"),
    [
        ("1f1b", 1),
        ("1f1b", 3),
        ("interleaved", 2),
        ("zero_bubble", 1),
        ("zero_bubble", 2),
    ],
)
def test_micro_batches_of_other_lengths_each(ranks: Ranks, order: Any, zero: int) -> None:
    run = Run(dims=WITH_RING, plan=ParallelPlan(pipeline=order, zero=zero), **FOUR)
    check(ranks.run(4, on_mesh, run), run)


MIXES = {
    "ulysses": Run(dims=ParallelDims(pp=2, ulysses=2), layers=3, micro_batches=3),
    "data": Run(dims=ParallelDims(pp=2, dp_shard=2), micro_batches=2),
    "tp": Run(dims=ParallelDims(pp=2, tp=2), micro_batches=3),
    "four stages": Run(dims=ParallelDims(pp=4), **FOUR),
    "recomputed": Run(dims=WITH_RING, plan=ParallelPlan(recompute="full", mlp_rows=4), micro_batches=3),
    "tiles, zero bubble": Run(
        dims=WITH_RING, plan=ParallelPlan(mlp_rows=4, pipeline="zero_bubble", zero=2), **FOUR
    ),
}


@pytest.mark.parametrize("name", MIXES)
def test_with_other_parallelisms(ranks: Ranks, name: str) -> None:
    check(ranks.run(4, on_mesh, MIXES[name]), MIXES[name])


@pytest.mark.parametrize("order", ["1f1b", "interleaved"])
def test_four_dimensions_at_once(ranks: Ranks, order: Any) -> None:
    run = Run(dims=ParallelDims(pp=2, ulysses=2, tp=2), plan=ParallelPlan(pipeline=order, zero=2), **FOUR)
    check(ranks.run(8, on_mesh, run), run)


def in_bf16() -> list[float]:
    run = Run(dims=WITH_RING, plan=ParallelPlan(param_dtype=torch.bfloat16), micro_batches=2)
    return on_mesh(run).losses


def test_hidden_states_travel_in_the_dtype_that_layers_compute_in(ranks: Ranks) -> None:
    (first, *others) = ranks.run(4, in_bf16)
    assert all(other == first for other in others)
    assert all(4 < one < 5 for one in first)  # log 96 = 4.56


def refusals() -> list[str]:
    mesh = mesh_of(WITH_RING)
    found = []

    def refused(call: Any) -> None:
        try:
            call()
        except ValueError as error:
            found.append(str(error))

    model = parallelize(build("llama", False, 2, 2), mesh)
    one = shard_micro_batches([micro_batch(0, 0)], mesh)
    refused(lambda: model.gradients(one))
    refused(lambda: loss(model, one[0]))
    refused(lambda: parallelize(build("llama", True, 2, 2), mesh))
    refused(lambda: parallelize(build("llama", False, 1, 2), mesh))
    config = AutoConfig.for_model(
        "granite",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        embedding_multiplier=3.0,
    )
    refused(lambda: parallelize(AutoModelForCausalLM.from_config(config), mesh))
    return found


def test_what_a_pipeline_cannot_run_is_refused_on_all_ranks(ranks: Ranks) -> None:
    for found in ranks.run(4, refusals):
        number, no_loss, tied, layers, scaled = found
        assert "1 micro-batches for pp=2 in the order '1f1b'" in number
        assert "use model.gradients(batches)" in no_loss
        assert "tied embeddings" in tied
        assert "1 layers for 2 pipeline stages" in layers
        assert "changes hidden states outside its layers" in scaled
