"""Models made parallel on the meta device get one rank's random weights, or a folder's, shard by shard."""

from pathlib import Path

import pytest
import torch
from parallel_runs import Outcome, Run, build, check, mesh_of, on_meta, train, whole
from ranks import Ranks
from torch import Tensor

from seqmesh.parallel import ParallelDims, ParallelPlan, load_folder, load_from_rank_0, parallelize

RUNS = {
    "sequence": Run(dims=ParallelDims(ring=2, ulysses=2)),
    "tied, zero 1": Run(dims=ParallelDims(dp_shard=2, ring=2), tied=True, plan=ParallelPlan(zero=1)),
    "tied, tp": Run(dims=ParallelDims(ring=2, tp=2), tied=True),
    "replicas": Run(dims=ParallelDims(dp_replicate=2, ring=2)),
    "stages": Run(
        dims=ParallelDims(pp=2, ring=2),
        plan=ParallelPlan(pipeline="interleaved"),
        layers=4,
        micro_batches=2,
    ),
    "few K/V heads, recomputed": Run(dims=ParallelDims(tp=4), plan=ParallelPlan(recompute="full")),
}


def from_rank_0(run: Run) -> Outcome:
    model = parallelize(on_meta(run), mesh_of(run.dims), run.plan)
    load_from_rank_0(model, lambda: build(run.kind, run.tied, run.layers, run.kv_heads))
    return train(model, run)


@pytest.mark.parametrize("name", ["sequence", "tied, tp", "stages"])
def test_random_weights_are_those_of_one_rank(ranks: Ranks, name: str) -> None:
    check(ranks.run(4, from_rank_0, RUNS[name]), RUNS[name])


def test_one_process_without_a_group() -> None:
    run = Run(dims=ParallelDims())
    check([from_rank_0(run)], run)


def from_folder(run: Run, folder: str) -> tuple[dict[str, Tensor], Outcome]:
    """On one rank: its weights, and training from there."""
    model = parallelize(on_meta(run), mesh_of(run.dims), run.plan)
    load_folder(model, folder)
    loaded = {name: whole(p.detach()) for name, p in model.named_parameters()}
    return loaded, train(model, run)


@pytest.mark.parametrize("name", RUNS)
def test_a_folder_is_read_in_shards(ranks: Ranks, name: str, tmp_path: Path) -> None:
    run = RUNS[name]
    reference = build(run.kind, run.tied, run.layers, run.kv_heads)
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    found = ranks.run(4, from_folder, run, str(tmp_path))
    for loaded, _ in found:
        for parameter, weight in loaded.items():
            assert torch.equal(weight, reference.get_parameter(parameter)), parameter
    check([outcome for _, outcome in found], run)


def test_what_a_folder_lacks_is_said(tmp_path: Path) -> None:
    run = Run(dims=ParallelDims(), layers=2)
    model = parallelize(on_meta(run), mesh_of(run.dims))
    with pytest.raises(ValueError, match=r"has no \.safetensors files"):
        load_folder(model, tmp_path)
    build("llama", False, 1, 2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 9 parameters of the model, such as 'model.layers.1"):
        load_folder(model, tmp_path)
