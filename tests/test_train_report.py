"""What a run tells a person: the start, TensorBoard, where time and bytes went, what was expected of it."""

import json
import re
import sys
from pathlib import Path

import pytest
from model_folders import save_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_command import TINY, one_line_error, seqmesh_command

from seqmesh.train import metrics_log
from seqmesh.train.events import StepMetrics
from seqmesh.train.metrics_log import MetricsLog, read_metrics


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Standard output and folder of a run on ulysses 2 x ring 2 with ZeRO-3."""
    home = tmp_path_factory.mktemp("home")
    arguments = (
        "--steps=3",
        "--zero=3",
        "--tensorboard=true",
        "--trace=true",
        "--folder=run",
        "--data",
        str(text),
    )
    done = seqmesh_command("train", *TINY, *arguments, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout, home / "run"


def test_the_start_shows_the_mesh_and_the_memory_before_the_first_step(run: tuple[str, Path]) -> None:
    before, _ = run[0].split("step 1/3")
    assert "mesh       4 rank(s)" in before
    assert "  ulysses  2      0 1          tokens, then heads" in before
    assert "of tensors expected on rank 0" in before
    assert "GiB a rank" in before.split("available")[1]


def test_what_was_expected_to_be_sent_is_what_was_sent(run: tuple[str, Path]) -> None:
    report = json.loads((run[1] / "report.json").read_text())
    expected = report["expected"]["sent"]
    # Of four ranks, of which those of a ring differ in the rows that they send.
    assert report["sent"]["fsdp"] == pytest.approx(4 * expected["fsdp"], rel=1e-2)
    assert report["sent"]["ulysses"] == pytest.approx(4 * expected["ulysses"], rel=1e-2)
    assert 0 < expected["ring"] < report["sent"]["ring"]
    assert report["sent"]["ulysses"] + report["sent"]["ring"] == pytest.approx(report["bytes_per_step"])


def test_time_has_parts_that_add_up_and_memory_is_told_by_kind(run: tuple[str, Path]) -> None:
    metrics = [json.loads(line) for line in (run[1] / "metrics.jsonl").read_text().splitlines()]
    for step in metrics:
        assert 0 < step["data_seconds"] + step["waiting_seconds"] < step["seconds"]
    report = json.loads((run[1] / "report.json").read_text())
    held, expected = report["held_bytes"], report["expected"]["memory"]
    assert held["parameters"] <= expected["parameters"] < 1.2 * held["parameters"]  # which has buffers too
    assert held["optimizer"] == pytest.approx(expected["optimizer"], rel=1e-2)
    assert report["grown_memory_bytes"] > sum(held.values())
    assert report["predicted"] is None
    for line in ("time       ", "plan       not priced", "sent       ", "memory     peak"):
        assert f"\n{line}" in run[0]


def test_tensorboard_shows_every_step(run: tuple[str, Path]) -> None:
    shown = EventAccumulator(str(run[1] / "tensorboard")).Reload()
    metrics = read_metrics(run[1], 3)
    assert [event.step for event in shown.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in shown.Scalars("loss")] == pytest.approx([step.loss for step in metrics])
    assert shown.Scalars("bytes sent/fsdp")[0].value == metrics[0].sent["fsdp"] > 0
    assert set(metrics_log._CURVES.values()) < set(shown.Tags()["scalars"])


def step(number: int) -> StepMetrics:
    fields = dict.fromkeys(StepMetrics.__dataclass_fields__, number)
    return StepMetrics(**{**fields, "layout": "zigzag", "bytes_agree": True, "sent": {}})


def test_a_resumed_log_begins_with_the_earlier_steps_alone(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, [], tensorboard=False) as log:
        for number in (1, 2, 3):
            log.add(step(number))
    earlier = read_metrics(tmp_path, 2)
    assert earlier == [step(1), step(2)]
    with MetricsLog(tmp_path, earlier, tensorboard=False) as log:
        log.add(step(3))
        assert read_metrics(tmp_path, 3) == [step(1), step(2), step(3)]
    assert read_metrics(tmp_path, 4) == []


def test_tensorboard_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"run\.tensorboard needs the package tensorboard"):
        MetricsLog(tmp_path, [], tensorboard=True)


def test_a_dry_run_says_how_it_would_start_and_leaves_nothing(text: Path, tmp_path: Path) -> None:
    """Of a recipe for GPUs, of which there are none."""
    mesh = (
        "--device=cuda",
        "--dp_shard=8",
        "--ring=2",
        "--ulysses=4",
        "--sequences=8",
        "--zero=3",
        "--precision=bf16",
    )
    done = seqmesh_command("train", *TINY, *mesh, "--data", str(text), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mesh       64 rank(s)" in done.stdout
    assert "of tensors expected on rank 0" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_a_run_would(text: Path, tmp_path: Path) -> None:
    done = seqmesh_command("train", "--ulysses=8", "--data", str(text), "--dry-run", cwd=tmp_path)
    assert "leaves 4 ranks without a head" in one_line_error(done)


def test_a_dry_run_of_a_mixture_takes_its_routers_to_be_even(text: Path, tmp_path: Path) -> None:
    mixture = ("--architecture=mixtral", "--model.experts=4", "--experts_per_token=2", "--check_every=1")
    mesh = ("--dp_shard=2", "--zero=3", "--experts=2", "--sequences=2", "--ulysses=1", "--ring=1")
    done = seqmesh_command("train", *TINY, *mixture, *mesh, "--data", str(text), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "of tensors expected on rank 0" in done.stdout
    assert "if routers send every expert as many tokens" in done.stdout
    assert re.search(r"\n  experts +2 +experts of a layer +[0-9.]+ kB\n", done.stdout)


def test_a_dry_run_of_a_mixture_that_computes_by_numbers_says_why_it_has_none(
    text: Path, tmp_path: Path
) -> None:
    save_config("llama4_text", tmp_path)
    mesh = ("--dp_shard=2", "--zero=2", "--sequences=2", "--ulysses=1", "--ring=1")
    given = ("--model.folder", str(tmp_path), "--data", str(text), "--seq_len=256", *mesh)
    done = seqmesh_command("train", *given, "--dry-run", cwd=tmp_path)
    error = one_line_error(done)
    assert "experts choose their tokens; start the run without --dry-run" in error


def test_the_plan_stands_beside_what_was_measured(text: Path, tmp_path: Path) -> None:
    """With a profile of the machine: here of two cores that are said to be fast."""
    profile = tmp_path / "profile.toml"
    profile.write_text(
        "[gpu.cores]\ntflops_fp32 = 1.0\nmemory_gib = 8\nmemory_tb_per_s = 0.01\npcie_gb_per_s = 1\n"
        "network_gb_per_s = 1\n"
    )
    more = ("--steps=1", "--compare_steps=0", "--folder=run", f"--profile={profile}", "--data", str(text))
    done = seqmesh_command("train", *TINY, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    seconds, _, memory, machine, _ = report["predicted"]
    assert machine == "1 x 4 cores"
    assert seconds > 0
    assert memory > 0
    assert f"on 1 x 4 cores; measured {report['step_seconds']:.2f} s" in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "profile.toml' does not exist"), ("[cluster.x]\ngpu = 'a'\n", "has no [gpu.NAME] table")],
)
def test_a_profile_that_says_nothing_of_a_machine_is_refused_before_anything_is_trained(
    content: str | None, message: str, text: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "profile.toml"
    if content is not None:
        profile.write_text(content)
    more = ("--steps=1", "--folder=run", f"--profile={profile}", "--data", str(text))
    done = seqmesh_command("train", *TINY, *more, cwd=tmp_path)
    assert message in one_line_error(done)
    assert not (tmp_path / "run").exists()
