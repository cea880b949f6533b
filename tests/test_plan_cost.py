"""Memory, bytes and times of single points, checked by hand; and one test for each fault that was found."""

from dataclasses import replace
from pathlib import Path

import pytest

from seqmesh.planner.candidates import meshes
from seqmesh.planner.cost.parameters import fullest_parameters, mean_parameters, stage_parameters
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.flags import PlanOptions
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.legality import violations
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.request import build_cluster
from seqmesh.planner.inputs.stack import TrainerStack
from seqmesh.planner.longest import longest
from seqmesh.planner.output.emit import emit
from seqmesh.planner.search import search
from seqmesh.train.recipe import load

pytestmark = pytest.mark.fast


def costs(
    model: str = "llama3-8b",
    gpu: str = "a800-sxm",
    *,
    nodes: int = 1,
    each: int = 8,
    seq_len: int = 65536,
    **more: object,
) -> CostModel:
    cluster = Cluster(gpu=load_gpu(gpu), nodes=nodes, gpus_per_node=each)
    return CostModel(Job(model=load_model(model), cluster=cluster, seq_len=seq_len, **more))  # type: ignore[arg-type]


def test_one_gpu_sends_nothing_and_its_step_is_its_compute() -> None:
    estimate = costs(each=1, seq_len=8192).estimate(Point(zero=0))
    assert estimate.bytes_per_step == {}
    assert {term.cause for term in estimate.terms} == {"compute"}
    assert estimate.lower == pytest.approx(estimate.seconds) == pytest.approx(estimate.upper)


@pytest.mark.parametrize(("zero", "numbers"), [(0, 4 + 4), (1, 4 + 2), (2, 4 + 2), (3, 4 + 2 * 2)])
def test_data_parallelism_sends_gradients_and_weights_by_the_zero_stage(zero: int, numbers: int) -> None:
    """Bytes a parameter, times (d - 1)/d.

    fp32 gradients once (twice in an all-reduce), bf16 weights once (ZeRO-3: twice).
    """
    estimate = costs("llama3.2-1b", seq_len=8192, global_batch=8).estimate(Point(dp=8, zero=zero))
    parameters = load_model("llama3.2-1b").parameters
    assert sum(estimate.bytes_per_step.values()) == pytest.approx(numbers * parameters * 7 / 8, rel=1e-6)


def test_bytes_of_ulysses_ring_and_tensor_parallelism_are_papers_formulas() -> None:
    """As in USP (Fang & Zhao 2024, arXiv 2405.07719), but a ring sends only the rows that zigzag needs.

    Ulysses e (2 + 2κ)(U - 1)/U each way; zigzag 3/4 of 2κe (R - 1), three times; TP-sp 10 M (t - 1)/t.
    """
    s, hidden, kappa, layers = 65536, 4096, 8 / 32, 32
    weights = costs().estimate(Point(dp=1, ulysses=8, zero=0)).bytes_per_step["scale_up"]
    reduced = 2 * 4 * load_model("llama3-8b").parameters * 7 / 8
    e = 2 * s * hidden / 8
    assert weights - reduced == pytest.approx(layers * 2 * e * (2 + 2 * kappa) * 7 / 8, rel=1e-6)
    ring = costs().estimate(Point(ring=8, zero=0)).bytes_per_step["scale_up"] - reduced
    assert ring == pytest.approx(layers * 3 / 4 * 3 * 2 * kappa * e * 7, rel=1e-6)
    tensor = costs().estimate(Point(tp=8, zero=0)).bytes_per_step["scale_up"]
    assert tensor == pytest.approx(layers * 10 * 2 * s * hidden * 7 / 8, rel=1e-6)


def test_most_boundaries_of_a_pipeline_stay_in_their_node() -> None:
    estimate = costs(nodes=2, global_batch=16).estimate(Point(pp=16, zero=0))
    assert estimate.bytes_per_step["network"] == pytest.approx(
        sum(estimate.bytes_per_step.values()) / 15, rel=1e-6
    )


def test_the_last_stage_of_a_tied_model_holds_a_copy_of_the_embedding() -> None:
    model = load_model("llama3.2-1b")
    job = costs("llama3.2-1b", global_batch=8).job
    last = stage_parameters(job, Point(pp=8), first=False, last=True)
    assert last == (2 * model.layer_parameters + model.embedding_parameters, 0)
    assert stage_parameters(job, Point()).whole == model.parameters


def test_no_stage_is_charged_for_embedding_and_head_at_once() -> None:
    model = load_model("llama3-8b")
    job = costs(each=4, global_batch=4).job
    ends = 8 * model.layer_parameters + model.embedding_parameters
    assert fullest_parameters(job, Point(pp=4)).whole == ends
    assert mean_parameters(job, Point(pp=4)).whole == pytest.approx(model.parameters / 4, rel=1e-4)


def test_the_optimizer_can_be_offloaded_from_a_single_gpu() -> None:
    found = search(costs(each=1, seq_len=8192), {})
    assert found.best
    assert found.best[0].point.offload == "optimizer"


def test_a_faster_gpu_or_link_never_makes_a_step_slower() -> None:
    one = costs("mistral-7b", "a100-pcie", nodes=2, seq_len=4096, global_batch=2)
    gpu = one.job.cluster.gpu
    assert gpu.flops_per_s is not None
    faster = {
        "flops_per_s": gpu.flops_per_s * 1.2,
        "memory_bytes_per_s": gpu.memory_bytes_per_s * 1.2,
        "pcie_bytes_per_s": gpu.pcie_bytes_per_s * 1.2,
        "network_bytes_per_s": gpu.network_bytes_per_s * 1.2,
    }
    points = [point for point in meshes(one.job, {}) if not any(violations(one.job, point))]
    for name, rate in faster.items():
        cluster = replace(one.job.cluster, gpu=replace(gpu, **{name: rate}))
        other = CostModel(replace(one.job, cluster=cluster))
        assert all(other.seconds(point) <= one.seconds(point) * (1 + 1e-12) for point in points)


def test_the_trainers_longest_sequence_is_found() -> None:
    assert longest(costs(gpu="b200", nodes=2, seq_len=8192, stack=TrainerStack()), {}) > 65536


def test_steps_of_a_machine_with_an_odd_number_of_gpus_are_fine_enough() -> None:
    one = costs(nodes=125, seq_len=8192, global_batch=1000)
    assert longest(one, {"dp": 1000, "checkpointing": "none", "zero": 1}) >= 8192


def test_another_gpu_for_a_named_cluster_is_refused_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text(
        '[cluster.lab]\ngpu = "a800-sxm"\nnodes = 2\ngpus_per_node = 8\nnetwork_gb_per_s = 12.5\n'
    )
    same = build_cluster(PlanOptions(cluster="lab", gpu="a800-sxm", hardware=[file]))
    assert same.gpu.network_bytes_per_s == 12.5e9
    with pytest.raises(ValueError, match="has GPUs of kind a800-sxm, not h100-sxm"):
        build_cluster(PlanOptions(cluster="lab", gpu="h100-sxm", hardware=[file]))


def test_a_plan_for_the_trainer_becomes_a_recipe_that_it_reads(tmp_path: Path) -> None:
    one = costs("llama3.2-1b", gpu="h100-sxm", each=4, seq_len=32768, stack=TrainerStack())
    point = search(one, {}).best[0].point
    text, missing = emit(one.job, point)
    (tmp_path / "recipe.toml").write_text(text)
    config = load(str(tmp_path / "recipe.toml"))
    assert (config.mesh.ulysses, config.mesh.ring, config.data.seq_len) == (point.ulysses, point.ring, 32768)
    assert not [line for line in missing if line.startswith("zero")]
