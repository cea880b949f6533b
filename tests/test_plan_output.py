"""What a plan leaves behind: a recipe that the trainer reads, a timeline that adds up, a picture."""

import json
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.legality import violations
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.numerics import FP32, Numerics
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.stack import FusedStack
from seqmesh.planner.output import emit as emitted
from seqmesh.planner.output.emit import emit
from seqmesh.planner.output.plot import OTHER, label, parts, plot
from seqmesh.planner.output.stage_times import stage_times
from seqmesh.planner.output.timeline import MOST_EVENTS, timeline
from seqmesh.train.config import Config, MeshConfig, TrainConfig
from seqmesh.train.data import VOCAB_SIZE
from seqmesh.train.recipe import load

pytestmark = pytest.mark.fast


def job(
    model: str = "llama3-8b",
    gpu: str = "a800-sxm",
    nodes: int = 2,
    each: int = 8,
    seq_len: int = 65536,
    batch: int = 1,
) -> Job:
    cluster = Cluster(gpu=load_gpu(gpu), nodes=nodes, gpus_per_node=each)
    return Job(model=load_model(model), cluster=cluster, seq_len=seq_len, global_batch=batch)


POINT = Point(tp=2, ulysses=4, ring=2)


def read_back(asked: Job, point: Point, folder: Path) -> tuple[Config, list[str]]:
    """The recipe of a point as the trainer reads it, and what it says is missing."""
    text, missing = emit(asked, point)
    (folder / "recipe.toml").write_text(text)
    for line in missing:
        assert f"# - {line}\n" in text
    return load(str(folder / "recipe.toml")), missing


def subjects(missing: list[str]) -> list[str]:
    return [line.partition(":")[0] for line in missing]


ALWAYS = ["1 x 4 a800-sxm", "tokens", "rotary base"]
"""What is named of every plan for llama3-8b on such a machine."""


@pytest.mark.parametrize("model", ["llama2-7b", "llama3-8b", "qwen2.5-7b", "qwen3-8b"])
def test_the_trainer_reads_an_emitted_recipe(model: str, tmp_path: Path) -> None:
    asked = replace(job(model, seq_len=8192, batch=4), layout="zigzag")
    read, _ = read_back(asked, Point(ulysses=2, ring=2, dp=2, tp=2, zero=3, micro_batch=2), tmp_path)
    shape = load_model(model)
    assert read.mesh == MeshConfig(dp_shard=2, ring=2, ulysses=2, tp=2, layout="zigzag")
    assert read.mesh.world == 16
    sizes = (read.model.hidden, read.model.layers, read.model.intermediate)
    assert sizes == (shape.hidden, shape.layers, shape.intermediate)
    assert (read.model.heads, read.model.kv_heads) == (shape.heads, shape.kv_heads)
    assert read.model.tie_embeddings == shape.tied_embeddings
    assert read.model.vocabulary == shape.vocabulary
    assert read.run.device == "cuda"
    assert emitted.BYTE_TOKENS == VOCAB_SIZE
    assert (read.data.seq_len, read.data.sequences) == (8192, 4)
    assert read.model.rope_theta == load(None).model.rope_theta


def test_every_saver_of_a_point_is_in_its_recipe(tmp_path: Path) -> None:
    point = Point(ulysses=2, dp=2, zero=3, checkpointing="full", offload="both", tiling="mlp", micro_batch=2)
    read, missing = read_back(job(nodes=1, each=4, batch=4), point, tmp_path)
    assert read.train == replace(
        TrainConfig(),
        zero=3,
        checkpointing="full",
        offload="both",
        tiling="mlp",
        micro_batch=2,
        precision="bf16",
    )
    assert subjects(missing) == ["checkpointing=full", *ALWAYS]


def test_ranks_of_tp_share_norms_as_they_are_priced(tmp_path: Path) -> None:
    read, missing = read_back(job(nodes=1, each=4), Point(tp=2, ring=2, zero=2, tiling="loss"), tmp_path)
    assert read.train == replace(TrainConfig(), zero=2, shard_norms=True, micro_batch=1, precision="bf16")
    assert subjects(missing) == ALWAYS


@pytest.mark.parametrize(
    ("point", "named"),
    [
        (Point(ulysses=4, zero=1), "zero=1 in bf16"),
        (Point(ulysses=4, zero=1, offload="optimizer"), "zero=1 in bf16"),
        (Point(pp=2, ring=2, zero=2, micro_batch=4), "pp=2"),
        (Point(dp=2, ring=2, zero=2), "zero=2 with 2 micro-batches"),
        (Point(pp=2, ring=2, zero=3), "zero=3 with pp=2"),
    ],
    ids=str,
)
def test_what_the_trainer_refuses_is_left_out_and_named(point: Point, named: str, tmp_path: Path) -> None:
    asked = job(nodes=1, each=4, batch=4)
    assert not list(violations(asked, point))
    read, missing = read_back(asked, point, tmp_path)
    assert named in subjects(missing)
    assert read.mesh.pp == (1 if named == "pp=2" else point.pp)
    assert read.train.precision == "bf16"
    assert read.train.zero == max(2, point.zero)
    assert read.train.offload == point.offload


def test_states_stay_on_the_device_where_the_trainer_does_not_shard_them(tmp_path: Path) -> None:
    asked = replace(job(nodes=1, each=4, batch=4), numerics=FP32)
    read, missing = read_back(asked, Point(ulysses=4, zero=1, offload="optimizer"), tmp_path)
    assert "offload=optimizer with zero=1" in subjects(missing)
    assert (read.train.zero, read.train.offload, read.train.precision) == (1, "none", "fp32")


@pytest.mark.parametrize(
    ("more", "pipeline", "named"),
    [
        ({}, "1f1b", None),
        ({"pipeline": "interleaved", "virtual": 2}, "interleaved", None),
        ({"pipeline": "interleaved", "virtual": 4}, "interleaved", "virtual=4"),
        ({"pipeline": "zero-bubble"}, "zero-bubble", "pipeline=zero-bubble"),
        ({"pipeline": "zero-bubble", "zero": 3}, "1f1b", "pipeline=zero-bubble"),
        ({"pipeline": "zero-bubble", "checkpointing": "full"}, "1f1b", "pipeline=zero-bubble"),
        ({"pipeline": "zero-bubble", "micro_batch": 4}, "1f1b", "pipeline=zero-bubble"),
        ({"pipeline": "zero-bubble", "pp": 32, "ulysses": 1}, "1f1b", "pipeline=zero-bubble with 32 layers"),
        ({"pipeline": "zero-bubble", "micro_batch": 12}, "1f1b", "pipeline=zero-bubble"),
    ],
    ids=str,
)
def test_the_order_of_a_pipeline_is_the_plans_where_the_trainer_has_it(
    more: dict[str, Any], pipeline: str, named: str | None, tmp_path: Path
) -> None:
    point = Point(pp=2, ulysses=2, zero=2).but(**more)
    asked = job(nodes=1, each=point.pp * point.ulysses, batch=96 if point.pp == 32 else 12)
    read, missing = read_back(asked, point, tmp_path)
    assert read.train.pipeline == pipeline
    assert [one for one in subjects(missing) if "pipeline" in one or "virtual" in one] == (
        [named] if named else []
    )


def test_stages_of_a_model_with_tied_embeddings_are_named(tmp_path: Path) -> None:
    read, missing = read_back(job("llama3.2-1b", batch=8), Point(pp=4, ring=4, zero=2), tmp_path)
    assert read.mesh.pp == 1
    assert any(line.startswith("pp=4") and "tied" in line for line in missing)


def test_an_order_of_axes_that_a_point_does_not_use_is_not_named() -> None:
    asked = replace(job(nodes=1, each=4), axes=("ring", "ulysses", "tp", "dp", "pp"))
    assert "axes=ring,ulysses,tp,dp,pp" in subjects(emit(asked, Point(ulysses=2, ring=2, zero=2))[1])
    assert subjects(emit(asked, Point(ring=4, zero=2))[1]) == ALWAYS


def test_gradients_in_bf16_and_documents_of_given_lengths_are_named() -> None:
    asked = replace(job(nodes=1, each=4), numerics=Numerics(gradient=2), documents=(65000, 536))
    named = subjects(emit(asked, Point(ring=4, zero=2))[1])
    assert named[0] == "gradients in bf16"
    assert "2 documents of given lengths" in named


def test_a_plan_that_the_trainer_runs_as_it_is_names_only_the_machine_and_the_text() -> None:
    asked = replace(job(nodes=1, each=4), numerics=Numerics(element=4, gradient=4, optimizer=8))
    _, missing = emit(asked, Point(ulysses=2, ring=2, zero=0))
    assert subjects(missing) == ALWAYS


def test_a_shape_that_a_recipe_cannot_say_is_named() -> None:
    wide = replace(load_model("llama3-8b"), head_dim=256, gated=False, sliding_window=4096)
    text, missing = emit(replace(job(), model=wide), POINT)
    assert tomllib.loads(text)["model"]["head_dim"] == 256
    for named in ("sliding_window=4096", "a feed-forward network of two matrices"):
        assert any(line.startswith(named) for line in missing), named


def test_a_model_that_the_trainer_cannot_build_is_refused_in_its_words() -> None:
    odd = replace(load_model("llama3-8b"), head_dim=127)
    with pytest.raises(ValueError, match=r"seqmesh train cannot run llama3-8b: model\.head_dim=127"):
        emit(replace(job(), model=odd), POINT)


def test_a_models_name_cannot_add_keys_to_a_recipe() -> None:
    named = replace(load_model("llama3-8b"), name='x\n[run]\nthreads = "\0"')
    text, _ = emit(replace(job(), model=named), POINT)
    read = tomllib.loads(text)
    assert set(read) == {"mesh", "model", "data", "train", "run"}
    assert read["run"] == {"device": "cuda"}


@pytest.mark.parametrize(
    "module", ["paper.compare", "output.emit", "output.emit_for", "output.timeline", "output.plot"]
)
def test_making_outputs_loads_no_torch_and_no_matplotlib(module: str) -> None:
    code = f"import sys, seqmesh.planner.{module}; assert not {{'torch', 'matplotlib'}} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


POINTS = [
    (job(), Point(ulysses=8, ring=2)),
    (job(), Point(tp=2, ulysses=2, ring=4, zero=3, checkpointing="full", offload="both", tiling="loss")),
    (job(batch=16), Point(tp=2, ulysses=2, pp=2, dp=2, zero=2, micro_batch=2)),
    (job(batch=4), Point(ring=4, dp=2, pp=2, zero=3, tiling="mlp")),
    (job("gpt2-xl", "l20", nodes=1, seq_len=4096, batch=512), Point(dp=8, zero=0)),
    (job(nodes=1, each=1), Point(zero=0)),
    (job("llama2-7b"), Point(ulysses=4, ring=4, checkpointing="full")),  # heads overlap
    (job("llama2-7b", nodes=1), Point(ulysses=2, ring=4)),
    (
        replace(job(seq_len=16384, batch=2), documents=(9000, 7000, 384) * 2),
        Point(ulysses=2, ring=4, dp=2, offload="optimizer"),
    ),
    (
        replace(job(batch=2), assumptions=Assumptions(gradient_overlap=1.0, overlap_tax=0.0)),
        Point(ulysses=8, dp=2, zero=2),
    ),
]
IDS = [str(point) for _, point in POINTS]


def drawn(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def sums(trace: dict[str, Any], of: str) -> dict[str, float]:
    """Seconds by term, of single events and of those that stand for many micro-batches."""
    total: Counter[str] = Counter()
    for event in drawn(trace):
        given = event["args"][of]
        total.update(given if isinstance(given, dict) else {event["name"]: given})
    return total


@pytest.mark.parametrize(("asked", "point"), POINTS, ids=IDS)
def test_a_timeline_ends_at_the_estimate_and_adds_up_to_its_pieces(asked: Job, point: Point) -> None:
    assert not list(violations(asked, point))
    costs = CostModel(asked)
    estimate, trace = costs.estimate(point), timeline(costs, point)
    events = drawn(trace)
    assert min(event["ts"] for event in events) == 0
    end = max(event["ts"] + event["dur"] for event in events)
    assert end == pytest.approx(estimate.seconds * 1e6, rel=1e-6)
    seconds = {term.name: term.seconds for term in estimate.terms}
    exposed = {term.name: term.exposed for term in estimate.terms}
    assert sums(trace, "seconds") == pytest.approx(seconds, rel=1e-6)
    assert sums(trace, "exposed_seconds") == pytest.approx(exposed, rel=1e-6, abs=1e-9)
    for event in events:
        if not isinstance(event["args"]["seconds"], dict):
            assert event["dur"] == pytest.approx(event["args"]["seconds"] * 1e6, rel=1e-9)


@pytest.mark.parametrize(("asked", "point"), POINTS, ids=IDS)
def test_a_timelines_rows_are_named_and_their_events_do_not_overlap(asked: Job, point: Point) -> None:
    trace = json.loads(json.dumps(timeline(CostModel(asked), point), allow_nan=False))
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in drawn(trace):
        rows.setdefault((event["pid"], event["tid"]), []).append(event)
    named = {(event["pid"], event["tid"]) for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert set(rows) == named
    for row in rows.values():
        for before, after in pairwise(row):
            assert after["ts"] >= before["ts"] + before["dur"] - 1e-3  # a nanosecond


def test_a_fetch_runs_beside_the_stage_before_its_own() -> None:
    events = drawn(timeline(CostModel(job()), Point(ulysses=4, ring=4)))
    at = {"micro_batch": 0, "layer": 3, "direction": "forward"}
    layer = [event for event in events if at.items() <= event["args"].items()]
    kernels = {event["args"]["stage"]: event for event in layer if event["name"] == "attention kernel"}
    fetches = {event["args"]["stage"]: event for event in layer if event["name"] == "ring exchange"}
    assert set(kernels) == {0, 1, 2, 3}
    assert set(fetches) == {1, 2, 3}
    for stage, fetch in fetches.items():
        assert fetch["ts"] == pytest.approx(kernels[stage - 1]["ts"])
        assert fetch["ts"] + fetch["dur"] <= kernels[stage]["ts"] + 1e-3


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 16), (2, 8), (8, 2), (16, 1)])
def test_ring_stages_add_up_to_the_attention_that_was_priced(ulysses: int, ring: int) -> None:
    costs, point = CostModel(job()), Point(ulysses=ulysses, ring=ring)
    cost, times = costs.attention(point), stage_times(costs, point)
    assert len(times) == ring
    for stages, one in (
        ([stage.forward for stage in times], cost.forward),
        ([stage.backward for stage in times], cost.backward),
    ):
        assert sum(stage.kernel_s for stage in stages) == pytest.approx(one.kernel_s)
        assert sum(stage.merge_s for stage in stages) == pytest.approx(one.merge_s)
        assert sum(stage.rows_s for stage in stages) == pytest.approx(one.rows_s)
        assert sum(stage.rows_exposed_s for stage in stages) == pytest.approx(one.rows_exposed_s)


def test_many_micro_batches_become_one_event() -> None:
    trace = timeline(CostModel(job("gpt2-xl", "l20", nodes=1, seq_len=4096, batch=512)), Point(dp=8, zero=0))
    (rest,) = [event for event in drawn(trace) if event["name"].endswith("more micro-batches, alike")]
    shown = {event["args"]["micro_batch"] for event in drawn(trace) if "micro_batch" in event["args"]}
    assert rest["name"].startswith(f"{64 - len(shown)} ")
    assert len(drawn(trace)) <= MOST_EVENTS + 10


def test_an_exchange_that_finds_nothing_to_hide_behind_stays_within_the_step() -> None:
    """A row is compressed where a share is hidden by assumption on a network too slow for that.

    Its args keep the truth.
    """
    slow = replace(load_gpu("h100-sxm"), scale_up_bytes_per_s=1e9)
    asked = replace(
        job(seq_len=4096, nodes=1),
        cluster=Cluster(gpu=slow, nodes=1, gpus_per_node=8),
        assumptions=Assumptions(tp_exposed=0.0),
    )
    costs, point = CostModel(asked), Point(tp=8, zero=0)
    estimate, trace = costs.estimate(point), timeline(costs, point)
    end = max(event["ts"] + event["dur"] for event in drawn(trace))
    assert end == pytest.approx(estimate.seconds * 1e6, rel=1e-6)
    assert sums(trace, "seconds")["tensor parallel exchange"] == pytest.approx(estimate.lower)


def test_a_picture_is_drawn_of_points_that_fit_and_that_do_not(tmp_path: Path) -> None:
    asked = replace(job(seq_len=208 * 1024), stack=FusedStack())
    costs = CostModel(asked)
    estimates = [costs.estimate(Point(ulysses=8, ring=2, zero=zero)) for zero in (3, 1)]
    assert [estimate.fits for estimate in estimates] == [True, False]
    plot(estimates, asked.capacity, tmp_path / "plan.svg", "costs $x and y$")
    svg = (tmp_path / "plan.svg").read_text()
    for written in (
        "costs $x and y$",
        "u8 r2 zero3",
        "does not fit",
        "capacity: 85.9 GB",
        "GB",
        "lower bound: everything overlaps",
    ):
        assert f"<!-- {written} -->" in svg
    assert "<pattern" in svg  # hatched
    plot(estimates[:1], asked.capacity, tmp_path / "plan.png", "one")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_label_says_what_sets_a_point_apart() -> None:
    assert label(Point(ulysses=8, ring=2, zero=3)) == "u8 r2 zero3"
    assert label(Point(zero=0)) == "1 GPU"
    point = Point(tp=2, dp=4, pp=2, zero=2, micro_batch=4, checkpointing="full", tiling="mlp", offload="both")
    assert label(point) == "tp2 dp4 pp2 zero2 mb4 ckpt tile-mlp offload-both"


def test_small_parts_are_drawn_together_and_nothing_is_lost() -> None:
    bars = [{"a": 90.0, "b": 9.8, "c": 0.2}, {"a": 50.0, "c": 0.3, "d": 0.1}]
    assert parts(bars) == {"a": [90.0, 50.0], "b": [9.8, 0.0], OTHER: pytest.approx([0.2, 0.4])}


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [(0, "a.png", "0 candidates"), (17, "a.png", "--top 16"), (1, "a.xyz", r"\.xyz")],
)
def test_a_picture_that_cannot_be_drawn_is_refused(
    count: int, name: str, message: str, tmp_path: Path
) -> None:
    estimate = CostModel(job()).estimate(POINT)
    with pytest.raises(ValueError, match=message):
        plot([estimate] * count, 80 * 2**30, tmp_path / name, "none")
