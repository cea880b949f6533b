"""The recipes that are shipped: each can be read, its model built without memory, the mixes trained."""

import json
import subprocess
from pathlib import Path

import pytest
from train_command import ROOT, seqmesh_command

from seqmesh.train import setup
from seqmesh.train.model import sizes_of
from seqmesh.train.recipe import load

RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
MIXES = sorted((ROOT / "recipes" / "mixes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_can_be_read_and_its_model_made_parallel(recipe: Path) -> None:
    config = load(str(recipe))
    setup.check(config)
    assert setup.dims_of(config.mesh).world == config.mesh.world
    setup.plan_of(config)
    if config.run.device == "cuda":
        assert config.mesh.world in (8, 16)
        parameters = sizes_of(config).parameters
        assert parameters == pytest.approx(8.1e9, rel=0.02)


@pytest.mark.parametrize("recipe", MIXES, ids=lambda path: path.stem)
def test_a_mix_trains_on_eight_ranks_what_one_rank_trains(recipe: Path, text: Path, tmp_path: Path) -> None:
    config = load(str(recipe))
    assert config.mesh.world == 8
    more = ("--hidden=32", "--intermediate=64", "--seq_len=256", "--steps=3", "--data", str(text))
    done = seqmesh_command("train", str(recipe), *more, "--folder=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["matches_one_rank"] is True
    assert report["bytes_agree"] is True


@pytest.mark.parametrize(
    "script", sorted((ROOT / "recipes" / "launch").iterdir()), ids=lambda path: path.name
)
def test_a_launch_file_is_a_script_that_a_shell_can_read(script: Path) -> None:
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
