"""Experts spread over ranks: training equals that of one rank."""

import pytest
from parallel_runs import Run, build, check, mesh_of, on_mesh
from ranks import Ranks

from seqmesh.parallel import ParallelDims, ParallelPlan, parallelize

SPREAD = ParallelPlan(experts=2)
RUNS: dict[str, Run] = {
    "gathered": Run(dims=ParallelDims(dp_shard=2, ring=2), kind="mixtral"),
    "mixtral": Run(dims=ParallelDims(dp_shard=2, ring=2), kind="mixtral", plan=SPREAD, micro_batches=2),
    "over all ranks": Run(
        dims=ParallelDims(ring=2, ulysses=2), kind="mixtral", plan=ParallelPlan(experts=4), micro_batches=2
    ),
    "zero 2": Run(
        dims=ParallelDims(ring=4), kind="mixtral", plan=ParallelPlan(experts=2, zero=2), micro_batches=3
    ),
    "balanced": Run(
        dims=ParallelDims(dp_shard=2, ring=2), kind="mixtral", plan=ParallelPlan(experts=2, balance=0.7)
    ),
    "balanced, recomputed": Run(
        dims=ParallelDims(ring=2, ulysses=2),
        kind="mixtral",
        plan=ParallelPlan(balance=0.7, recompute="full"),
        micro_batches=3,
    ),
    "recomputed": Run(
        dims=ParallelDims(ulysses=4), kind="mixtral", plan=ParallelPlan(experts=2, recompute="full")
    ),
    "qwen3": Run(dims=ParallelDims(dp_shard=2, ulysses=2), kind="qwen3_moe", plan=ParallelPlan(experts=4)),
    "gpt-oss, gathered": Run(dims=ParallelDims(ring=4), kind="gpt_oss"),
    "gpt-oss": Run(dims=ParallelDims(dp_shard=2, ring=2), kind="gpt_oss", plan=SPREAD),
    "replicas": Run(dims=ParallelDims(dp_replicate=2, ring=2), kind="mixtral", plan=SPREAD),
    "stages": Run(dims=ParallelDims(pp=2, ring=2), kind="mixtral", plan=SPREAD, layers=4, micro_batches=3),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_mixture_of_experts_trains_as_on_one_rank(ranks: Ranks, name: str) -> None:
    check(ranks.run(4, on_mesh, RUNS[name]), RUNS[name])


def held_by_a_rank(experts: int) -> int:
    """Elements of the experts of the first layer that this rank holds."""
    plan = ParallelPlan(experts=experts)
    model = parallelize(build("mixtral", False, 2, 2), mesh_of(ParallelDims(dp_shard=2, ring=2)), plan)
    held = [p.to_local().numel() for name, p in model.named_parameters() if "layers.0.mlp.experts" in name]
    return sum(held)


def test_a_rank_holds_as_little_of_the_experts_as_when_they_are_gathered(ranks: Ranks) -> None:
    whole = 4 * (2 * 96 * 64 + 96 * 64)
    for experts in (1, 2, 4):
        assert ranks.run(4, held_by_a_rank, experts) == [whole // 4] * 4


def refusal(kind: str, experts: int, tp: int = 1, balance: float = 0.0) -> str:
    dims = ParallelDims(ring=4 // tp, tp=tp)
    try:
        parallelize(build(kind, False, 2, 2), mesh_of(dims), ParallelPlan(experts=experts, balance=balance))
    except ValueError as error:
        return str(error)
    return ""


def test_what_cannot_be_spread_is_refused(ranks: Ranks) -> None:
    assert "which has no experts that transformers can spread" in ranks.run(4, refusal, "llama", 2)[0]
    assert "use a degree that divides them" in ranks.run(4, refusal, "mixtral", 3)[0]
    assert "use tp=1" in ranks.run(4, refusal, "mixtral", 2, 2)[0]
    assert "which has no routers" in ranks.run(4, refusal, "llama", 1, 1, 0.1)[0]
    with pytest.raises(ValueError, match="experts=2 with zero=1"):
        ParallelPlan(experts=2, zero=1)
    with pytest.raises(ValueError, match="balance=-1"):
        ParallelPlan(balance=-1)
