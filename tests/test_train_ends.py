"""How runs of `seqmesh train` end early: Ctrl-C, killed, hung and diverging ranks, a time limit."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_command import TIMEOUT_S, TINY, command, environment, one_line_error, seqmesh_command


class LongRun:
    """A run that would go on for long, its first step done; the process group is its own."""

    def __init__(self, text: Path, folder: Path, *more: str) -> None:
        arguments = ("train", *TINY, "--data", str(text), "--steps", "100000", "--folder", str(folder), *more)
        self.folder = folder
        self.process = subprocess.Popen(
            command(*arguments),
            cwd=folder.parent,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell starts background jobs with Ctrl-C ignored, as a CI job may be, and children inherit it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        metrics = folder / "metrics.jsonl"
        deadline = time.monotonic() + TIMEOUT_S
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)
        self.ranks = _children(self.process.pid)

    def end(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, error = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, error

    def stop_line(self, who: str, steps: int) -> str:
        """What is said when it stopped after some steps."""
        return (
            f"seqmesh: stopped by {who} after {steps} steps; step-{steps} is saved:"
            f" seqmesh train {self.folder}/config.toml --resume {self.folder}"
        )

    def survivors(self) -> list[int]:
        return [pid for pid in self.ranks if Path(f"/proc/{pid}").exists()]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def long_run(text: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LongRun]:
    run = LongRun(text, tmp_path / "run", *getattr(request, "param", ()))
    yield run
    if run.process.poll() is None:
        os.killpg(run.process.pid, signal.SIGKILL)
        run.process.communicate()


needs_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="looks for the ranks in /proc")


@needs_proc
def test_ctrl_c_stops_all_ranks_with_one_line_and_exit_code_130(long_run: LongRun) -> None:
    assert len(long_run.ranks) == 4
    os.killpg(long_run.process.pid, signal.SIGINT)  # what a terminal does: parent and ranks all get it
    code, error = long_run.end()
    assert code == 130
    steps = steps_of_the_only_checkpoint(long_run.folder)
    assert error.splitlines() == [long_run.stop_line("Ctrl-C", steps)]
    assert len((long_run.folder / "metrics.jsonl").read_text().splitlines()) == steps
    assert long_run.survivors() == []


@needs_proc
def test_a_second_ctrl_c_stops_at_once(long_run: LongRun) -> None:
    os.kill(long_run.ranks[1], signal.SIGSTOP)  # no step ends any more
    os.killpg(long_run.process.pid, signal.SIGINT)
    # Two signals that wait at the same time are one: the first must have been heard.
    while is_pending(long_run.process.pid, signal.SIGINT):
        time.sleep(0.05)
    os.killpg(long_run.process.pid, signal.SIGINT)
    code, error = long_run.end()
    assert code == 130
    assert len(error.splitlines()) == 1
    assert error.startswith("seqmesh: stopped by Ctrl-C after ")
    assert "nothing is saved but metrics in " in error
    assert long_run.survivors() == []


@needs_proc
@pytest.mark.parametrize("everyone", [False, True])
def test_a_terminated_run_saves_and_leaves_no_rank_behind(long_run: LongRun, everyone: bool) -> None:
    """Whether the parent is terminated, or all processes of its group, as by a scheduler."""
    (os.killpg if everyone else os.kill)(long_run.process.pid, signal.SIGTERM)
    code, error = long_run.end()
    assert code == 128 + signal.SIGTERM
    steps = steps_of_the_only_checkpoint(long_run.folder)
    assert error.splitlines() == [long_run.stop_line("SIGTERM", steps)]
    assert long_run.survivors() == []


@needs_proc
@pytest.mark.parametrize("long_run", [("--timeout_s=3",)], indirect=True)
def test_a_hung_rank_does_not_block_a_stop_for_ever(long_run: LongRun) -> None:
    os.kill(long_run.ranks[1], signal.SIGSTOP)
    long_run.process.send_signal(signal.SIGINT)
    code, error = long_run.end()
    assert code == 1
    assert len(error.splitlines()) == 1
    assert "rank 1 did not answer for run.timeout_s=3 seconds" in error
    assert long_run.survivors() == []


@needs_proc
@pytest.mark.parametrize("long_run", [("--timeout_s=3",)], indirect=True)
def test_ranks_that_all_hang_do_not_block_a_stop_for_ever(long_run: LongRun) -> None:
    for rank in long_run.ranks:
        os.kill(rank, signal.SIGSTOP)
    long_run.process.send_signal(signal.SIGTERM)
    code, error = long_run.end()
    assert code == 1
    assert "asked to stop, the ranks did not end their step in " in error
    assert long_run.survivors() == []


def test_a_stopped_run_goes_on_with_the_command_that_it_prints(text: Path, tmp_path: Path) -> None:
    """And ends as the run that nothing stopped."""
    whole = tmp_path / "whole"
    arguments = ("--data", str(text), "--steps=40", "--compare-steps=0", "--ring=1")
    done = seqmesh_command("train", *TINY, *arguments, "--folder", str(whole), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = LongRun(text, tmp_path / "run", *arguments)
    run.process.send_signal(signal.SIGINT)
    code, error = run.end()
    assert code == 130, error
    printed = shlex.split(error.strip().split(" is saved: ")[1])
    assert printed[:2] == ["seqmesh", "train"]
    done = seqmesh_command(*printed[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(whole)
    weights = [load_file(folder / "checkpoint" / "model.safetensors") for folder in (whole, run.folder)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def is_pending(pid: int, number: int) -> bool:
    """Whether a process has a signal that it has not taken yet."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    waiting = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in waiting)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of_the_only_checkpoint(folder: Path) -> int:
    (name,) = os.listdir(folder / "checkpoints")
    return int(name.removeprefix("step-"))


@needs_proc
def test_a_killed_rank_is_named_and_the_others_end(long_run: LongRun) -> None:
    os.kill(long_run.ranks[2], signal.SIGKILL)
    code, error = long_run.end()
    assert code == 1
    assert re.fullmatch(
        r"seqmesh: error: rank 2 was killed by SIGKILL \(out of memory\?\) in step \d+ \([a-z ]+\);"
        r" the other ranks were stopped; nothing is saved but metrics in "
        + re.escape(f"{long_run.folder}\n"),
        error,
    )
    assert long_run.survivors() == []


@needs_proc
@pytest.mark.parametrize("long_run", [("--timeout_s=3",)], indirect=True)
def test_a_hung_rank_is_named_after_the_timeout(long_run: LongRun) -> None:
    os.kill(long_run.ranks[1], signal.SIGSTOP)
    code, error = long_run.end()
    assert code == 1
    assert re.fullmatch(
        r"seqmesh: error: rank 1 did not answer for run.timeout_s=3 seconds in step \d+ \([a-z ]+\);"
        r" the other ranks were stopped; nothing is saved but metrics in "
        + re.escape(f"{long_run.folder}\n"),
        error,
    )
    assert long_run.survivors() == []


def test_a_diverging_run_ends_with_one_line(text: Path, tmp_path: Path) -> None:
    diverging = ("--lr=1e30", "--warmup=0", "--steps=50")
    arguments = ("--data", str(text), *diverging, "--folder", str(tmp_path / "run"))
    done = seqmesh_command("train", *TINY, *arguments, cwd=tmp_path)
    assert "lower train.lr" in one_line_error(done, code=1)


def test_a_time_limit_stops_all_ranks_at_the_same_step(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    limits = ("--steps=100000", "--minutes=0.03", "--compare-steps=1")
    arguments = ("--data", str(text), *limits, "--folder", str(folder))
    done = seqmesh_command("train", *TINY, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 1 <= json.loads((folder / "report.json").read_text())["steps"] < 10000
