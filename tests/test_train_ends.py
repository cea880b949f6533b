"""How runs of `seqmesh train` end early: Ctrl-C, killed, hung and diverging ranks, a time limit."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from train_command import TIMEOUT_S, TINY, command, environment, one_line_error, seqmesh_command


class LongRun:
    """A run that would go on for long, its first step done; the process group is its own."""

    def __init__(self, text: Path, folder: Path, *more: str) -> None:
        arguments = ("train", *TINY, "--data", str(text), "--steps", "100000", "--folder", str(folder), *more)
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
    assert len(error.splitlines()) == 1
    assert error.startswith("seqmesh: stopped by Ctrl-C after ")
    assert long_run.survivors() == []


@needs_proc
def test_a_terminated_parent_leaves_no_rank_behind(long_run: LongRun) -> None:
    long_run.process.terminate()
    assert long_run.end() == (128 + signal.SIGTERM, "")
    assert long_run.survivors() == []


@needs_proc
def test_a_killed_rank_is_named_and_the_others_end(long_run: LongRun) -> None:
    os.kill(long_run.ranks[2], signal.SIGKILL)
    code, error = long_run.end()
    assert code == 1
    assert error.splitlines() == [
        "seqmesh: error: rank 2 was killed by SIGKILL (out of memory?); the other ranks were stopped"
    ]
    assert long_run.survivors() == []


@needs_proc
@pytest.mark.parametrize("long_run", [("--timeout_s=3",)], indirect=True)
def test_a_hung_rank_is_named_after_the_timeout(long_run: LongRun) -> None:
    os.kill(long_run.ranks[1], signal.SIGSTOP)
    code, error = long_run.end()
    assert code == 1
    assert error.splitlines() == [
        "seqmesh: error: rank 1 did not answer for run.timeout_s=3 seconds; the other ranks were stopped"
    ]
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
