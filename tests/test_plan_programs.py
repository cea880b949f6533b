"""What is a program's and a GPU's: overlap, recomputation, precision, kernels, latency, memory."""

from dataclasses import replace
from math import log, sqrt

import pytest
from planned import job, seconds_of

from seqmesh.planner.cost.network import Network, place
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.cost.tensor_parallel import tensor_calls
from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.kernels import RATES, assumptions_of
from seqmesh.planner.inputs.legality import violations
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.point import AXES, CHECKPOINTING, Point
from seqmesh.planner.inputs.stack import STACKS, stack_named
from seqmesh.planner.search import search

pytestmark = pytest.mark.fast


# Programs.


def test_nvidias_recipes_cast_weights_once_a_step_and_hide_more_of_tensor_parallelism() -> None:
    point = Point(tp=4, dp=2)
    plain, bridge = (
        CostModel(job(stack, precision="fp8-linear")) for stack in ("megatron", "megatron-bridge")
    )
    kept = bridge.compute.layer(point)
    cast = plain.compute.layer(point)
    # q, k and v, output, gate and up, down: each cast by 6 bytes a number, on one of 4 ranks.
    weights = (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336) / 4
    seconds = 6 * weights / (0.8 * 3.35e12)
    assert cast.matmul_forward - kept.matmul_forward == pytest.approx(seconds)
    assert cast.matmul_backward == kept.matmul_backward
    exposed = [
        next(t.exposed / t.seconds for t in costs.estimate(point).terms if t.name.startswith("tensor"))
        for costs in (plain, bridge)
    ]
    assert exposed == [0.6, 0.25]


@pytest.mark.parametrize("stack", ["seqmesh", "fsdp2", "megatron"])
def test_plain_data_parallelism_wins_where_the_batch_can_be_split(stack: str) -> None:
    """Best practice 2, at 8K."""
    asked = job(stack)
    best = search(CostModel(asked), {"tp": 1, "pp": 1}, top=9).best
    assert (best[0].point.dp, best[0].point.sp) == (8, 1)


def test_gradients_and_weights_hide_by_the_program() -> None:
    point = Point(dp=8, zero=3)
    exposed = {}
    for name in ("seqmesh", "fsdp2"):
        terms = {term.name: term for term in CostModel(job(name)).estimate(point).terms}
        exposed[name] = [
            terms[what].exposed / terms[what].seconds for what in ("gradient reduction", "weight gathering")
        ]
    assert exposed["seqmesh"][0] == 1.0
    # Of 32 layers all but the last hide, at a tax of a tenth.
    assert exposed["fsdp2"][0] == pytest.approx(1 - 31 / 32 * 0.9)
    assert exposed["fsdp2"][1] == pytest.approx(1 - 63 / 64 * 0.9)


def test_collectives_of_tensor_parallelism_are_the_programs() -> None:
    plain, full, selective = (Point(tp=8, checkpointing=kind) for kind in ("none", "full", "selective"))
    assert tensor_calls(job("megatron"), plain) == (4, 0, 6)
    assert tensor_calls(job("megatron"), selective) == (4, 0, 6)
    assert tensor_calls(job("seqmesh"), full) == (4, 4, 6)
    assert tensor_calls(job("fsdp2"), full) == (4, 4, 4)
    assert tensor_calls(job("fsdp2"), selective) == (4, 2, 4)
    assert tensor_calls(job("fsdp2", precision="fp8-linear"), full) == (3, 3, 4)


@pytest.mark.parametrize("stack", [name for name in STACKS if name not in ("trainer", "megatron")])
def test_recomputing_more_takes_longer_and_keeps_less(stack: str) -> None:
    costs = CostModel(replace(job(stack, batch=8), headroom=0.0))
    found = [costs.estimate(Point(dp=8, zero=3, checkpointing=kind)) for kind in CHECKPOINTING]
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert [one.memory.total for one in found] == sorted((one.memory.total for one in found), reverse=True)


def test_every_second_product_is_kept_by_torchtitan() -> None:
    """Of q, k, v, output, w1, w3, w2 each second one; attention's output and lse; the layer's input."""
    tokens, h, f, kv = 8192, 4096, 14336, 1024
    kept = CostModel(job("fsdp2")).estimate(Point(dp=8, zero=3, checkpointing="selective")).memory.categories
    of_a_token = 2 * (h + kv + f + h + h) + 4 * 32
    assert kept["activations_products"] == 32 * tokens * of_a_token
    assert kept["checkpoints"] == 32 * tokens * 2 * h


def test_fsdp2_holds_sixteen_bytes_a_parameter_in_shards_and_its_root_whole() -> None:
    model = load_model("llama3-8b")
    kept = CostModel(job("fsdp2")).estimate(Point(dp=8, zero=3)).memory.categories
    assert kept["optimizer"] + kept["gradients"] == pytest.approx(16 * model.parameters / 8, rel=1e-9)
    assert kept["zero_buffers"] > 2 * 2 * model.embedding_parameters
    # One that keeps weights whole between micro-batches keeps gradients whole too.
    whole = CostModel(job("fsdp2", batch=16)).estimate(Point(dp=8, zero=2)).memory.categories
    assert whole["parameters"] + whole["gradients"] == pytest.approx((6 + 4 / 8) * model.parameters, rel=1e-9)


def test_what_fsdp2_does_not_have_is_named() -> None:
    for change, said in (({"zero": 1}, "zero=2 or 3"), ({"tiling": "loss"}, "tiling=none")):
        point = Point(dp=8, zero=3).but(**change)
        assert any(said in text for text in violations(job("fsdp2"), point))


def test_logits_and_layers_that_are_computed_again_are_not_there_at_once() -> None:
    point = Point(dp=8, zero=3, checkpointing="full")
    memory = CostModel(job("fsdp2", seq_len=32768)).estimate(point).memory
    assert memory.moments["logits"] == 12 * 32768 * 128256
    assert memory.moments["mlp"] > 2 * 32768 * 3 * 14336
    assert "activations_mlp" not in memory.categories


# Precision and kernels.


def test_products_in_fp8_are_faster_where_they_are_large_and_nothing_else_changes() -> None:
    point = Point(dp=8, zero=3)
    half, eighth = (CostModel(job("fsdp2", precision=kind)) for kind in ("bf16", "fp8-linear"))
    ratio = seconds_of(half, point, "matrix products") / seconds_of(eighth, point, "matrix products")
    assert 1.2 < ratio < 2
    for name in ("attention kernel", "output head and loss"):
        assert seconds_of(half, point, name) == seconds_of(eighth, point, name)
    with pytest.raises(ValueError, match="no tflops_fp8"):
        job("fsdp2", gpu="a100-sxm", precision="fp8-linear")


def test_every_kernel_and_gpu_has_rates_with_a_source_and_a_backward_that_is_slower() -> None:
    for rates in RATES.values():
        assert rates.source
        assert 0 < rates.backward < rates.forward < 1
    hopper = [
        assumptions_of(load_gpu("h100-sxm"), stack_named("seqmesh", kernel)) for kernel in ("fa2", "fa3")
    ]
    assert [one.attention_forward for one in hopper] == [0.35, 0.64]
    assert job("megatron").attention_kernel == "cuDNN"
    with pytest.raises(ValueError, match="no known rate on a100-sxm"):
        assumptions_of(load_gpu("a100-sxm"), stack_named("seqmesh", "fa3"))


def test_what_a_gpu_says_of_itself_goes_before_its_kernel_and_names_itself() -> None:
    found = {one.name: one for one in job(gpu="l20").assumptions.explain()}
    assert found["attention_forward"].value == 0.82
    assert found["attention_forward"].source.startswith("[gpu.l20.assumptions]; else")
    assert found["matmul"].source.startswith("assumption")


def test_a_jobs_assumptions_follow_its_stack_and_gpu_until_some_are_given() -> None:
    one = job()
    other = replace(one, stack=stack_named("fsdp2"))
    assert (one.assumptions.gradient_overlap, other.assumptions.gradient_overlap) == (0.0, 1.0)
    given = replace(one, assumptions=one.assumptions.moved("network", 0.5))
    assert replace(given, stack=stack_named("fsdp2")).assumptions == given.assumptions


def test_products_with_few_outputs_are_slower() -> None:
    """As many FLOPs in thinner slices."""
    rates = []
    for tp in (1, 2, 4, 8):
        layer = CostModel(job(seq_len=1024)).compute.layer(Point(tp=tp))
        rates.append(1 / (tp * layer.matmul_forward))
    assert rates == sorted(rates, reverse=True)
    without = replace(job(seq_len=1024), assumptions=Assumptions(matmul_half_outputs=0.0))
    assert CostModel(without).compute.layer(Point(tp=8)).matmul_forward < 1 / (8 * rates[3])


# Groups.


def round_latency(size: int, per_node: int) -> float:
    """Latency of a collective of nothing, walked hop by hop: round a ring, or over a tree of nodes."""
    a = Assumptions()
    nodes = size // per_node
    if nodes == 1:
        return a.scale_up_latency + (size - 2) * a.scale_up_hop
    ring = sum(a.network_hop if rank % per_node == 0 else a.scale_up_hop for rank in range(1, size))
    depth = 0
    while 2**depth < nodes:
        depth += 1
    tree = depth * a.network_hop + (per_node - 1) * a.scale_up_hop
    return a.network_latency - a.network_hop + min(ring, tree)


@pytest.mark.parametrize(("size", "per_node"), [(2, 2), (8, 8), (16, 8), (64, 8), (1024, 8), (48, 8)])
def test_latency_grows_with_ranks_by_a_ring_or_a_tree(size: int, per_node: int) -> None:
    cluster = Cluster(gpu=load_gpu("h100-sxm"), nodes=size // per_node, gpus_per_node=per_node)
    group = place(("dp",), (size,), frozenset(("dp",)), per_node)
    assert Network(cluster, Assumptions()).round_seconds(group, 0.0) == pytest.approx(
        round_latency(size, per_node)
    )


def test_large_messages_go_round_a_ring() -> None:
    cluster = Cluster(gpu=load_gpu("h100-sxm"), nodes=4, gpus_per_node=8)
    network = Network(cluster, Assumptions())
    group = place(("dp",), (32,), frozenset(("dp",)), 8)
    more = network.round_seconds(group, 2e10) - network.round_seconds(group, 1e10)
    assert more == pytest.approx(1e10 / (8 * network.rate("network")))


def test_weak_scaling_costs_something() -> None:
    """One 8K sequence a GPU: 946 and 948 ms on 32 and 16,384 GPUs, before latency grew with ranks."""
    times = []
    for nodes in (4, 64, 2048):
        asked = job(nodes=nodes, batch=8 * nodes)
        times.append(CostModel(asked).seconds(Point(dp=8 * nodes, zero=3)))
    assert times[0] < times[1] < times[2]
    assert times[2] > 1.05 * times[0]


def test_all_wait_for_the_slowest_gpu() -> None:
    costs = CostModel(job(nodes=4, batch=32))
    point = Point(dp=32, zero=3)
    waiting = seconds_of(costs, point, "waiting for the slowest GPU")
    terms = costs.estimate(point).terms
    busy = sum(term.seconds for term in terms if term.cause == "compute") - waiting
    optimizer = seconds_of(costs, point, "optimizer")
    assert waiting == pytest.approx(0.01 * sqrt(2 * log(32)) * (busy - optimizer))
    assert seconds_of(CostModel(job("paper", nodes=4, batch=32)), point, "waiting for the slowest GPU") == 0


def test_one_network_card_for_a_part_of_a_node_is_a_matter_of_the_papers_machine() -> None:
    found = [assumptions_of(load_gpu(name), stack_named("paper")) for name in ("a800-sxm", "h100-sxm")]
    assert [one.one_nic_per_partial_node for one in found] == [1, 0]
    group = place(AXES, (2, 1, 1, 8, 1), frozenset(("dp",)), 8)
    cluster = Cluster(gpu=load_gpu("a800-sxm"), nodes=2, gpus_per_node=8)
    slow, fast = (Network(cluster, one).round_seconds(group, 1e9) for one in found)
    assert slow > 2 * fast


# Memory.


def test_plans_leave_headroom_of_what_a_card_reports() -> None:
    one = replace(job(), headroom=0.05)
    assert one.capacity == round(79.1 * 2**30) < load_gpu("h100-sxm").memory_bytes
    assert one.room == round(0.95 * one.capacity)
    for estimate in search(CostModel(one), {}).best:
        assert estimate.memory.total <= one.room
    # The published comparisons fill all that the card is sold with.
    assert job("paper").capacity == load_gpu("h100-sxm").memory_bytes


def test_fragmentation_is_a_share_of_what_the_allocator_holds() -> None:
    kept = CostModel(job()).estimate(Point(dp=8, zero=3)).memory.categories
    held = sum(size for name, size in kept.items() if name not in ("fragmentation", "overhead"))
    assert kept["fragmentation"] == round(0.02 * held)
