"""Runs that a launcher starts anew: they go on from their own newest checkpoint, to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_command import ROOT, TIMEOUT_S, TINY, environment, one_line_error, seqmesh_command

LAUNCH = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "--max-restarts=3",
]
SCRIPT = "from seqmesh.cli import main; main()"
STEPS = 60


def options(text: Path, folder: Path) -> list[str]:
    every = ("--checkpoint_every=5", f"--steps={STEPS}", "--timeout_s=60", "--compare-steps=0", "--ring=1")
    return ["train", *TINY, *every, "--data", str(text), "--folder", str(folder), "--resume", "auto"]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def ranks_of(launcher: int) -> list[int]:
    children = [
        int(child)
        for thread in Path(f"/proc/{launcher}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]
    return sorted(child for child in children if b"ranks.py" in Path(f"/proc/{child}/cmdline").read_bytes())


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for the ranks in /proc")
def test_a_run_whose_rank_is_killed_goes_on_by_itself_and_ends_as_if_nothing_had_been(
    text: Path, tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    done = seqmesh_command(*options(text, whole), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    script = tmp_path / "ranks.py"
    script.write_text(f"{SCRIPT}\n")
    launcher = subprocess.Popen(
        [*LAUNCH, str(script), *options(text, folder)],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not list((folder / "checkpoints").glob("step-*[0-9]")):
            assert time.monotonic() < deadline
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.02)
        victim = ranks_of(launcher.pid)[-1]
        os.kill(victim, signal.SIGKILL)
        _, error = launcher.communicate(timeout=TIMEOUT_S)
    finally:
        launcher.terminate()  # it ends its ranks, if it has not ended itself
        launcher.communicate()
    assert launcher.returncode == 0, error
    # what the rank that was left says of it
    assert "was killed or hangs in step " in error
    assert losses(folder) == losses(whole)
    assert len(losses(folder)) == STEPS
    weights = [load_file(one / "checkpoint" / "model.safetensors") for one in (whole, folder)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_folder_that_a_run_of_the_same_recipe_began_is_taken_and_another_is_not(
    text: Path, tmp_path: Path
) -> None:
    """A rank may be killed before anything is saved."""
    folder = tmp_path / "run"
    short = [*options(text, folder), "--steps=2", "--checkpoint_every=0"]
    folder.mkdir()
    (folder / "mine").write_text("")
    assert "is not empty" in one_line_error(seqmesh_command(*short, cwd=tmp_path))
    (folder / "mine").unlink()
    assert seqmesh_command(*short, cwd=tmp_path).returncode == 0
    # begun, and nothing saved
    (folder / "checkpoints" / "step-2").rename(tmp_path / "step-2")
    assert seqmesh_command(*short, cwd=tmp_path).returncode == 0
    assert "nothing is left to resume" in one_line_error(seqmesh_command(*short, cwd=tmp_path))


def test_a_run_that_goes_on_by_itself_must_be_told_where(tmp_path: Path) -> None:
    done = seqmesh_command("train", "--resume", "auto", cwd=tmp_path)
    assert 'run.resume="auto" goes on in run.folder, which is not given' in one_line_error(done)
