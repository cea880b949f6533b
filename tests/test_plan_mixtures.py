"""`seqmesh plan` of mixtures: what a person sees, and recipes that `seqmesh train` takes."""

import json
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from model_folders import save_config
from plan_command import Run
from train_command import seqmesh_command

from seqmesh.foresee import predict
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.of_recipe import of_recipe
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.output.emit import emit
from seqmesh.planner.output.emit_for import PROGRAMS, emit_for
from seqmesh.planner.search import search
from seqmesh.train import setup
from seqmesh.train.model import sizes_of
from seqmesh.train.recipe import config_of

GPUS = [
    "--gpu",
    "h100-sxm",
    "--nodes",
    "1",
    "--gpus-per-node",
    "4",
    "--seq-len",
    "256",
    "--global-batch",
    "4",
]

MODEL = """
[model.tiny]
layers = 2
hidden = 32
heads = 4
kv_heads = 2
head_dim = 16
intermediate = 48
vocabulary = 300
mixture = { experts = 4, active = 2, intermediate = 24, architecture = "qwen3_moe" }
"""


def test_a_planned_recipe_of_experts_and_windows_is_one_that_the_trainer_runs(
    plan: Run, tmp_path: Path, text: Path
) -> None:
    folder = save_config("gpt_oss", tmp_path / "model")
    recipe = tmp_path / "plan.toml"
    pins = "ulysses=2,dp=2,experts=2,zero=3,tiling=loss"
    code, out, _ = plan("--model", folder, *GPUS, "--pin", pins, "--emit", str(recipe))
    assert (code, "u2 dp2 ep2" in out) == (0, True)
    read = tomllib.loads(recipe.read_text())
    assert read["model"] == {"folder": folder}
    assert (read["mesh"]["experts"], read["train"]["zero"]) == (2, 3)
    more = ("--steps=1", "--compare_steps=0", "--device=cpu", "--run.folder=run", f"--path={text}")
    done = seqmesh_command("train", str(recipe), *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["sent"]["rest"] > 0  # tokens to experts, whose ranks are no axis of the mesh


def test_the_search_of_a_mixture_says_how_experts_are_spread_and_used(plan: Run) -> None:
    asked = ("--model", "mixtral-8x7b", "--gpu", "h100-sxm", "--nodes", "4", "--seq-len", "32K")
    code, out, _ = plan(*asked, "--global-batch", "32", "--explain", "--assume", "expert_balance=1.25")
    text = " ".join(out.split())
    assert code == 0
    assert "(46.7B parameters, 12.9B active)" in text
    assert " ep" in text.partition("Run ")[2].partition(":")[0]
    assert "Of the ranks that share experts the busiest gets 1.25x the mean tokens." in text
    assert "without experts spread: at best, " in text
    assert "tensor parallelism is not priced with experts" in text
    assert "experts exchange" in text
    assert "expert_balance 1.25 of the mean" in text


def test_a_pinned_spread_is_priced_alone_and_one_that_is_not_is_searched(plan: Run) -> None:
    point = Point(dp=8, zero=3, tiling="mlp")
    pins = ",".join(
        f"{key}={value}" for key, value in asdict(point).items() if key not in ("pool", "experts")
    )
    asked = ("--model", "gpt-oss-20b", "--gpu", "h100-sxm", "--seq-len", "16K", "--global-batch", "8")
    (one,) = plan.json(*asked, "--pin", f"{pins},experts=4")["candidates"]
    assert (one["experts"], one["dp"]) == (4, 8)
    assert len(plan.json(*asked, "--pin", pins)["candidates"]) >= 1


@pytest.mark.parametrize(
    ("pins", "rule"),
    [
        ("tp=2", "tp=2 with experts is not priced: use tp=1; seqmesh train runs it, with mesh.experts"),
        ("experts=3", "experts=3 does not divide the 32 experts of gpt-oss-20b; use a divisor of 32"),
        (
            "experts=8,zero=1",
            "experts=8 with zero=1: seqmesh train spreads experts over ranks that share weights",
        ),
    ],
)
def test_pins_that_cannot_be_are_refused_with_the_reason(plan: Run, pins: str, rule: str) -> None:
    code, _, error = plan("--model", "gpt-oss-20b", "--gpu", "h100-sxm", "--pin", pins)
    assert code == 2
    assert rule in error


def test_a_model_whose_routers_the_trainer_refuses_is_priced_and_not_emitted(
    plan: Run, tmp_path: Path
) -> None:
    asked = ("--model", "deepseek-v3", "--gpu", "h200-sxm", "--nodes", "32", "--seq-len", "8K")
    pins = ("--global-batch", "256", "--pin", "dp=256,zero=3,offload=none")
    code, out, _ = plan(*asked, *pins)
    text = " ".join(out.split())
    assert code == 0
    assert "not by seqmesh train: its routers have weights that are buffers" in text
    assert "seqmesh train plan.toml" not in text
    emitted = plan(*asked, *pins, "--emit", str(tmp_path / "plan.toml"))
    assert emitted[0] == 2
    assert "seqmesh train cannot run deepseek-v3: its routers have weights" in emitted[2]


def test_the_trainers_memory_of_other_models_than_llamas_is_refused(plan: Run) -> None:
    code, _, error = plan("--model", "gemma3-27b", "--gpu", "h100-sxm", "--stack", "trainer")
    assert code == 2
    assert "experts, latent attention or several kinds of layers" in error


def planned(name: str) -> Job:
    cluster = Cluster(gpu=load_gpu("h100-sxm"), nodes=2, gpus_per_node=8)
    return Job(model=load_model(name), cluster=cluster, seq_len=32768, global_batch=16)


@pytest.mark.parametrize("name", ["gemma3-27b", "gpt-oss-20b"])
def test_a_preset_that_keys_cannot_say_is_a_folder_that_is_named(name: str) -> None:
    text, missing = emit(planned(name), Point(ulysses=2, dp=8, zero=3))
    assert tomllib.loads(text)["model"] == {"folder": name}
    assert "experts" not in tomllib.loads(text)["mesh"]
    assert any(line.startswith(f"model.folder={name}: no keys of the trainer say") for line in missing)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "qwen3-235b-a22b"])
def test_a_preset_of_alike_layers_is_one_of_keys_with_as_many_parameters(name: str) -> None:
    job = planned(name)
    config = config_of(tomllib.loads(emit(job, Point(ulysses=2, dp=8, zero=3, experts=8))[0]))
    assert not config.model.folder
    made, shape = sizes_of(config), job.model
    norms = made.parameters - shape.parameters  # of q and k, which a plan leaves out
    assert norms in (0, 2 * shape.layers * shape.head_dim)
    assert made.matmul_parameters == shape.matmul_parameters
    assert (made.experts, config.mesh.experts) == (shape.mixture.experts, 8)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_a_recipe_of_a_mixture_is_read_back_as_it_was_planned(name: str) -> None:
    job, point = planned(name), Point(ulysses=2, dp=8, zero=3, experts=8, tiling="loss")
    config = config_of(tomllib.loads(emit(job, point)[0]))
    back = of_recipe(config, job.cluster, vocabulary=job.model.vocabulary)
    assert back.point == point
    # Qwen3's config.json has a width of dense layers too, of which there are none.
    same = {"name": name, "source": job.model.source, "intermediate": job.model.intermediate}
    assert replace(back.job.model, **same) == job.model
    assert predict(config, job.model.vocabulary, "NVIDIA H100") is None  # its memory has no formula


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b"])
def test_no_plan_of_a_mixture_is_a_recipe_that_the_trainer_refuses(name: str, tmp_path: Path) -> None:
    """Fewer layers than the presets': every mesh that is found is then checked in a moment."""
    folder = save_config("gpt_oss", tmp_path, num_attention_heads=64, num_local_experts=32)
    job = planned(name)
    shape = replace(job.model, layers=4, full_layers=min(job.model.full_layers, 2), folder=folder)
    job = replace(job, model=shape if job.model.full_layers else replace(shape, folder=""))
    costs = CostModel(job)
    found = [*search(costs, {}, top=60).best, *search(costs, {"experts": 8}, top=60).best]
    assert len(found) > 20
    recipes = [config_of(tomllib.loads(emit(job, one.point)[0])) for one in found]
    # Of the model, a check looks at these alone.
    for config in {(one.mesh.experts, one.mesh.pp, one.train.pipeline): one for one in recipes}.values():
        setup.check(config)


def test_a_planned_mixture_of_keys_is_traced_and_trained(plan: Run, tmp_path: Path, text: Path) -> None:
    tables, recipe = tmp_path / "models.toml", tmp_path / "plan.toml"
    tables.write_text(MODEL)
    pins = "ulysses=2,dp=2,experts=2,zero=3,tiling=loss"
    model = ("--model", "tiny", "--hardware", str(tables))
    assert plan(*model, *GPUS, "--pin", pins, "--emit", str(recipe))[0] == 0
    dry = seqmesh_command("train", str(recipe), f"--path={text}", "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "of tensors expected on rank 0" in dry.stdout
    more = ("--steps=1", "--compare_steps=1", "--device=cpu", "--run.folder=run", f"--path={text}")
    done = seqmesh_command("train", str(recipe), *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["sent"]["rest"] > 0


def test_commands_of_other_programs_spread_experts_and_name_the_rest() -> None:
    point = Point(dp=16, zero=3, experts=8)
    for program, flag in (
        ("torchtitan", "--parallelism.expert_parallel_degree 8"),
        ("megatron", "--expert-model-parallel-size 8"),
    ):
        assert program in PROGRAMS
        text, missing = emit_for(program, planned("qwen3-30b-a3b"), point)
        assert flag in text
        assert any("own flags for experts, windows and latent attention" in line for line in missing)
        assert flag not in emit_for(program, planned("llama3-8b"), Point(dp=16, zero=3))[0]
