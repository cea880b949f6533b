"""Pipelines: how long they idle, what they send and keep, and which order a search finds."""

from dataclasses import replace
from itertools import pairwise

import pytest
from planned import job, seconds_of

from seqmesh.planner.candidates import mesh_of, meshes, with_savers
from seqmesh.planner.cost.pipeline import (
    boundary_bytes,
    crossings,
    exposed_crossings,
    idle_seconds,
    in_flight,
)
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.legality import violations
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.search import search

pytestmark = pytest.mark.fast


def forwards_before_first_backward(pp: int, stage: int, virtual: int, micro_batches: int) -> int:
    """A walk over Megatron's interleaved order: forwards of single stages until the first backward comes.

    Stage v x pp + r runs on rank r; micro-batches go round in groups of pp. The first backward of a rank is
    that of its last stage, which can start pp - 1 - stage steps after the last rank has done that forward.
    """
    order = [
        (group * pp + member, chunk)
        for group in range(micro_batches // pp)
        for chunk in range(virtual)
        for member in range(pp)
    ]
    last = order.index((0, virtual - 1))  # the first micro-batch through a rank's last stage
    return min(last + 1 + 2 * (pp - 1 - stage), len(order))


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("virtual", [2, 3])
def test_interleaved_stages_keep_what_runs_before_the_first_backward(pp: int, virtual: int) -> None:
    point = Point(pp=pp, pipeline="interleaved", virtual=virtual)
    for stage in range(pp):
        forwards = forwards_before_first_backward(pp, stage, virtual, 4 * pp)
        assert in_flight(point, stage, 4 * pp) == pytest.approx(forwards / virtual)
    # Korthikanti et al. 2022: the first stage keeps 1 + (p - 1)/(p v) of what 1F1B does.
    assert in_flight(point, 0, 4 * pp) / pp == pytest.approx(1 + (pp - 1) / (pp * virtual))
    assert [in_flight(Point(pp=pp), stage, 99) for stage in (0, pp - 1)] == [pp, 1]


def test_interleaved_stages_idle_less_and_send_more() -> None:
    plain, short = Point(pp=4), Point(pp=4, pipeline="interleaved", virtual=2)
    assert idle_seconds(plain, 8, 3.0, 1.0) == 9.0
    assert idle_seconds(short, 8, 3.0, 1.0) == 4.5
    # ZB-H1 with forward, backward and weights of a second each: F + B - W.
    assert idle_seconds(Point(pp=4, pipeline="zero-bubble"), 8, 3.0, 1.0) == 3.0
    assert (crossings(plain, 8), crossings(short, 8)) == (2 * (8 + 3), 2 * (16 + 3))
    assert (exposed_crossings(plain, 8), exposed_crossings(short, 8)) == (22, 6)


@pytest.mark.parametrize(("pp", "virtual", "nodes"), [(4, 1, 2), (4, 2, 4), (2, 3, 1)])
def test_boundaries_between_stages_are_crossed_both_ways_by_every_micro_batch(
    pp: int, virtual: int, nodes: int
) -> None:
    """Counted over the stages one by one: stage s is on rank s % pp, a rank on node rank * nodes / pp."""
    node_of = [stage % pp * nodes // pp for stage in range(pp * virtual)]
    boundaries = list(pairwise(node_of))
    point = Point(pp=pp, pipeline="interleaved" if virtual > 1 else "1f1b", virtual=virtual)
    off_node, sent = boundary_bytes(point, 8, 100.0, nodes)
    assert sent == pytest.approx(100.0 * 2 * 8 * len(boundaries) / pp)
    assert off_node == pytest.approx(sum(a != b for a, b in boundaries) / len(boundaries))
    assert boundary_bytes(Point(), 8, 100.0, 1) == (0.0, 0.0)


def zero_bubble_ends(pp: int, micro_batches: int, backward: float) -> float:
    """A walk over ZB-H1: ranks take a backward before a forward before weights, a second each but for it."""
    now = [0.0] * pp
    forwards: dict[tuple[int, int], float] = {}
    backwards: dict[tuple[int, int], float] = {}
    done = [[0, 0, 0] for _ in range(pp)]  # forwards, backwards and weights
    for _ in range(3 * pp * micro_batches):
        ready = []
        for rank, (f, b, w) in enumerate(done):
            comes = forwards.get((rank, b)) if rank == pp - 1 else backwards.get((rank + 1, b))
            if b < f and comes is not None:
                ready.append((max(now[rank], comes), 0, rank))
            comes = 0.0 if rank == 0 else forwards.get((rank - 1, f))
            if f < micro_batches and f - b < pp - rank and comes is not None:
                ready.append((max(now[rank], comes), 1, rank))
            if w < b:
                ready.append((now[rank], 2, rank))
        start, what, rank = min(ready)
        now[rank] = start + (backward if what == 0 else 1.0)
        if what < 2:
            (backwards, forwards)[what][rank, done[rank][1 - what]] = now[rank]
        done[rank][(1, 0, 2)[what]] += 1
    return max(now)


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("backward", [1.0, 1.5])
def test_zero_bubble_idles_as_its_schedule_does(pp: int, micro_batches: int, backward: float) -> None:
    """With few micro-batches too: their gradients of weights are all that fills gaps."""
    a_pass = 1 + backward + 1
    idle = zero_bubble_ends(pp, micro_batches, backward) - micro_batches * a_pass
    assert idle_seconds(Point(pp=pp, pipeline="zero-bubble"), micro_batches, a_pass, 1.0) == idle


def test_a_pipelines_order_changes_its_step_and_memory() -> None:
    costs = CostModel(job("megatron", "llama3-70b", nodes=8, batch=64))
    base = Point(tp=8, pp=8, zero=0)
    plain, short, none = (
        costs.estimate(base.but(pipeline=kind, virtual=virtual))
        for kind, virtual in (("1f1b", 1), ("interleaved", 5), ("zero-bubble", 1))
    )
    assert none.seconds < plain.seconds > short.seconds
    assert short.memory.total > plain.memory.total == none.memory.total
    assert sum(short.bytes_per_step.values()) > sum(plain.bytes_per_step.values())


def test_the_head_takes_the_place_of_the_layers_that_its_stage_has_fewer() -> None:
    """126 layers on 16 ranks of 8 stages leave two stages empty; a head costs less than a layer of 405B."""
    costs = CostModel(job("megatron", "llama3-405b", nodes=16, batch=32))
    interleaved = Point(tp=8, pp=16, zero=0, pipeline="interleaved", virtual=8)
    assert seconds_of(costs, interleaved, "output head and loss") == 0.0
    assert seconds_of(costs, Point(tp=8, pp=2, dp=8), "output head and loss") > 0.0


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"pipeline": "interleaved"}, "use pipeline=interleaved and virtual >= 2"),
        ({"virtual": 2}, "use pipeline=interleaved and virtual >= 2"),
        ({"pipeline": "interleaved", "virtual": 17}, "use virtual <= 16"),
        ({"pipeline": "interleaved", "virtual": 2, "micro_batch": 8}, "a multiple of 2"),
        ({"pipeline": "zero-bubble", "pp": 1, "dp": 8}, "use pp >= 2"),
    ],
    ids=str,
)
def test_orders_that_cannot_be_are_named(changes: dict[str, int | str], rule: str) -> None:
    point = Point(pp=2, dp=4).but(**changes)
    assert any(rule in text for text in violations(job(batch=32), point))


def test_a_model_is_said_to_have_its_own_layers_where_its_ends_count_too() -> None:
    """Of 32 layers and both ends Megatron-LM makes 34 stages, 17 a rank."""
    point = Point(pp=2, dp=4, pipeline="interleaved", virtual=18)
    (said,) = violations(job("megatron", batch=32), point)
    assert said == "pp=2 x virtual=18 with 32 layers leaves stages empty; use virtual <= 17"


def test_an_order_is_pinned_and_kept_by_the_search() -> None:
    pins: dict[str, int | str] = {"pp": 4, "pipeline": "interleaved", "virtual": 2}
    best = search(CostModel(job("megatron", batch=32)), pins).best
    assert best
    assert all(one.point.virtual == 2 for one in best)


def test_what_hides_on_its_way_to_the_next_stage_costs_its_tax() -> None:
    costs = CostModel(job("megatron", "llama3-70b", nodes=8, batch=64))
    point = Point(tp=8, pp=8, zero=0, pipeline="interleaved", virtual=5)
    (sent,) = (term for term in costs.estimate(point).terms if term.name == "pipeline exchange")
    count = costs.job.micro_batches(point)
    one = sent.seconds / crossings(point, count)
    exposed = exposed_crossings(point, count)
    assert sent.exposed == pytest.approx(one * (exposed + 0.1 * (crossings(point, count) - exposed)))


SIX = ModelShape(
    name="six", layers=6, hidden=768, heads=12, kv_heads=6, head_dim=64, intermediate=2048, vocabulary=32000
)


@pytest.mark.parametrize("stack", ["seqmesh", "megatron"])
@pytest.mark.parametrize("pins", [{}, {"pp": 2}, {"tp": 2}, {"pipeline": "1f1b"}], ids=str)
@pytest.mark.parametrize("limit", [80 << 30, 3 << 30], ids=lambda n: f"{n >> 30} GiB")
def test_the_search_finds_the_best_order_of_a_pipeline(
    stack: str, pins: dict[str, int | str], limit: int
) -> None:
    """As brute force over every point does, each with every number of stages that layers fill evenly."""
    asked = replace(job(stack, nodes=1, batch=8), model=SIX, memory_limit=limit, seq_len=24576)
    costs = CostModel(replace(asked, cluster=replace(asked.cluster, gpus_per_node=4)))
    seconds: dict[tuple[int, ...], float] = {}
    for base in meshes(costs.job, {key: value for key, value in pins.items() if key != "pipeline"}):
        even = [
            v
            for v in range(2, 7)
            if v <= costs.job.stack.most_virtual
            and (6 % (v * base.pp) == 0 or (stack == "megatron" and base.pp == 4 and v == 2))
        ]
        orders = [base, *(base.but(pipeline="interleaved", virtual=v) for v in even)]
        for order in orders[:1] if "pipeline" in pins else orders:
            for point in with_savers(costs.job, order, {}):
                if not any(violations(costs.job, point)) and costs.memory.of(point).fits(costs.job):
                    took = costs.seconds(point)
                    seconds[mesh_of(point)] = min(took, seconds.get(mesh_of(point), took))
    best = search(costs, pins, top=4).best
    assert [one.seconds for one in best] == pytest.approx(sorted(seconds.values())[:4], rel=1e-9)


def test_a_deep_pipeline_is_planned_with_interleaved_stages_that_the_program_runs() -> None:
    pins: dict[str, int | str] = {"pp": 8, "tp": 8}
    programs = ("fsdp2", "megatron", "seqmesh", "fused")
    jobs = {stack: job(stack, "llama3-70b", nodes=8, batch=64) for stack in programs}
    found = {stack: search(CostModel(jobs[stack]), pins).best[0].point for stack in programs}
    # 80 layers are 10 of a rank, one by one; two stages a rank are what `seqmesh train` runs.
    virtual = {stack: point.virtual for stack, point in found.items()}
    assert virtual == {"fsdp2": 10, "megatron": 10, "seqmesh": 2, "fused": 1}
    # 126 layers do not divide by 16, but by Megatron's count with both ends: Llama 3's own pipeline.
    uneven = {stack: job(stack, "llama3-405b", nodes=64, batch=256) for stack in ("megatron", "seqmesh")}
    pins = {"pp": 16, "tp": 8}
    best = {stack: search(CostModel(one), pins).best[0].point for stack, one in uneven.items()}
    assert (best["megatron"].virtual, best["seqmesh"].virtual) == (8, 1)
