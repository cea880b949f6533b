"""Which checkpoints a run's folder has: named by step, complete or not there at all.

    run/checkpoints/step-40            complete
    run/checkpoints/step-60            complete, the newest: what a run resumes from
    run/checkpoints/step-80.tmp        being written, or left by a run that was killed meanwhile

A checkpoint is written under its .tmp name and renamed when every rank's files are on disk. A rename happens
or does not, so a kill at any moment leaves the last complete one. What goes is renamed before it is deleted,
for the same reason.
"""

import os
import re
import shutil
from pathlib import Path

_STEP = re.compile(r"step-(\d+)")
_UNFINISHED = ".tmp"


def home_of(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run / "checkpoints"


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is, once complete."""
    return home_of(run) / f"step-{step}"


def unfinished_of(run: Path, step: int) -> Path:
    """Where it is while it is written."""
    return home_of(run) / f"step-{step}{_UNFINISHED}"


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint is of."""
    return checkpoint.parent.parent


def complete(run: Path) -> list[Path]:
    """The complete checkpoints of a run, the newest last."""
    home = home_of(run)
    if not home.is_dir():
        return []
    steps = {int(match[1]): path for path in home.iterdir() if (match := _STEP.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def newest(run: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        ValueError: there is none.
    """
    try:
        found = complete(run)
    except OSError as error:
        raise ValueError(f"cannot look into {str(home_of(run))!r}: {error.strerror}") from None
    if not found:
        what = "has no complete checkpoint" if run.is_dir() else "is no folder"
        raise ValueError(
            f"{str(run)!r} {what}; give the folder of a run that has saved one (run.checkpoint_every)"
        )
    return found[-1]


def begin(run: Path, step: int) -> Path:
    """A new folder to write the checkpoint in; what killed runs left is removed."""
    home = home_of(run)
    home.mkdir(parents=True, exist_ok=True)
    for left in home.glob(f"*{_UNFINISHED}"):
        shutil.rmtree(left)
    unfinished = unfinished_of(run, step)
    unfinished.mkdir()
    return unfinished


def finish(unfinished: Path, keep: int) -> None:
    """Give a checkpoint its name, now that it is whole, and remove all but the newest `keep`."""
    home = unfinished.parent
    _to_disk(unfinished)
    unfinished.rename(unfinished.with_suffix(""))
    _to_disk(home)
    for old in complete(home.parent)[:-keep]:
        doomed = old.with_name(old.name + _UNFINISHED)
        old.rename(doomed)
        shutil.rmtree(doomed)


def _to_disk(folder: Path) -> None:
    """Names in a folder are on disk only when the folder itself is."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
