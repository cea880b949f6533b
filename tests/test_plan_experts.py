"""Experts that are spread, as the planner prices them: bytes as counted on ranks, groups, memory, time."""

from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from math import inf
from typing import Any

import pytest
import torch
from parallel_runs import build, mesh_of
from ranks import Ranks
from torch import Tensor, nn

from seqmesh.parallel import ParallelDims, ParallelPlan, TokenBatch, parallelize, shard_micro_batches
from seqmesh.parallel.traffic import CountTraffic
from seqmesh.planner.candidates import (
    Mesh,
    bare_meshes,
    experts_of,
    micro_batches_of,
    variants,
    zero_stages_of,
)
from seqmesh.planner.candidates import (
    mesh_of as degrees_of,
)
from seqmesh.planner.cost.experts import expert_group, sent_to_experts
from seqmesh.planner.cost.floor import FloorModel
from seqmesh.planner.cost.fused_memory import FusedMemory
from seqmesh.planner.cost.network import Network, place
from seqmesh.planner.cost.parameters import fullest_parameters, mean_parameters, stage_parameters
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.legality import violations
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.numerics import FP32
from seqmesh.planner.inputs.point import OFFLOAD, TILING, Point
from seqmesh.planner.inputs.shape import MixtureShape, ModelShape
from seqmesh.planner.inputs.stack import TrainerStack, stack_named
from seqmesh.planner.output.timeline import timeline
from seqmesh.planner.search import search

TOKENS = 16
"""Of a rank and micro-batch."""
TILE = 4
"""Of an MLP in tiles."""
TINY = ModelShape(
    name="tiny",
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=96,
    vocabulary=96,
    mixture=MixtureShape(experts=4, active=2, intermediate=96),
)
"""The Mixtral of tests/parallel_runs.py."""


def evenly(gate: nn.Module) -> None:
    """Have a router send as many tokens to every expert as to any other."""
    routed: Any = gate.forward

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, chosen = routed(hidden)
        places = torch.arange(chosen.numel()).view(chosen.shape)
        return logits, weights, places % 4

    gate.forward = forward


class CountCalls(CountTraffic):
    """Counts all-to-alls too."""

    calls = 0

    def _count(self, func: Any, arguments: dict[str, Any]) -> None:
        self.calls += func._schema.name.endswith(("all_to_all_single", "alltoall_base_"))
        super()._count(func, arguments)


def counted(plan: ParallelPlan) -> tuple[int, int]:
    """Bytes that this rank sends in all-to-alls of a step of two micro-batches, and in how many."""
    mesh = mesh_of(ParallelDims(dp_shard=4))
    whole = build("mixtral", False, 2, 2)
    model = parallelize(whole, mesh, plan)
    for name, module in whole.named_modules():
        if name.endswith("mlp.gate"):
            evenly(module)
    ids = torch.arange(2 * TOKENS).view(2, 1, TOKENS)
    batches = shard_micro_batches([TokenBatch(input_ids=one, labels=one) for one in ids], mesh)
    with CountCalls() as sent:
        model.gradients(batches)
    return sum(size for (_, is_all_to_all), size in sent.by_group.items() if is_all_to_all), sent.calls


PLANS = {
    "two ranks": (ParallelPlan(experts=2), Point(dp=4, zero=3, experts=2)),
    "all ranks": (ParallelPlan(experts=4, zero=2), Point(dp=4, zero=2, experts=4)),
    "full checkpoints": (
        ParallelPlan(experts=4, recompute="full"),
        Point(dp=4, zero=3, experts=4, checkpointing="full"),
    ),
    "selective checkpoints": (
        ParallelPlan(experts=4, recompute="selective"),
        Point(dp=4, zero=3, experts=4, checkpointing="selective"),
    ),
    "MLP in tiles": (
        ParallelPlan(experts=4, mlp_rows=TILE),
        Point(dp=4, zero=3, experts=4, tiling="mlp"),
    ),
    "both": (
        ParallelPlan(experts=4, mlp_rows=TILE, recompute="full"),
        Point(dp=4, zero=3, experts=4, tiling="mlp", checkpointing="full"),
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_tokens_to_experts_and_back_are_the_bytes_that_ranks_send(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("seqmesh.planner.cost.experts.TILE_ROWS", TILE)
    plan, point = PLANS[name]
    job = Job(
        model=TINY,
        cluster=Cluster(gpu=load_gpu("h100-sxm"), nodes=1, gpus_per_node=4),
        seq_len=TOKENS,
        global_batch=8,
        numerics=FP32,
        stack=TrainerStack(),
    )
    one = sent_to_experts(job, point)
    layers = 2 * TINY.layers
    assert ranks.run(4, counted, plan) == [(layers * one.mean, layers * one.calls)] * 4


def job(model: ModelShape = TINY, *, nodes: int = 1, each: int = 8, **more: Any) -> Job:
    cluster = Cluster(gpu=load_gpu("h100-sxm"), nodes=nodes, gpus_per_node=each)
    return Job(model=model, cluster=cluster, **({"seq_len": 8192, "global_batch": 8} | more))


@pytest.mark.parametrize("per_node", [2, 4, 8])
@pytest.mark.parametrize(
    "axes", [("tp", "ulysses", "ring", "dp", "pp"), ("pp", "tp", "ulysses", "ring", "dp")]
)
def test_ranks_of_experts_are_neighbours_as_the_trainers_device_mesh_has_them(
    per_node: int, axes: tuple[str, ...]
) -> None:
    """Against the ranks of the trainer's mesh, numbered one by one: fsdp cut in (efsdp, ep)."""
    point = Point(pp=2, dp=2, ring=2, ulysses=3, zero=3)
    ranks = torch.arange(24).view(2, 12) if axes[-1] == "pp" else torch.arange(24).view(12, 2).T
    asked = job(nodes=24 // per_node, each=per_node, axes=axes)
    for experts in (2, 3, 4, 6, 12):
        views = ranks.view(2, 12 // experts, experts)
        for copies, members in ((False, views[0, 0]), (True, views[0, :, 0])):
            found = expert_group(asked, point.but(experts=experts), copies=copies)
            nodes = Counter((members // per_node).tolist())
            assert (found.size, found.nodes) == (len(members), len(nodes))
            assert found.per_node == max(nodes.values())


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("experts", [1, 2, 4])
def test_states_are_those_of_a_rank_that_holds_its_share_of_experts(zero: int, experts: int) -> None:
    """By hand: bf16 weights, fp32 gradients, 12 bytes of AdamW; experts over 4 / E ranks, the rest over 4."""
    sparse = TINY.layers * 4 * 3 * 64 * 96
    dense = TINY.parameters - sparse
    kept = CostModel(job(each=4)).estimate(Point(dp=4, zero=zero, experts=experts)).memory.categories
    shards = dense // 4 + (sparse // experts) // (4 // experts)
    assert kept["optimizer"] == 12 * shards
    assert kept["gradients"] == 4 * shards
    assert kept["parameters"] == 2 * (shards if zero == 3 else dense + sparse // experts)


def test_a_pipelines_ranks_hold_their_stages_share_of_spread_experts() -> None:
    each = 4 * 3 * 64 * 96  # experts of a layer, of which 2 ranks have a half each
    body = TINY.layer_parameters - each
    asked, point = job(), Point(pp=2, dp=4, zero=3, experts=2)
    end = stage_parameters(asked, point, last=False)
    assert end == fullest_parameters(asked, point) == (body + 96 * 64, each // 2)
    assert mean_parameters(asked, point) == (body + 96 * 64, each / 2)
    assert end.whole == body + 96 * 64 + each // 2
    assert end.sharded(point) == (body + 96 * 64) / 4 + each / 4


def test_weights_of_spread_experts_travel_between_the_ranks_that_hold_the_same_ones() -> None:
    """ZeRO-3 sends 2 gathers of bf16 and a reduction of fp32: 8 bytes of all but a rank's own part."""
    sparse = TINY.layers * 4 * 3 * 64 * 96
    dense = TINY.parameters - sparse
    asked = job(each=8)
    costs = CostModel(asked)
    for experts in (1, 2, 4):
        point = Point(dp=8, zero=3, experts=experts)
        sent = costs.estimate(point).bytes_per_step["scale_up"]
        tokens = TINY.layers * sent_to_experts(asked, point).mean if experts > 1 else 0
        weights = 8 * (dense * 7 / 8 + sparse / experts * (1 - experts / 8))
        assert sent == pytest.approx(weights + tokens, abs=2)


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("active", [1, 2, 3])
def test_deepep_sends_a_row_once_to_each_other_node_that_has_an_expert_for_it(
    nodes: int, active: int
) -> None:
    """By every choice of experts there is, of 8 on 8 ranks; what leaves a rank at all is as without."""
    model = replace(TINY, mixture=MixtureShape(experts=8, active=active, intermediate=96))
    cluster = Cluster(gpu=load_gpu("h100-sxm"), nodes=nodes, gpus_per_node=8 // nodes)
    point = Point(dp=8, zero=1, experts=8)
    plain, bridge = (
        sent_to_experts(
            Job(model=model, cluster=cluster, seq_len=64, global_batch=8, stack=stack_named(stack)), point
        )
        for stack in ("megatron", "megatron-bridge")
    )
    chosen = list(combinations(range(8), active))
    left = sum(expert != 0 for experts in chosen for expert in experts)  # a row of rank 0, whose expert is 0
    crossed = sum(len({expert * nodes // 8 for expert in experts} - {0}) for experts in chosen)
    assert bridge.off_node == pytest.approx(crossed / left)
    assert bridge.off_node <= plain.off_node
    assert (bridge.mean, bridge.most, bridge.calls) == (plain.mean, plain.most, plain.calls)
    seconds = [
        Network(cluster, Assumptions()).all_to_all_seconds(
            place(("experts",), (8,), frozenset(("experts",)), 8 // nodes), 1e9, 1, one.off_node
        )
        for one in (plain, bridge)
    ]
    assert (seconds[1] < seconds[0]) == (bridge.off_node < plain.off_node)


def test_the_busiest_rank_of_experts_takes_longer_and_holds_more_and_no_more_is_sent() -> None:
    model = load_model("gpt-oss-20b")
    point = Point(dp=8, zero=3, experts=8)
    asked = job(model)
    at_once = asked.assumptions.override({"scale_up_latency": 0.0, "peer": 0.0}, "a test")
    even = CostModel(replace(asked, assumptions=at_once))
    uneven = even.with_assumption("expert_balance", 1.5)
    terms = [{term.name: term.seconds for term in one.estimate(point).terms} for one in (even, uneven)]
    assert terms[1]["experts exchange"] == pytest.approx(1.5 * terms[0]["experts exchange"], rel=1e-5)
    assert terms[1]["matrix products"] > 1.2 * terms[0]["matrix products"]
    assert uneven.estimate(point).memory.total > even.estimate(point).memory.total
    assert uneven.estimate(point).bytes_per_step == even.estimate(point).bytes_per_step
    alone = Point(dp=8, zero=3)  # every rank has all experts: no other's tokens come
    assert uneven.seconds(alone) == even.seconds(alone)
    with pytest.raises(ValueError, match=r"expert_balance = 0\.9: use a positive finite number from 1 to"):
        Assumptions(expert_balance=0.9)


@pytest.mark.parametrize(
    ("point", "rule"),
    [
        (
            Point(dp=8, zero=3, experts=3),
            "experts=3 does not divide the 4 experts of tiny; use a divisor of 4",
        ),
        (Point(dp=2, pp=4, zero=3, experts=4), "experts=4 over dp x ulysses x ring = 2 ranks; use a degree"),
        (Point(dp=8, zero=1, experts=2), "experts=2 with zero=1: seqmesh train spreads experts over"),
        (Point(dp=4, tp=2, zero=3), "tp=2 with experts is not priced: use tp=1"),
    ],
    ids=str,
)
def test_experts_that_the_trainer_does_not_spread_so_are_refused(point: Point, rule: str) -> None:
    asked = job(TINY if point.pp == 1 else replace(TINY, layers=8))
    assert next(violations(asked, point)).startswith(rule)


def test_experts_of_a_dense_model_and_pp_between_their_ranks_are_refused() -> None:
    dense = job(load_model("llama3-8b"))
    assert next(violations(dense, Point(dp=8, zero=3, experts=2))).startswith(
        "experts=2: llama3-8b has no experts"
    )
    between = job(axes=("ulysses", "pp", "ring", "dp", "tp"))
    point = Point(ulysses=2, pp=2, dp=2, zero=3, experts=2)
    assert "pp lies between the ranks that share them" in next(violations(between, point))
    assert not list(violations(job(), point))
    assert not list(violations(replace(between, stack=stack_named("megatron")), point.but(experts=1, zero=1)))
    megatron = job(stack=stack_named("megatron"))
    assert not list(violations(megatron, Point(dp=8, zero=1, experts=2)))


SMALL = ModelShape(
    name="small",
    layers=6,
    hidden=768,
    heads=12,
    kv_heads=6,
    head_dim=64,
    intermediate=2048,
    vocabulary=32000,
    sliding_window=4096,
    full_layers=2,
    mixture=MixtureShape(experts=8, active=2, intermediate=1024, shared=512, dense_layers=1),
)


@pytest.mark.parametrize("limit", [80, 10, 5])
@pytest.mark.parametrize("balance", [1.0, 1.6])
def test_the_search_over_experts_finds_what_brute_force_finds(limit: int, balance: float) -> None:
    asked = job(SMALL, each=4, seq_len=24576, global_batch=4, memory_limit=limit << 30)
    costs = CostModel(replace(asked, assumptions=asked.assumptions.moved("expert_balance", balance)))
    times: dict[Mesh, float] = {}
    knobs = product((1, 2, 3), ("none", "full"), OFFLOAD, TILING, (1, 2, 4), (1, 2, 4))
    for values in knobs:
        named = dict(
            zip(("zero", "checkpointing", "offload", "tiling", "micro_batch", "experts"), values, strict=True)
        )
        for degrees in product((1, 2, 4), repeat=4):
            point = Point(**dict(zip(("ulysses", "ring", "dp", "pp"), degrees, strict=True)), **named)
            if any(violations(costs.job, point)) or not costs.memory.of(point).fits(costs.job):
                continue
            mesh = degrees_of(point)
            times[mesh] = min(costs.seconds(point), times.get(mesh, inf))
    found = search(costs, {}, top=4).best
    assert [one.seconds for one in found] == pytest.approx(sorted(times.values())[:4], rel=1e-9)


def test_no_point_of_a_mesh_is_faster_than_its_floor() -> None:
    asked = job(load_model("gpt-oss-20b"), seq_len=65536, global_batch=8)
    costs = CostModel(replace(asked, assumptions=asked.assumptions.moved("expert_balance", 1.3)))
    floors = FloorModel(costs)
    for mesh in bare_meshes(costs.job, {}):
        spread = mesh.but(experts=experts_of(costs.job, mesh, {})[-1])
        zero_stages = zero_stages_of(costs.job, mesh, {})
        floor = floors.floor(spread, zero_stages, micro_batches_of(costs.job, mesh, {}))
        for point in variants(costs.job, mesh, {}):
            if not any(violations(costs.job, point)):
                assert floor <= costs.seconds(point) * (1 + 1e-12), point


@pytest.mark.parametrize("model", ["gpt-oss-20b", "deepseek-v3"])
@pytest.mark.parametrize(
    "point",
    [
        Point(ulysses=2, ring=2, dp=2, zero=3, experts=8),
        Point(ring=4, dp=2, zero=2, experts=4, checkpointing="full", tiling="mlp"),
    ],
    ids=str,
)
def test_the_timeline_of_a_mixture_draws_what_was_priced(model: str, point: Point) -> None:
    costs = CostModel(job(load_model(model), seq_len=32768))
    events = timeline(costs, point)["traceEvents"]  # raises where the two differ
    assert "experts exchange" in {event["name"] for event in events}


def test_activations_of_a_mixture_are_counted_network_by_network() -> None:
    """By hand: of each of 8 experts input, gate, up, their product and result in bf16; router logits."""
    n, h, width = 8192, 2048, 768
    costs = CostModel(job(load_model("qwen3-30b-a3b"))).with_assumption("expert_balance", 1.5)
    memory = FusedMemory(costs.job, costs.loads)
    alone, shared = Point(dp=8, zero=3), Point(dp=8, zero=3, experts=8)
    for point, rows in ((alone, 8), (shared, 12)):
        kept = memory.layer_activations(point)["activations_mlp"]
        assert kept == 2 * n * rows * (3 * width + 2 * h) + 2 * n * 128 + 4 * n * 128
    # Gradients of the same; where experts are spread, those of inputs and results are sent and received.
    assert memory.of(alone).moments["mlp"] == 2 * n * 8 * (3 * width + 2 * h)
    assert memory.of(shared).moments["mlp"] == 2 * n * 12 * (3 * width + 4 * h)
    selective = shared.but(checkpointing="selective")
    more = memory.of(selective).categories
    products = 2 * n * (h + 12 * (2 * width + h) + 128)  # of the output, gate and up, down, and the router
    assert more["activations_products"] == 48 * products
    assert memory.of(selective).moments["mlp"] == 2 * n * (12 * (4 * width + 6 * h) + 4 * h)


def test_activations_of_latent_attention_and_of_dense_layers_beside_experts() -> None:
    n, h, heads = 8192, 7168, 128
    costs = CostModel(job(load_model("deepseek-v3")))
    kept = FusedMemory(costs.job, costs.loads).layer_activations(Point(dp=8, zero=3))
    q_and_k, v_and_out = 2 * n * heads * 2 * 192, 2 * n * heads * 2 * 128
    latents = 2 * n * (2 * 1536 + 2 * 512 + 64)
    assert kept["activations_attention"] == q_and_k + v_and_out + 4 * n * heads + latents
    sparse = 2 * n * (3 * 9 * 2048 + 2 * 8 * h + 256) + 4 * n * 256
    assert kept["activations_mlp"] == (58 * sparse + 3 * 2 * n * 3 * 18432) // 61
