"""The search against brute force, its pins, and the longest sequence."""

from dataclasses import asdict
from itertools import product

import pytest

from seqmesh import layouts, masks
from seqmesh.planner.cost.attention import head_rate
from seqmesh.planner.cost.estimate import Price
from seqmesh.planner.cost.ring_load import ZIGZAG_ROWS
from seqmesh.planner.cost.step import Pricer
from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import AXES, CHECKPOINTING, OFFLOAD, TILING, Job, Point, violations
from seqmesh.planner.inputs.models import ModelShape, load_model
from seqmesh.planner.longest import longest
from seqmesh.planner.reasons import rests_on, shortfall, why_not
from seqmesh.planner.search import Pins, divisors, mesh_of, meshes, search

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
    return Job(model=model, cluster=cluster, seq_len=seq_len, global_batch=batch, memory_limit=limit)


def brute_force(pricer: Pricer, pins: Pins) -> list[Price]:
    """Every legal point that fits, priced one by one, the fastest first."""
    gpus, found = pricer.job.cluster.gpus, []
    degrees = product(divisors(gpus), repeat=5)
    for tp, ulysses, ring, dp, pp in degrees:
        if tp * ulysses * ring * dp * pp != gpus:
            continue
        for knobs in product(range(4), CHECKPOINTING, OFFLOAD, TILING, divisors(pricer.job.global_batch)):
            zero, checkpointing, offload, tiling, micro_batch = knobs
            point = Point(
                tp=tp, ulysses=ulysses, ring=ring, dp=dp, pp=pp, zero=zero, checkpointing=checkpointing, offload=offload, tiling=tiling,
                micro_batch=micro_batch,
            )  # fmt: skip
            pinned = all(getattr(point, key) == value for key, value in pins.items())
            if pinned and not any(violations(pricer.job, point)) and pricer.memory.of(point).fits(pricer.job):
                found.append(pricer.price(point))
    return sorted(found, key=lambda price: price.seconds)


@pytest.mark.parametrize("limit", [80 << 30, 6 << 30, 3 << 30, 2 << 30], ids=lambda n: f"{n >> 30} GiB")
@pytest.mark.parametrize(
    "pins", [{}, {"tp": 2}, {"zero": 0}, {"checkpointing": "full"}, {"micro_batch": 2, "ring": 2}], ids=str
)
def test_the_search_finds_what_brute_force_finds(limit: int, pins: Pins) -> None:
    pricer = Pricer(job(limit=limit))
    expected = brute_force(pricer, pins)
    found = search(pricer, pins, top=3)
    assert bool(found.best) == bool(expected)
    if expected:
        assert found.best[0].seconds == pytest.approx(expected[0].seconds, rel=1e-9)
        meshes = list(dict.fromkeys(mesh_of(price.point) for price in expected))
        times = {mesh: min(p.seconds for p in expected if mesh_of(p.point) == mesh) for mesh in meshes[:3]}
        assert [price.seconds for price in found.best] == pytest.approx(sorted(times.values()), rel=1e-9)
    else:
        assert found.misfits
        assert all(not price.fits for price in found.misfits)


def test_six_gpus_and_odd_lengths_are_planned_too() -> None:
    found = search(Pricer(job(each=6, seq_len=10_007, batch=1)), {})
    assert found.best
    assert {price.point.gpus for price in found.best} == {6}
    assert all(
        price.point.tp == 1 for price in found.best
    )  # 10,007 is a prime: TP's sequence parallelism cannot divide it


@pytest.mark.parametrize("gpu", ["h100-sxm", "b200", "l20"])
@pytest.mark.parametrize(("nodes", "each"), [(8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("seq_len", [4096, 32768])
def test_the_estimate_lies_between_its_bounds_on_every_mesh(
    gpu: str, nodes: int, each: int, seq_len: int
) -> None:
    cluster = Cluster(gpu=load_gpu(gpu), nodes=nodes, gpus_per_node=each)
    assumed = Assumptions(tp_exposed=0.1, gradient_overlap=0.9, prefetch=1.0)
    for assumptions in (Assumptions(), assumed):
        pricer = Pricer(
            Job(
                model=load_model("llama3-8b"),
                cluster=cluster,
                seq_len=seq_len,
                global_batch=4,
                assumptions=assumptions,
            )
        )
        for point in meshes(pricer.job, {}):
            if not any(violations(pricer.job, point)):
                price = pricer.price(point)
                assert price.lower * (1 - 1e-12) <= price.seconds <= price.upper * (1 + 1e-12)


def test_every_point_found_is_legal_and_within_memory() -> None:
    pricer = Pricer(job(load_model("llama3-8b"), nodes=8, each=8, seq_len=131072, batch=32))
    for price in search(pricer, {}, top=20).best:
        assert not list(violations(pricer.job, price.point))
        assert price.memory.total == sum(price.memory.categories.values()) <= pricer.job.capacity
        assert price.lower <= price.seconds <= price.upper


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
        search(Pricer(job()), pins)
    assert rule in str(error.value)
    assert "\n" not in str(error.value)


def test_the_longest_sequence_fits_and_a_longer_one_does_not() -> None:
    one = job(load_model("llama3-8b"), each=8, batch=1)
    length = longest(Pricer(one), {})
    assert search(Pricer(job(load_model("llama3-8b"), each=8, batch=1, seq_len=length)), {}, top=1).best
    assert not search(
        Pricer(job(load_model("llama3-8b"), each=8, batch=1, seq_len=length + length // 64)), {}, top=1
    ).best
    assert longest(Pricer(one), {"checkpointing": "none"}) < length
    assert longest(Pricer(job(load_model("llama3-405b"), each=8, batch=1)), {}) == 0


def test_a_misfit_names_its_shortfall_and_what_would_fit() -> None:
    pricer = Pricer(job(load_model("llama2-7b"), each=8, seq_len=65536, batch=1))
    point = Point(ulysses=8, zero=1)
    price = pricer.price(point)
    assert not price.fits
    said = shortfall(pricer, price, asdict(point))
    assert (
        "3.75 GB too much; zero=2 would make it fit" in said
    )  # the cheapest: tiling the loss is not enough, the rest takes longer
    assert "too much; tp=2 would make it fit" in shortfall(
        pricer, price, {"zero": 1, "tp": 1, "tiling": "none", "checkpointing": "none", "ring": 1, "pp": 1}
    )


def test_reasons_compare_with_other_points_and_assumptions() -> None:
    pricer = Pricer(job(load_model("llama3-8b"), nodes=2, each=8, seq_len=65536, batch=1))
    best = search(pricer, {}).best
    assert "slower" in why_not(best[0], best[1])
    rests = {one.name: one for one in rests_on(pricer, best, {})}
    assert next(iter(rests)) == "attention_backward"  # most of the time of a long causal sequence
    (_, slower, _), (_, faster, _) = rests["attention_backward"].cases
    assert slower > 0 > faster
    assert rests["gradient_overlap"].cases[0][1] < 0


def test_an_assumption_that_changes_the_winner_is_found() -> None:
    """At 208K the best point leaves 1 GB: with three times the overhead another one wins."""
    pricer = Pricer(job(load_model("llama3-8b"), nodes=2, each=8, seq_len=208 * 1024, batch=1))
    (overhead,) = (one for one in rests_on(pricer, search(pricer, {}).best, {}) if one.name == "overhead")
    ((value, _, winner),) = overhead.cases
    other = pricer.with_assumption("overhead", value)
    assert winner == search(other, {}).best[0].point


def test_attention_runs_faster_on_longer_blocks_and_wider_heads() -> None:
    a = Assumptions()
    assert [round(head_rate(d, a), 3) for d in (32, 64, 96, 128, 256)] == [0.4, 0.8, 0.9, 1.0, 1.0]
    kernels = []
    for ring in (1, 2, 4, 8):  # the same pairs in smaller blocks
        one = job(load_model("llama3-8b"), each=8, seq_len=8192, batch=1)
        kernels.append(ring * Pricer(one).attention(Point(ring=ring, dp=8 // ring)).forward.kernel)
    assert kernels == sorted(kernels)


def test_faster_links_inside_is_no_slower_than_the_reverse_order() -> None:
    """Best practice 7."""
    one = job(load_model("llama3-8b"), nodes=2, each=8, seq_len=65536, batch=1)
    for point in (Point(ulysses=8, ring=2), Point(ulysses=4, ring=4), Point(tp=4, ulysses=2, ring=2)):
        pricer = Pricer(one)
        assert pricer.seconds(point) <= pricer.with_axes(tuple(reversed(AXES))).seconds(point) * (1 + 1e-9)


def test_auto_is_zigzag_for_long_causal_shares_as_the_planner_takes_it_to_be() -> None:
    for ring in (2, 3, 5, 8, 64, 256):
        for s in (ZIGZAG_ROWS * ring, 10_000 * ring + 3):
            assert layouts.auto(masks.causal(s), ring).name == "zigzag"
