"""The search against brute force, its pins, and the longest sequence."""

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise, product
from math import prod

import pytest

from seqmesh import layouts, masks
from seqmesh.planner import candidates
from seqmesh.planner.answer import answer
from seqmesh.planner.candidates import (
    Mesh,
    Pins,
    bare_meshes,
    divisors,
    mesh_of,
    meshes,
    micro_batches_of,
    variants,
    zero_stages_of,
)
from seqmesh.planner.cost.attention import head_rate
from seqmesh.planner.cost.estimate import StepEstimate
from seqmesh.planner.cost.floor import FloorModel
from seqmesh.planner.cost.ring_load import ZIGZAG_ROWS
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.errors import HEADROOM, TIE
from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.legality import violations
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.point import AXES, OFFLOAD, TILING, Point
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.inputs.stack import FusedStack, stack_named
from seqmesh.planner.longest import longest
from seqmesh.planner.reasons import why_not
from seqmesh.planner.remedies import shortfall
from seqmesh.planner.search import Search, preference, search
from seqmesh.planner.sensitivity import sensitivities

pytestmark = pytest.mark.fast


SMALL = ModelShape(
    name="small", layers=6, hidden=768, heads=12, kv_heads=6, head_dim=64, intermediate=2048, vocabulary=32000
)


def job(
    model: ModelShape = SMALL,
    *,
    nodes: int = 1,
    each: int = 4,
    seq_len: int = 24576,
    batch: int = 4,
    limit: int | None = None,
) -> Job:
    cluster = Cluster(gpu=load_gpu("a800-sxm"), nodes=nodes, gpus_per_node=each)
    return Job(
        model=model,
        cluster=cluster,
        seq_len=seq_len,
        global_batch=batch,
        memory_limit=limit,
        stack=FusedStack(),
    )


def brute_force(costs: CostModel, pins: Pins) -> list[StepEstimate]:
    """Every legal point that fits, priced one by one, the fastest first."""
    gpus = costs.job.cluster.gpus
    degrees = ("tp", "ulysses", "ring", "dp", "pp")
    knobs = ("zero", "checkpointing", "offload", "tiling", "micro_batch")
    values = (range(4), FusedStack.savers["checkpointing"], OFFLOAD, TILING, divisors(costs.job.global_batch))
    found = []
    for mesh in product(divisors(gpus), repeat=5):
        if prod(mesh) != gpus:
            continue
        for chosen in product(*values):
            named = zip((*degrees, *knobs), (*mesh, *chosen), strict=True)
            point = Point(**dict(named))
            pinned = all(getattr(point, key) == value for key, value in pins.items())
            if pinned and not any(violations(costs.job, point)) and costs.memory.of(point).fits(costs.job):
                found.append(costs.estimate(point))
    return sorted(found, key=lambda estimate: estimate.seconds)


@pytest.mark.parametrize("limit", [80 << 30, 6 << 30, 3 << 30, 2 << 30], ids=lambda n: f"{n >> 30} GiB")
@pytest.mark.parametrize(
    "pins", [{}, {"tp": 2}, {"zero": 0}, {"checkpointing": "full"}, {"micro_batch": 2, "ring": 2}], ids=str
)
def test_the_search_finds_what_brute_force_finds(limit: int, pins: Pins) -> None:
    costs = CostModel(job(limit=limit))
    expected = brute_force(costs, pins)
    found = search(costs, pins, top=3)
    assert bool(found.best) == bool(expected)
    if expected:
        assert found.best[0].seconds == pytest.approx(expected[0].seconds, rel=1e-9)
        times: dict[Mesh, float] = {}  # of the best point of every mesh, the fastest first
        for estimate in expected:
            times.setdefault(mesh_of(estimate.point), estimate.seconds)
        best_three = list(times.values())[:3]
        assert [estimate.seconds for estimate in found.best] == pytest.approx(best_three, rel=1e-9)
        # The answer is the preferred of all that tie with the fastest, whatever they save.
        ties = [one for one in expected if one.seconds <= (1 + TIE) * expected[0].seconds]
        least = min(preference(costs.job, one) for one in ties)
        assert preference(costs.job, found.tied[0]) == pytest.approx(least)
        assert {mesh_of(one.point) for one in found.tied} == {mesh_of(one.point) for one in ties}
    else:
        assert found.infeasible
        assert all(not estimate.fits for estimate in found.infeasible)


def test_six_gpus_and_odd_lengths_are_planned_too() -> None:
    found = search(CostModel(job(each=6, seq_len=10_007, batch=1)), {})
    assert found.best
    assert {estimate.point.gpus for estimate in found.best} == {6}
    # 10,007 is a prime: TP's sequence parallelism cannot divide it.
    assert {estimate.point.tp for estimate in found.best} == {1}


@pytest.mark.parametrize("gpu", ["h100-sxm", "b200", "l20"])
@pytest.mark.parametrize(("nodes", "each"), [(8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("seq_len", [4096, 32768])
def test_the_estimate_lies_between_its_bounds_on_every_mesh(
    gpu: str, nodes: int, each: int, seq_len: int
) -> None:
    cluster = Cluster(gpu=load_gpu(gpu), nodes=nodes, gpus_per_node=each)
    assumed = Assumptions(tp_exposed=0.1, gradient_overlap=0.9, prefetch=1.0)
    for assumptions in (Assumptions(), assumed):
        asked = Job(
            model=load_model("llama3-8b"),
            cluster=cluster,
            seq_len=seq_len,
            global_batch=4,
            assumptions=assumptions,
        )
        costs = CostModel(asked)
        for point in meshes(costs.job, {}):
            if not any(violations(costs.job, point)):
                estimate = costs.estimate(point)
                assert estimate.lower * (1 - 1e-12) <= estimate.seconds <= estimate.upper * (1 + 1e-12)


def test_every_point_found_is_legal_and_within_memory() -> None:
    costs = CostModel(job(load_model("llama3-8b"), nodes=8, each=8, seq_len=131072, batch=32))
    for estimate in search(costs, {}, top=20).best:
        assert not list(violations(costs.job, estimate.point))
        assert estimate.memory.total == sum(estimate.memory.categories.values()) <= costs.job.capacity
        assert estimate.lower <= estimate.seconds <= estimate.upper


@pytest.mark.parametrize(
    ("pins", "rule"),
    [
        ({"tp": 3}, "= 3 ranks on 4 GPUs"),
        ({"tp": 4}, "does not divide 12 query heads and 6 K/V heads"),
        ({"dp": 4, "micro_batch": 2}, "does not divide global_batch=4"),
        ({"offload": "activations", "checkpointing": "none"}, "checkpointing=none makes none"),
        ({"zero": 3, "tp": 2, "pp": 2}, "nothing to shard over"),
        ({"tp": 2, "ulysses": 1, "ring": 1, "dp": 1, "pp": 1}, "= 2 ranks on 4 GPUs"),
        ({"zero": 0, "offload": "optimizer", "ulysses": 2}, "zero >= 1"),
    ],
    ids=str,
)
def test_pins_that_contradict_each_other_name_the_rule(pins: Pins, rule: str) -> None:
    with pytest.raises(ValueError, match=r"no legal mesh with") as error:
        search(CostModel(job()), pins)
    assert rule in str(error.value)
    assert "\n" not in str(error.value)


def test_the_longest_sequence_fits_and_a_longer_one_does_not() -> None:
    one = job(load_model("llama3-8b"), each=8, batch=1)
    length = longest(CostModel(one), {})
    fits, longer = replace(one, seq_len=length), replace(one, seq_len=length + length // 64)
    assert search(CostModel(fits), {}, top=1).best
    assert not search(CostModel(longer), {}, top=1).best
    assert longest(CostModel(one), {"checkpointing": "none"}) < length
    assert longest(CostModel(job(load_model("llama3-405b"), each=8, batch=1)), {}) == 0


def test_an_infeasible_point_names_its_shortfall_and_what_would_fit() -> None:
    costs = CostModel(job(load_model("llama2-7b"), each=8, seq_len=65536, batch=1))
    point = Point(ulysses=8, zero=1)
    estimate = costs.estimate(point)
    assert not estimate.fits
    said = shortfall(costs, estimate, asdict(point))
    # The cheapest: tiling the loss is not enough, the rest takes longer.
    assert "3.75 GB too much; zero=2 would make it fit" in said
    pins = {"zero": 1, "tp": 1, "tiling": "none", "checkpointing": "none", "ring": 1, "pp": 1}
    assert "too much; tp=2 would make it fit" in shortfall(costs, estimate, pins)


def test_reasons_compare_with_other_points_and_assumptions() -> None:
    costs = CostModel(job(load_model("llama3-8b"), nodes=2, each=8, seq_len=65536, batch=1))
    best = search(costs, {}).best
    assert "slower" in why_not(best[0], best[1])
    found = {one.name: one for one in sensitivities(costs, best, {})}
    assert next(iter(found)) == "attention_backward"  # most of the time of a long causal sequence
    lower_rate, higher_rate = found["attention_backward"].trials
    assert lower_rate.change > 0 > higher_rate.change
    assert found["gradient_overlap"].trials[0].change < 0


def test_an_assumption_that_changes_the_winner_is_found() -> None:
    """At 208K with whole logits the best leaves 1 GB: with three times the overhead another one wins."""
    costs = CostModel(job(load_model("llama3-8b"), nodes=2, each=8, seq_len=208 * 1024, batch=1))
    pins = {"tiling": "none"}
    found = sensitivities(costs, search(costs, pins).best, pins)
    (overhead,) = (one for one in found if one.name == "overhead")
    (trial,) = overhead.trials
    other = costs.with_assumption("overhead", trial.value)
    assert trial.winner == search(other, pins).best[0].point


def test_attention_runs_faster_on_longer_blocks_and_wider_heads() -> None:
    a = Assumptions()
    assert [round(head_rate(d, a), 3) for d in (32, 64, 96, 128, 256)] == [0.4, 0.8, 0.9, 1.0, 1.0]
    kernels = []
    for ring in (1, 2, 4, 8):  # the same pairs in smaller blocks
        one = job(load_model("llama3-8b"), each=8, seq_len=8192, batch=1)
        kernels.append(ring * CostModel(one).attention(Point(ring=ring, dp=8 // ring)).forward.kernel_s)
    assert kernels == sorted(kernels)


def test_faster_links_inside_is_no_slower_than_the_reverse_order() -> None:
    """Best practice 7."""
    one = job(load_model("llama3-8b"), nodes=2, each=8, seq_len=65536, batch=1)
    for point in (Point(ulysses=8, ring=2), Point(ulysses=4, ring=4), Point(tp=4, ulysses=2, ring=2)):
        costs = CostModel(one)
        assert costs.seconds(point) <= costs.with_axes(tuple(reversed(AXES))).seconds(point) * (1 + 1e-9)


def test_auto_is_zigzag_for_long_causal_shares_as_the_planner_takes_it_to_be() -> None:
    for ring in (2, 3, 5, 8, 64, 256):
        for s in (ZIGZAG_ROWS * ring, 10_000 * ring + 3):
            assert layouts.auto(masks.causal(s), ring).name == "zigzag"


@pytest.mark.parametrize("batch", [4, 60])
@pytest.mark.parametrize(("nodes", "each"), [(2, 8), (1, 6)])
def test_no_point_of_a_mesh_is_faster_than_its_floor(nodes: int, each: int, batch: int) -> None:
    for model in (SMALL, load_model("llama3-8b")):
        costs = CostModel(job(model, nodes=nodes, each=each, seq_len=12288, batch=batch))
        floors = FloorModel(costs)
        for mesh in bare_meshes(costs.job, {}):
            zero_stages, batches = zero_stages_of(costs.job, mesh, {}), micro_batches_of(costs.job, mesh, {})
            floor = floors.floor(mesh, zero_stages, batches)
            for point in variants(costs.job, mesh, {}):
                if not any(violations(costs.job, point)):
                    assert floor <= costs.seconds(point) * (1 + 1e-12), point


@pytest.mark.parametrize(
    "accept",
    [lambda p: p.tp > 1, lambda p: p.ring == 1, lambda p: p.zero <= 1, lambda p: p.tiling == "none"],
    ids=["tp", "no ring", "zero 1", "no tiles"],
)
@pytest.mark.parametrize("limit", [80 << 30, 3 << 30], ids=lambda n: f"{n >> 30} GiB")
def test_the_best_of_a_kind_is_that_of_brute_force(accept: Callable[[Point], bool], limit: int) -> None:
    """What reasons say of rivals: so none contradicts a line of the table."""
    costs = CostModel(job(limit=limit))
    expected = [one for one in brute_force(costs, {}) if accept(one.point)]
    found = Search(costs, {}).best_where(accept)
    assert (found is None) == (not expected)
    if found is not None:
        assert found.seconds == pytest.approx(expected[0].seconds, rel=1e-9)


def test_the_answer_keeps_room() -> None:
    """At 240K the fastest leaves less than 5%; another mesh, with MLPs in tiles, takes 0.7% longer."""
    costs = CostModel(job(load_model("llama3-8b"), nodes=2, each=8, seq_len=240 * 1024, batch=1))
    found = search(costs, {}, top=5)
    best, fastest = found.tied[0], found.best[0]
    assert best.memory.total <= (1 - HEADROOM) * costs.job.capacity < fastest.memory.total
    assert fastest.seconds < best.seconds <= (1 + TIE) * fastest.seconds


def test_the_answer_says_what_ties_with_it() -> None:
    costs = CostModel(job(load_model("llama3-8b"), nodes=2, each=8, seq_len=208 * 1024, batch=1))
    found = search(costs, {}, top=5)
    best = found.tied[0]
    assert (best.point.tp, best.point.ulysses, best.point.ring, best.point.zero) == (4, 2, 2, 2)
    lines = answer(costs, found)
    assert len(lines) == 5
    assert lines[0].startswith(
        "Run tp4 u2 r2, zero 2, loss in tiles: add --emit plan.toml, then seqmesh train"
    )
    assert "(± 9%)" in lines[1]
    assert "(± 6%)" in lines[1]
    assert lines[2].startswith("Ties, within 3%, too close to tell: u8 r2 (-2.9%), u4 r4 (-")
    assert "attention backward: with 0.416 in place of 0.52" in lines[3]
    assert lines[4].startswith("Try first: seqmesh train plan.toml --steps 5; then u8 r2")


def test_an_answer_starts_the_program_that_it_was_priced_for() -> None:
    asked = job(load_model("llama3-8b"), nodes=1, each=8, seq_len=8192, batch=16)
    for stack, added, started in (
        (
            "megatron",
            "add --emit plan.sh --emit-for megatron, then sh plan.sh on 8 GPUs",
            "sh my.sh on 8 GPUs",
        ),
        ("fsdp2", "add --emit plan.sh --emit-for torchtitan, then sh plan.sh", "sh my.sh on 8 GPUs"),
        (
            "seqmesh",
            "add --emit plan.toml, then seqmesh train plan.toml on 8",
            "seqmesh train my.sh on 8 GPUs",
        ),
    ):
        costs = CostModel(replace(asked, stack=stack_named(stack)))
        found = search(costs, {}, top=2)
        assert added in answer(costs, found)[0]
        assert answer(costs, found, "my.sh")[0].endswith(f": {started}.")
        assert ("seqmesh train" in answer(costs, found)[4]) == (stack == "seqmesh")


def test_nothing_wins_within_the_models_error() -> None:
    costs = CostModel(job(load_model("llama3-8b"), nodes=2, each=8, seq_len=208 * 1024, batch=1))
    found = search(costs, {}, top=8)
    alone = replace(found, tied=found.tied[:1])
    near = replace(alone, best=(found.tied[0], found.best[3]))
    assert "It wins" not in answer(costs, near)[2]
    slow = [one for one in search(costs, {}, top=30).best if one.seconds > 1.2 * found.tied[0].seconds]
    assert "It wins: the next" in answer(costs, replace(alone, best=(found.tied[0], slow[0])))[2]
    assert "no other mesh fits" in answer(costs, replace(alone, best=found.tied[:1]))[2]


def test_most_meshes_of_many_gpus_are_left_out_by_their_floor() -> None:
    """What they would take is never computed."""
    costs = CostModel(job(load_model("llama3-8b"), nodes=512, each=8, seq_len=8192, batch=4096))
    searched = Search(costs, {})
    found = searched.found(12)
    expanded = searched._bounds.cache_info().misses
    assert expanded < found.meshes / 2


@pytest.mark.parametrize("batch", [720, 5040])
def test_of_very_many_micro_batches_some_are_tried_and_little_is_lost(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = CostModel(job(load_model("llama3-8b"), nodes=2, each=8, seq_len=8192, batch=batch))
    tried = candidates.micro_batches_of(costs.job, Point(dp=1, tp=16), {})
    assert (tried[0], tried[-1]) == (1, batch)
    assert all(after >= 1.5 * before for before, after in pairwise(tried[:-1]))
    some = search(costs, {}).best[0].seconds
    monkeypatch.setattr(candidates, "_apart", lambda sizes: sizes)
    assert candidates.micro_batches_of(costs.job, Point(dp=1, tp=16), {}) == tuple(divisors(batch))
    assert some <= 1.01 * search(CostModel(costs.job), {}).best[0].seconds


def test_a_few_micro_batches_are_all_tried() -> None:
    costs = CostModel(job(load_model("llama3-8b"), nodes=2, each=8, seq_len=8192, batch=120))
    assert len(divisors(120)) == candidates.MANY_SIZES
    assert candidates.micro_batches_of(costs.job, Point(dp=1, tp=16), {}) == tuple(divisors(120))
