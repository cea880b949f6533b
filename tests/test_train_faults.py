"""Checkpoints under faults: ranks killed in a step and in saving, no room, damaged files, another's model."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_runs import BASE, SAVED, Trained, config_of, resumed, trainer_of, undisturbed
from ranks import Ranks
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from train_command import TIMEOUT_S, TINY, command, environment, one_line_error, seqmesh_command

from seqmesh.train import saving, step_folders
from seqmesh.train.checkpoint import Checkpoint
from seqmesh.train.config import Config

MESH = config_of(ring=2, dp_shard=2, zero=3)
VICTIM = 2
"""The rank that is killed."""


def killed(config: Config, run: Path, when: str) -> None:
    """Save, take another step, and save again; one rank does not live to see it."""
    trainer = trainer_of(config)
    for _ in range(SAVED):
        trainer.step()
    trainer.save(run)
    trainer.saver.finish()

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    is_victim = torch.distributed.get_rank() == VICTIM
    if is_victim and when == "between backward and update":
        trainer.model.clip = die  # type: ignore[assignment, method-assign]
    trainer.step()
    blocked = threading.Event()
    if when == "while training goes on":
        FileSystemWriter.write_data = lambda *_: blocked.wait()  # type: ignore[assignment, method-assign]
    if is_victim and when == "before it writes":
        FileSystemWriter.write_data = die  # type: ignore[assignment, method-assign]
    if is_victim and when == "after it has written":
        saving.checksums_of = die  # type: ignore[assignment]
    trainer.save(run)
    if when == "while training goes on":
        trainer.step()
        if is_victim:
            die()
    trainer.saver.finish()


WRITTEN = {
    "between backward and update": None,
    "while training goes on": 0,
    "before it writes": 3,
    "after it has written": 4,
}
"""When a rank is killed -> files of ranks that are left of what was being saved."""


@pytest.mark.parametrize("when", WRITTEN)
def test_a_killed_rank_loses_nothing_that_was_complete(ranks: Ranks, when: str, tmp_path: Path) -> None:
    expected = ranks.run(4, undisturbed, MESH, tmp_path / "undisturbed")[0]
    with pytest.raises(RuntimeError, match=r"the process died|rank \d of 4"):
        ranks.run(4, killed, MESH, tmp_path / "killed", when)
    assert [path.name for path in step_folders.complete(tmp_path / "killed")] == [f"step-{SAVED}"]
    left = tmp_path / "killed" / "checkpoints" / f"step-{SAVED + 1}.tmp"
    written = len(list(left.glob("*.distcp"))) if left.exists() else None
    assert written == WRITTEN[when]
    assert_same(ranks.run(4, resumed, MESH, tmp_path / "killed")[0], expected)


def assert_same(found: Trained, expected: Trained) -> None:
    assert (found.losses, found.norms) == (expected.losses, expected.norms)
    assert all(torch.equal(weight, expected.weights[name]) for name, weight in found.weights.items())


def interrupted_rename(run: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Save as step 10 over steps 2 and 5, and die before the `at`-th change of names or deletion."""
    calls = 0

    def counted(change: object) -> object:
        def wrapped(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            assert callable(change)
            return change(*arguments, **options)

        return wrapped

    unfinished = step_folders.begin(run, 10)
    (unfinished / "file").write_text("10")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", counted(Path.rename))
        patched.setattr(shutil, "rmtree", counted(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            step_folders.finish(unfinished, keep=1)


@pytest.mark.parametrize(("at", "newest"), [(1, "step-5"), (2, "step-10"), (3, "step-10"), (5, "step-10")])
def test_whatever_change_of_names_is_the_last_a_complete_checkpoint_is_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, newest: str
) -> None:
    for step in (2, 5):
        unfinished = step_folders.begin(tmp_path, step)
        (unfinished / "file").write_text(str(step))
        step_folders.finish(unfinished, keep=2)
    interrupted_rename(tmp_path, monkeypatch, at)
    for path in step_folders.complete(tmp_path):
        assert (path / "file").read_text() == path.name.removeprefix("step-")
    assert step_folders.newest(tmp_path).name == newest
    step_folders.finish(step_folders.begin(tmp_path, 20), keep=1)
    assert os.listdir(tmp_path / "checkpoints") == ["step-20"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The folder of a run of the real command, as if it had been killed after its fourth step of six."""
    folder = tmp_path_factory.mktemp("faults") / "run"
    options = ("--steps=6", "--checkpoint_every=1", "--keep=6", "--compare-steps=0", "--ring=1")
    done = seqmesh_command(
        "train", *TINY, *options, "--data", str(text), "--folder", str(folder), cwd=text.parent
    )
    assert done.returncode == 0, done.stderr
    for step in (5, 6):
        shutil.rmtree(folder / "checkpoints" / f"step-{step}")
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "progress.json"])
@pytest.mark.parametrize("how", ["missing", "cut short", "changed"])
def test_a_damaged_file_is_named_in_one_line(copied: Path, name: str, how: str) -> None:
    newest = step_folders.newest(copied)
    if name == "progress.json":
        # What describes the others has no checksum, but a form.
        how = {"changed": "cut short"}.get(how, how)
        (newest / name).write_text((newest / name).read_text().rstrip())
    damage(newest / name, how)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        Checkpoint(newest).check_files()
    assert str(newest / name) in str(refused.value)
    assert "restore the file, or remove its folder" in str(refused.value)


def test_the_command_names_the_damaged_file_and_takes_the_one_before_when_told(copied: Path) -> None:
    newest = step_folders.newest(copied)
    damage(newest / "__0_0.distcp", "changed")
    resume = ("train", str(copied / "config.toml"), "--resume", str(copied))
    done = seqmesh_command(*resume, cwd=copied.parent)
    assert str(newest / "__0_0.distcp") in one_line_error(done)
    exported = seqmesh_command("export", str(copied), cwd=copied.parent)
    assert str(newest / "__0_0.distcp") in one_line_error(exported)
    shutil.rmtree(newest)
    done = seqmesh_command(*resume, cwd=copied.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads((copied / "report.json").read_text())["steps"] == 6


def test_another_models_checkpoint_is_refused_by_what_differs(copied: Path) -> None:
    """By the recipe's key, and by names and shapes where the recipes are equal."""
    resume = ("train", str(copied / "config.toml"), "--resume", str(copied))
    done = seqmesh_command(*resume, "--layers=3", cwd=copied.parent)
    assert "model.layers=3 but run.resume=" in one_line_error(done)
    assert "was trained with 2" in one_line_error(done)
    found = Checkpoint(step_folders.newest(copied))
    shapes = found._shapes("model.")
    own = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    found.check_model(own)
    with pytest.raises(
        ValueError, match=r"has shape \(32,\) for model.norm.weight where the model has nothing"
    ):
        found.check_model({name: shape for name, shape in own.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"has nothing for bias where the model has shape \(1,\)"):
        found.check_model(own | {"bias": (1,)})


def test_a_disk_that_takes_no_more_ends_the_run_with_one_line(copied: Path) -> None:
    """A limit on the size of files stands for a full disk: writing fails in the middle of a shard."""
    newest = step_folders.newest(copied)
    before = {path.name: path.read_bytes() for path in newest.iterdir()}
    done = subprocess.run(
        command("train", str(copied / "config.toml"), "--resume", str(copied)),
        cwd=copied.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    error = one_line_error(done)
    assert "cannot save in " in error
    assert f"make room there; {newest.name} is complete, resume from it" in error
    assert step_folders.newest(copied) == newest
    assert {path.name: path.read_bytes() for path in newest.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    # Not by permissions, which root passes: a file lies where the folder of checkpoints would.
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ValueError, match=r"^cannot save in [^\n]*: File exists [^\n]*make room there$"):
        trainer_of(BASE).save(tmp_path)


def test_what_is_saved_is_what_was_there_when_the_save_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much later it is written, and twice: the copies are used again."""
    expected = undisturbed(BASE, tmp_path / "undisturbed")
    trainer = trainer_of(BASE)
    trainer.save(tmp_path / "run")
    for _ in range(SAVED):
        trainer.step()
    written = threading.Event()
    writes = FileSystemWriter.write_data

    def late(*arguments: object) -> object:
        written.wait()
        return writes(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(FileSystemWriter, "write_data", late)
    trainer.save(tmp_path / "run")
    assert not trainer.saver.has_written()
    trainer.step()
    assert [path.name for path in step_folders.complete(tmp_path / "run")] == ["step-0"]
    written.set()
    trainer.saver.finish()
    assert step_folders.newest(tmp_path / "run").name == f"step-{SAVED}"
    assert_same(resumed(BASE, tmp_path / "run"), expected)


def test_a_save_that_failed_is_told_at_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(BASE)
    trainer.step()
    trainer.save(tmp_path)
    trainer.step()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    trainer.save(tmp_path)
    trainer.step()
    told = r"^cannot save in [^\n]*: No space left on device on rank 0; make room there; step-1 is complete, "
    with pytest.raises(ValueError, match=told):
        trainer.save(tmp_path)
