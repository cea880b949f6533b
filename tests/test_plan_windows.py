"""Windows in some layers: each kind of layers has its own mask and schedule, over the one layout of all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from meshes import mesh_of
from model_folders import save_config
from ranks import Ranks

from seqmesh.parallel.batch import _layout_for
from seqmesh.parallel.layer_kinds import KindMasks, LayerKinds
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.documents import parse_documents
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.numerics import FP32
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.output.stage_times import stage_times
from seqmesh.train.config import Config, DataConfig, MeshConfig, ModelConfig
from seqmesh.train.data import Corpus, sequences
from seqmesh.train.setup import dims_of
from seqmesh.train.trainer import Trainer

GEMMA = load_model("gemma3-27b")


def job(**more: Any) -> Job:
    cluster = Cluster(gpu=load_gpu("h100-sxm"), nodes=2, gpus_per_node=8)
    return Job(**({"model": GEMMA, "cluster": cluster, "seq_len": 65536} | more))


@pytest.mark.parametrize("point", [Point(ring=16), Point(ulysses=4, ring=4), Point(ulysses=16)], ids=str)
def test_attention_is_the_mean_of_what_its_kinds_of_layers_take_alone(point: Point) -> None:
    mixed = CostModel(job(layout="zigzag")).attention(point)
    full, window = (
        CostModel(job(layout="zigzag", model=replace(GEMMA, full_layers=0, sliding_window=size))).attention(
            point
        )
        for size in (None, 1024)
    )
    for one, of_full, of_window in (
        (mixed.forward, full.forward, window.forward),
        (mixed.backward, full.backward, window.backward),
    ):
        for name in vars(one):
            mean = (10 * getattr(of_full, name) + 52 * getattr(of_window, name)) / 62
            assert getattr(one, name) == pytest.approx(mean, rel=1e-12), name
    if point.ring > 1:
        assert window.forward.rows_bytes < full.forward.rows_bytes / 8


def test_a_window_as_long_as_the_sequence_is_none() -> None:
    short = job(seq_len=1024)
    assert [reach.layers for reach in short.reaches] == [62]
    plain = replace(GEMMA, sliding_window=None, full_layers=0)
    point = Point(ulysses=4, ring=4, zero=3)
    seconds = [CostModel(one).seconds(point) for one in (short, replace(short, model=plain))]
    assert seconds[0] == seconds[1]


@pytest.mark.parametrize("name", ["auto", "balanced", "zigzag"])
@pytest.mark.parametrize("documents", ["fixed:32K", "lognormal:7,1.3"])
def test_all_kinds_of_layers_have_the_layout_that_the_trainer_chooses(name: str, documents: str) -> None:
    lengths = parse_documents(documents, 32768)
    costs = CostModel(job(seq_len=32768, documents=lengths, layout=name))
    full, sliding = (costs.job.mask_of(lengths, reach) for reach in costs.job.reaches)
    kinds = LayerKinds(full=10, sliding=52, window=1024)
    chosen = _layout_for(KindMasks(full=full, sliding=sliding, chunked=None), kinds, 8, name)
    for key, _ in costs.loads.keys(Point(ulysses=2, ring=8)):
        assert costs.loads.of(key).layout == chosen


def test_the_stages_of_a_timeline_add_up_to_the_mean_call() -> None:
    costs, point = CostModel(job()), Point(ulysses=2, ring=8)
    attention, stages = costs.attention(point), stage_times(costs, point)
    for one, drawn in (
        (attention.forward, [stage.forward for stage in stages]),
        (attention.backward, [stage.backward for stage in stages]),
    ):
        assert sum(stage.kernel_s for stage in drawn) == pytest.approx(one.kernel_s, rel=1e-9)
        assert sum(stage.rows_s for stage in drawn) == pytest.approx(one.rows_s, rel=1e-9)
        assert sum(stage.rows_exposed_s for stage in drawn) == pytest.approx(one.rows_exposed_s, rel=1e-9)


CORPUS = Corpus(source="test", documents=tuple(bytes(range(1, 250)) * times for times in (1, 3, 2, 1, 4, 2)))


def trained(folder: str, ulysses: int, ring: int) -> int:
    """Attention bytes of one step of `seqmesh train`, all ranks, as its ranks counted them."""
    config = Config(
        mesh=MeshConfig(ulysses=ulysses, ring=ring),
        model=ModelConfig(folder=folder),
        data=DataConfig(seq_len=512),
    )
    return Trainer(config, CORPUS, mesh_of(dims_of(config.mesh)), peak_flops_per_s=1.0).step().bytes_sent


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 2), (1, 4)])
def test_predicted_bytes_equal_those_of_a_real_step_of_full_and_sliding_layers(
    ranks: Ranks, tmp_path: Path, ulysses: int, ring: int
) -> None:
    folder = save_config("gemma2", tmp_path)
    shape = load_model(folder)
    assert (shape.sliding_window, shape.full_layers, shape.layers) == (23, 2, 4)
    pieces = next(sequences(CORPUS, seq_len=512, seed=0))
    documents = tuple(piece.stop - piece.start for piece in pieces)
    cluster = Cluster(gpu=load_gpu("a800-sxm"), nodes=1, gpus_per_node=4)
    asked = Job(model=shape, cluster=cluster, seq_len=512, documents=documents, numerics=FP32)
    cost = CostModel(asked).attention(Point(ulysses=ulysses, ring=ring, zero=0))
    sent = sum(one.heads_bytes + one.rows_bytes for one in (cost.forward, cost.backward))
    assert shape.layers * sent == ranks.run(4, trained, folder, ulysses, ring)[0]
