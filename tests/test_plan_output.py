"""What a plan leaves behind: a recipe that the trainer reads, a timeline that adds up, a picture."""

import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from seqmesh.planner.emit import emit
from seqmesh.planner.hardware import Cluster, load_gpu
from seqmesh.planner.job import Job, Numerics, Point
from seqmesh.planner.models import load_model
from seqmesh.train.recipe import load


def job(model: str = "llama3-8b", gpu: str = "a800-sxm", nodes: int = 2, each: int = 8, seq_len: int = 65536, batch: int = 1) -> Job:
    cluster = Cluster(gpu=load_gpu(gpu), nodes=nodes, gpus_per_node=each)
    return Job(model=load_model(model), cluster=cluster, seq_len=seq_len, global_batch=batch)


POINT = Point(tp=2, ulysses=4, ring=2)


@pytest.mark.parametrize("model", ["llama2-7b", "llama3-8b", "qwen2.5-7b", "qwen3-8b"])
def test_the_trainer_reads_an_emitted_recipe(model: str, tmp_path: Path) -> None:
    asked = replace(job(model, seq_len=8192, batch=4), layout="zigzag")
    text, _ = emit(asked, Point(ulysses=2, ring=2, dp=2, tp=2, micro_batch=2))
    (tmp_path / "recipe.toml").write_text(text)
    read, shape = load(str(tmp_path / "recipe.toml")), load_model(model)
    assert (read.mesh.ulysses, read.mesh.ring, read.mesh.layout, read.mesh.world) == (2, 2, "zigzag", 4)
    assert (read.model.hidden, read.model.layers, read.model.intermediate) == (shape.hidden, shape.layers, shape.intermediate)
    assert (read.model.heads, read.model.kv_heads) == (shape.heads, shape.kv_heads)
    assert read.model.tie_embeddings == shape.tied_embeddings
    assert (read.data.seq_len, read.data.sequences) == (8192, 4)
    assert read.model.rope_theta == load(None).model.rope_theta


def test_a_recipe_names_everything_that_the_trainer_does_not_run() -> None:
    point = Point(tp=2, ulysses=2, ring=2, dp=2, pp=1, zero=3, checkpointing="full", offload="both", tiling="mlp")
    text, missing = emit(replace(job(batch=4), documents=(65000, 536)), point)
    for named in ("tp=2", "dp=2", "zero=3", "checkpointing=full", "offload=both", "tiling=mlp", "micro_batch=1", "bf16", "vocabulary="):
        assert any(line.startswith(named) for line in missing), named
    assert any(line.startswith("2 documents") for line in missing)
    for line in missing:
        assert f"# - {line}\n" in text
    assert set(tomllib.loads(text)) == {"mesh", "model", "data"}


def test_a_plan_that_the_trainer_runs_as_it_is_names_only_the_machine_and_the_text() -> None:
    asked = replace(job(nodes=1, each=4), numerics=Numerics(element=4, gradient=4, optimizer=8))
    _, missing = emit(asked, Point(ulysses=2, ring=2, zero=0))
    assert [line.partition(":")[0] for line in missing] == ["1 x 4 a800-sxm", "vocabulary=128256", "rotary base"]


def test_a_shape_that_a_recipe_cannot_say_is_named() -> None:
    wide = replace(load_model("llama3-8b"), head_dim=256, gated=False, sliding_window=4096)
    _, missing = emit(replace(job(), model=wide), POINT)
    for named in ("head_dim=256", "sliding_window=4096", "a feed-forward network of two matrices"):
        assert any(line.startswith(named) for line in missing), named


def test_a_model_that_the_trainer_cannot_build_is_refused_in_its_words() -> None:
    odd = replace(load_model("llama3-8b"), hidden=4100)
    with pytest.raises(ValueError, match=r"seqmesh train cannot run llama3-8b: model\.hidden=4100"):
        emit(replace(job(), model=odd), POINT)


def test_a_models_name_cannot_add_keys_to_a_recipe() -> None:
    named = replace(load_model("llama3-8b"), name='x\n[train]\nsteps = "\0"')
    text, _ = emit(replace(job(), model=named), POINT)
    assert "train" not in tomllib.loads(text)


@pytest.mark.parametrize("module", ["compare", "emit", "timeline", "plot"])
def test_making_outputs_loads_no_torch_and_no_matplotlib(module: str) -> None:
    code = f"import sys, seqmesh.planner.{module}; assert not {{'torch', 'matplotlib'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
