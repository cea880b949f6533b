"""Packed documents of several sequences, dealt or in one pool, priced as real schedules and steps are."""

from dataclasses import replace
from itertools import accumulate, product
from pathlib import Path

import pytest
from meshes import mesh_of
from ranks import Ranks

from seqmesh import layouts, masks
from seqmesh.layouts import load
from seqmesh.planner.candidates import Pins, meshes
from seqmesh.planner.candidates import mesh_of as degrees_of
from seqmesh.planner.cost.dealing import dealt_step, spread
from seqmesh.planner.cost.estimate import StepEstimate
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.documents import MOST_DOCUMENTS, parse_documents
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.legality import is_legal, violations
from seqmesh.planner.inputs.numerics import FP32
from seqmesh.planner.inputs.of_recipe import of_recipe
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.inputs.stack import TrainerStack
from seqmesh.planner.output.emit import emit
from seqmesh.planner.search import search
from seqmesh.schedule.ring import ring_schedule
from seqmesh.trace.of_rank import trace_rank
from seqmesh.train.config import Config, DataConfig, MeshConfig, TrainConfig
from seqmesh.train.data import Corpus, lengths_of, sequences
from seqmesh.train.evening import deal
from seqmesh.train.memory.peak import traced_like
from seqmesh.train.memory.rank import TrainedRank
from seqmesh.train.recipe import load as load_recipe
from seqmesh.train.setup import dims_of
from seqmesh.train.trainer import Trainer

SMALL = ModelShape(
    name="small", layers=4, hidden=512, heads=8, kv_heads=4, head_dim=64, intermediate=1024, vocabulary=4000
)


def job(*, gpus: int = 8, seq_len: int = 8192, batch: int = 8, seed: int = 1) -> Job:
    """Log-normal documents, a few longer than most sequences' share of a rank."""
    return Job(
        model=SMALL,
        cluster=Cluster(gpu=load_gpu("h100-sxm"), nodes=1, gpus_per_node=gpus),
        seq_len=seq_len,
        global_batch=batch,
        documents=parse_documents("lognormal:6,1.5", seq_len, sequences=batch, seed=seed),
    )


POOL = Point(ring=8, zero=1, micro_batch=8, pool=True)


def pairs_of(documents: tuple[int, ...]) -> int:
    return sum(length * (length + 1) // 2 for length in documents)


def test_a_document_that_a_sequence_ends_in_goes_on_as_one_of_the_next() -> None:
    one = replace(job(seq_len=100, batch=3), documents=(30, 150, 20, 100))
    assert one.sequences == ((30, 70), (80, 20), (100,))
    assert one.sequence_areas == tuple(map(pairs_of, one.sequences))
    assert one.area == sum(one.sequence_areas)
    assert one.all_pairs == 30**2 + 70**2 + 80**2 + 20**2 + 100**2
    assert one.mask_of(one.sequences[0], one.reaches[0]) == masks.documents((30, 70))


@pytest.mark.parametrize("seed", range(3))
def test_documents_of_a_step_are_cut_into_full_sequences(seed: int) -> None:
    one = job(seed=seed)
    assert len(one.sequences) == 8
    assert all(sum(documents) == 8192 for documents in one.sequences)
    assert {*accumulate(one.documents)} <= {*accumulate(n for part in one.sequences for n in part)}
    # The first sequence does not depend on how many there are.
    assert one.sequences[0] == job(seed=seed, batch=1).sequences[0]


@pytest.mark.parametrize("evened", [True, False])
@pytest.mark.parametrize(("dp", "micro_batch"), [(1, 1), (2, 1), (2, 2), (4, 2), (8, 1), (4, 1)])
@pytest.mark.parametrize("zero", [1, 3])
def test_a_step_waits_for_the_rows_that_the_trainer_deals(
    evened: bool, dp: int, micro_batch: int, zero: int
) -> None:
    one = replace(job(), evened=evened)
    point = Point(dp=dp, ulysses=8 // dp, micro_batch=micro_batch, zero=zero)
    found = dealt_step(one, point)
    count = 8 // dp // micro_batch
    if evened:
        dealt = deal([pairs_of(documents) for documents in one.sequences], dp, count)
    else:  # sequence after sequence, one micro-batch of a group after another group's
        size = micro_batch
        firsts = [[(turn * dp + rank) * size for turn in range(count)] for rank in range(dp)]
        dealt = [[tuple(range(first, first + size)) for first in row] for row in firsts]
    loads = [[sum(pairs_of(one.sequences[n]) for n in row) for row in rank] for rank in dealt]
    at_once = sum(max(rank[turn] for rank in loads) for turn in range(count))
    waited = at_once if zero == 3 else max(map(sum, loads))
    assert found.waited * found.areas[0] == pytest.approx(waited)
    assert sorted(found.areas) == sorted(area for rank in loads for area in rank)
    assert list(found.areas) == [pairs_of(row) for row in found.rows]
    # Priced: on one ring rank all pairs of the group that all wait for are computed.
    stages = CostModel(one).load(point).stages
    assert count * sum(stage.count * stage.pairs for stage in stages) == pytest.approx(waited, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_a_pools_pairs_and_rows_are_those_of_its_real_schedule(seed: int) -> None:
    one = job(seed=seed)
    documents = tuple(length for n in dealt_order(one) for length in one.sequences[n])
    mask = masks.documents(documents)
    laid = layouts.balanced(mask, 8)
    schedules = [ring_schedule(mask, laid, laid, rank) for rank in range(8)]
    priced = CostModel(one).load(POOL)
    pairs = sum(stage.count * stage.pairs for stage in priced.stages)
    assert priced.layout.ranks == laid.ranks
    assert pairs in {schedule.area for schedule in schedules}
    assert pairs >= 0.99 * max(schedule.area for schedule in schedules)
    assert priced.imbalance == pytest.approx(max(s.area for s in schedules) * 8 / mask.area)
    assert priced.rows_moved == sum(schedule.rows_received for schedule in schedules)
    # Of the rows that eight groups of one ring rank each hold, all travel that another rank's queries need.
    assert 0 < priced.rows_moved < 7 * mask.q_len


def dealt_order(one: Job) -> tuple[int, ...]:
    """Numbers of the sequences in the row of the one group's one micro-batch."""
    return deal(one.sequence_areas, 1, 1)[0][0]


def test_bytes_of_several_rows_are_those_of_all_of_them() -> None:
    one = job()
    point = Point(ring=4, dp=2, micro_batch=2)
    costs = CostModel(one)
    moved = []
    for row in dealt_step(one, point).rows:
        mask = masks.documents(row)
        moved.append(sum(load.rows_received(mask, layouts.auto(mask, 4))))
    assert len(moved) == 4
    assert len(set(moved)) > 1
    assert costs.loads.rows_moved(costs.loads.keys(point)[0].key) == sum(moved) / 4
    # K and V twice in both passes, and their gradients: 2 + 4 rows of g x d numbers of 2 bytes.
    rows = sum(moved) / 4 * 2  # micro-batches of a group
    gradients = costs.estimate(point.but(ring=1, dp=8, micro_batch=1)).bytes_per_step
    ring = sum(costs.estimate(point).bytes_per_step.values()) - sum(gradients.values())
    assert ring == pytest.approx(SMALL.layers * 6 * rows * 4 * 64 * 2 / 4, rel=1e-6)


def test_at_most_so_many_rows_are_measured_from_the_heaviest_to_the_lightest() -> None:
    rows = [(n,) for n in range(100, 0, -1)]
    assert spread(rows, 200) == rows
    assert spread(rows, 4) == [(100,), (67,), (34,), (1,)]


CORPUS = Corpus(
    source="test", documents=tuple(bytes(range(1, 250)) * times for times in (1, 3, 2, 1, 4, 2, 5, 1))
)
TRAINED = Config(data=DataConfig(seq_len=600, sequences=6))


def trained(mesh: MeshConfig, micro_batch: int) -> int:
    """Attention bytes of one step of `seqmesh train`, all ranks, as its ranks counted them."""
    config = replace(TRAINED, mesh=mesh, train=TrainConfig(micro_batch=micro_batch))
    return Trainer(config, CORPUS, mesh_of(dims_of(mesh)), peak_flops_per_s=1.0).step().bytes_sent


@pytest.mark.parametrize(
    ("mesh", "micro_batch", "point"),
    [
        (MeshConfig(dp_shard=2, ring=2, ulysses=1, pool=True), 6, Point(ring=4, micro_batch=6, pool=True)),
        (MeshConfig(dp_shard=2, ring=1, ulysses=2, pool=True), 3, None),
        (MeshConfig(dp_shard=2, ring=2, ulysses=1), 1, Point(ring=2, dp=2, micro_batch=1)),
        (MeshConfig(dp_shard=2, ring=2, ulysses=1), 3, Point(ring=2, dp=2, micro_batch=3)),
    ],
    ids=["one pool", "a pool of two rows, with ulysses", "groups", "groups of three sequences in a row"],
)
def test_predicted_bytes_equal_those_of_a_real_training_step(
    ranks: Ranks, mesh: MeshConfig, micro_batch: int, point: Point | None
) -> None:
    point = point or Point(ulysses=2, ring=2, micro_batch=3, pool=True)
    m = TRAINED.model
    shape = replace(
        SMALL,
        layers=m.layers,
        hidden=m.hidden,
        heads=m.heads,
        kv_heads=m.kv_heads,
        head_dim=m.elements_of_head,
    )
    step = sequences(CORPUS, seq_len=600, seed=TRAINED.train.seed)
    documents = tuple(length for _ in range(6) for length in lengths_of(next(step)))
    asked = Job(
        model=shape,
        cluster=Cluster(gpu=load_gpu("h100-sxm"), nodes=1, gpus_per_node=4),
        seq_len=600,
        global_batch=6,
        documents=documents,
        numerics=FP32,
        stack=TrainerStack(),
    )
    costs = CostModel(asked)
    cost = costs.attention(point)
    heads = cost.forward.heads_bytes + cost.backward.heads_bytes
    rows = cost.forward.rows_bytes + cost.backward.rows_bytes
    assert rows > 0
    rows_of_all = rows * costs.loads.rows_moved(costs.loads.keys(point)[0].key) / costs.load(point).rows_moved
    runs = m.layers * (6 // micro_batch)  # of all groups together
    assert runs * (heads + rows_of_all) == pytest.approx(ranks.run(4, trained, mesh, micro_batch)[0])


def test_a_pools_memory_is_that_of_the_traced_step() -> None:
    shape = replace(SMALL, intermediate=1792, vocabulary=2000)
    rank = TrainedRank(shape=shape, point=POOL.but(zero=0), seq_len=4096)
    traced = trace_rank(rank, [1500, 1000, 1000, 596])
    # A row of documents is balanced, so its first rank needs fewer rows than a causal one: priced is more.
    assert traced.peak_bytes == pytest.approx(traced_like(rank)["total"], rel=0.02)


def brute_force(costs: CostModel, pins: Pins) -> list[StepEstimate]:
    """Every legal point without savers that fits, priced one by one, the fastest first."""
    found = []
    for mesh in meshes(costs.job, {}):
        orders = [{}, {"pipeline": "interleaved", "virtual": 2}]
        for pool, order in product((False, True), orders):
            point = mesh.but(pool=pool, **order)
            pinned = all(getattr(point, key) == value for key, value in pins.items())
            if pinned and is_legal(costs.job, point) and costs.memory.of(point).fits(costs.job):
                found.append(costs.estimate(point))
    return sorted(found, key=lambda estimate: estimate.seconds)


@pytest.mark.parametrize("pins", [{}, {"pool": True}, {"pool": False}, {"pool": True, "ulysses": 2}], ids=str)
def test_a_pool_is_a_candidate_beside_groups_and_can_be_pinned(pins: Pins) -> None:
    costs = CostModel(job())
    expected = brute_force(costs, pins)
    found = search(costs, pins, top=4).best
    assert found[0].seconds == pytest.approx(expected[0].seconds, rel=1e-9)
    times = {}
    for estimate in expected:
        times.setdefault(degrees_of(estimate.point), estimate.seconds)
    assert [estimate.seconds for estimate in found] == pytest.approx(list(times.values())[:4], rel=1e-9)
    pools = {estimate.point.pool for estimate in found}
    assert pools <= ({pins["pool"]} if "pool" in pins else {True, False})


def test_a_pool_is_faster_than_groups_where_one_sequence_is_much_heavier() -> None:
    """One document as long as a sequence, short ones else: eight groups wait for it, a pool shares it."""
    long = (65536,) + (1024,) * 448
    one = replace(job(seq_len=65536), documents=long)
    costs = CostModel(one)
    groups = Point(dp=8)
    assert costs.estimate(groups).imbalance > 3
    assert costs.estimate(POOL).imbalance < 1.02
    assert costs.seconds(POOL) < costs.seconds(groups) / 1.4
    in_turn = CostModel(replace(one, evened=False))
    assert in_turn.seconds(groups) == pytest.approx(costs.seconds(groups))  # one sequence each: as it comes


@pytest.mark.parametrize(
    ("point", "rule"),
    [
        (POOL.but(dp=8, ring=1, micro_batch=1), "use dp=1,ring=8"),
        (POOL.but(micro_batch=1), "use micro_batch >= 2"),
        (POOL.but(ring=1, ulysses=8), "use ring >= 2"),
        (POOL.but(pool=False), "use pool=true, or micro_batch=1"),
    ],
    ids=str,
)
def test_a_word_that_contradicts_the_degrees_is_refused(point: Point, rule: str) -> None:
    (said,) = violations(job(), point)
    assert said.endswith(rule) or rule in said


def test_a_pool_needs_documents_and_a_layout_that_balances() -> None:
    (said,) = violations(replace(job(), documents=()), POOL)
    assert "add --documents" in said
    (said,) = violations(replace(job(), layout="zigzag"), POOL)
    assert "layout=zigzag" in said
    assert is_legal(replace(job(), layout="zigzag"), POOL.but(pool=False))
    with pytest.raises(ValueError, match=r"no legal mesh with .*pool=true: .*use dp=1,ring=8"):
        search(CostModel(job()), {"dp": 8, "ring": 1, "pool": True})


def test_more_documents_in_a_row_than_can_be_laid_out_are_refused() -> None:
    many = replace(job(seq_len=MOST_DOCUMENTS, batch=8), documents=(2,) * (4 * MOST_DOCUMENTS))
    assert any("80000 documents in a row" in said for said in violations(many, POOL))
    assert is_legal(many, Point(dp=8, zero=1))


def test_an_emitted_pool_is_read_by_the_trainer_and_back_by_the_planner(tmp_path: Path) -> None:
    asked = job()
    text, missing = emit(asked, POOL.but(zero=2))
    (tmp_path / "recipe.toml").write_text(text)
    read = load_recipe(str(tmp_path / "recipe.toml"))
    assert read.mesh == MeshConfig(ring=8, ulysses=1, pool=True)
    assert read.mesh.placement == "balanced"
    assert (read.micro_batch, read.micro_batches) == (8, 1)
    assert not any("pool" in line for line in missing)
    back = of_recipe(read, asked.cluster, vocabulary=SMALL.vocabulary)
    assert back.point == POOL.but(zero=2, tiling="loss")
    assert is_legal(back.job, back.point)
    assert back.job.documents == (8192,) * 8  # its text is not read
    assert back.missing == ()


def test_a_recipes_groups_as_one_pool_are_one_ring() -> None:
    read = Config(
        mesh=MeshConfig(dp_shard=4, ring=2, ulysses=1, pool=True),
        data=DataConfig(seq_len=1024, sequences=8),
        train=TrainConfig(micro_batch=4),
    )
    cluster = Cluster(gpu=load_gpu("h100-sxm"), nodes=1, gpus_per_node=8)
    _, point, missing = of_recipe(read, cluster, vocabulary=1000)
    assert (point.dp, point.ring, point.micro_batch, point.pool) == (1, 8, 4, True)
    assert missing == ()
    copies = replace(read, mesh=replace(read.mesh, dp_replicate=2, dp_shard=2))
    _, point, missing = of_recipe(copies, cluster, vocabulary=1000)
    assert not point.pool
    assert any("mesh.pool with dp_replicate=2" in line for line in missing)
