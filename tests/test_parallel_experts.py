"""Experts spread over ranks: training equals that of one rank."""

from datetime import timedelta

import pytest
import torch
from parallel_runs import Run, build, check, mesh_of, micro_batch, on_mesh
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh

from seqmesh.parallel import ParallelDims, ParallelPlan, experts, loss, parallelize, shard_batch
from seqmesh.parallel.traffic import CountTraffic
from seqmesh.trace.fake_ranks import replaced

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
    "tp": Run(dims=ParallelDims(tp=2, ring=2), kind="mixtral", plan=SPREAD, micro_batches=2),
    "tp, over all ranks": Run(
        dims=ParallelDims(dp_shard=2, tp=2), kind="qwen3_moe", plan=ParallelPlan(experts=4, zero=2)
    ),
    "tp, balanced, recomputed": Run(
        dims=ParallelDims(tp=2, ulysses=2),
        kind="mixtral",
        plan=ParallelPlan(experts=2, balance=0.7, recompute="full"),
    ),
    "tp, shared experts": Run(dims=ParallelDims(tp=2, ring=2), kind="qwen2_moe", plan=SPREAD),
    "tp, shared experts, shared norms": Run(
        dims=ParallelDims(tp=2, ulysses=2),
        kind="qwen2_moe",
        plan=ParallelPlan(experts=4, shard_norms=True),
        micro_batches=2,
    ),
    "tp alone": Run(dims=ParallelDims(tp=4), kind="mixtral", plan=ParallelPlan(experts=4)),
    "tp, replicas": Run(dims=ParallelDims(dp_replicate=2, tp=2), kind="mixtral", plan=SPREAD),
    "tp, shared norms": Run(
        dims=ParallelDims(tp=2, ring=2), kind="qwen3_moe", plan=ParallelPlan(experts=2, shard_norms=True)
    ),
    "tp, shared norms, over all ranks": Run(
        dims=ParallelDims(dp_shard=2, tp=2),
        kind="mixtral",
        plan=ParallelPlan(experts=4, shard_norms=True, recompute="selective"),
        micro_batches=2,
    ),
    "tp, stages": Run(
        dims=ParallelDims(pp=2, tp=2),
        kind="mixtral",
        plan=ParallelPlan(experts=2, shard_norms=True),
        layers=4,
        micro_batches=3,
    ),
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
    for degree in (1, 2, 4):
        assert ranks.run(4, held_by_a_rank, degree) == [whole // 4] * 4


def timeouts() -> set[timedelta]:
    """On one rank: of the groups among which experts are spread, and sharded."""
    mesh = ParallelDims(dp_shard=2, tp=2).build("cpu", timedelta(seconds=57))
    seen: list[DeviceMesh] = []
    # Weights are no witness: a DTensor may have an equal mesh that was made before, with other groups.
    with replaced(experts, "apply_expert_parallelism", lambda _, ep, *__, **___: seen.append(ep)):
        seen.append(experts.share_experts(build("mixtral", False, 2, 2), mesh, SPREAD).mesh)
    groups = [group for one in seen for group in one.get_all_groups()]
    assert [group.size() for group in groups] == [2, 2]
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_ranks_wait_for_experts_no_longer_than_for_others(ranks: Ranks) -> None:
    assert ranks.run(4, timeouts) == [{timedelta(seconds=57)}] * 4


def sent_to_experts(dims: ParallelDims) -> int:
    """Bytes that this rank sends of its tokens in a step, and of their gradients."""
    mesh = mesh_of(dims)
    model = parallelize(build("mixtral", False, 2, 2), mesh, ParallelPlan(experts=4))
    with CountTraffic() as sent:
        loss(model, shard_batch(micro_batch(0, 0), mesh)).backward()
    attention = {mesh.group(axis).group_name for axis in ("ring", "ulysses") if mesh.group(axis)}
    return sum(n for (name, exchanged), n in sent.by_group.items() if exchanged and name not in attention)


def test_ranks_of_tp_send_each_token_once(ranks: Ranks) -> None:
    """Four rows a token and expert: there and back, forward and backward. Routers send some to themselves."""
    rows = 4 * 41 * 2 * 2 * 64 * 4  # tokens, experts of one, layers, hidden size, bytes
    counts = 2 * 4 * 4 * 8
    whole = sum(ranks.run(4, sent_to_experts, ParallelDims(ring=4)))
    shared = sum(ranks.run(4, sent_to_experts, ParallelDims(ring=2, tp=2)))
    assert 0.5 * rows < shared < rows + counts
    assert shared == pytest.approx(whole, rel=0.2)  # other ranks send a token, and some less far


def refusal(kind: str, experts: int, tp: int = 1, balance: float = 0.0, shard_norms: bool = False) -> str:
    dims = ParallelDims(ring=4 // tp, tp=tp)
    plan = ParallelPlan(experts=experts, balance=balance, shard_norms=shard_norms)
    try:
        parallelize(build(kind, False, 2, 2), mesh_of(dims), plan)
    except ValueError as error:
        return str(error)
    return ""


def test_what_cannot_be_spread_is_refused(ranks: Ranks) -> None:
    assert "which has no experts that transformers can spread" in ranks.run(4, refusal, "llama", 2)[0]
    assert "use a degree that divides them" in ranks.run(4, refusal, "mixtral", 3)[0]
    assert "a multiple of tp" in ranks.run(4, refusal, "mixtral", 2, 4)[0]
    assert "has no plan" in ranks.run(4, refusal, "gpt_oss", 2, 2)[0]
    assert "which has no routers" in ranks.run(4, refusal, "llama", 1, 1, 0.1)[0]
    assert "inside of another block" in ranks.run(4, refusal, "ernie4_5_moe", 2, 2, 0.0, True)[0]
    assert "that loss takes routers" in ranks.run(4, refusal, "mixtral", 2, 2, 0.1, True)[0]
    assert "shard_norms=False" in ranks.run(4, refusal, "mixtral", 1, 2, 0.0, True)[0]
    with pytest.raises(ValueError, match="experts=2 with zero=1"):
        ParallelPlan(experts=2, zero=1)
    with pytest.raises(ValueError, match="balance=-1"):
        ParallelPlan(balance=-1)
