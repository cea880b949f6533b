"""The examples, as their first lines say to run them: torchrun's ranks do what one rank does."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
TIMEOUT_S = 180
PYTORCH_AT_EXIT = "terminate called without an active exception"
"""What a process says if a thread of gloo lets go of a tensor while Python ends.

Rare, on loaded machines, after all was done (pytorch/pytorch pull request 179291).
"""


def printed(name: str, ranks: int, arguments: tuple[str, ...]) -> str:
    """What an example prints."""
    launcher = (
        ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}") if ranks > 1 else ()
    )
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, *launcher, str(EXAMPLES / name), *arguments],
            env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if PYTORCH_AT_EXIT not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def numbers(name: str, ranks: int, arguments: tuple[str, ...]) -> list[list[float]]:
    """What an example prints of each step."""
    lines = [line for line in printed(name, ranks, arguments).splitlines() if line.startswith("step ")]
    found = [[float(number) for number in re.findall(r"\d+\.\d+", line)] for line in lines]
    assert len(found) == 3
    assert all(found)
    return found


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("plain_pytorch.py", ("--ulysses", "2", "--ring", "2")),
        ("plain_pytorch.py", ("--tp", "2", "--ring", "2")),
        ("hugging_face_trainer.py", ("--ulysses", "2", "--ring", "2")),
        ("hugging_face_trainer.py", ("--dp", "2", "--ring", "2")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_example_on_four_ranks_prints_the_numbers_of_one(
    name: str, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = numbers(name, 1, ())
    for found, expected in zip(numbers(name, 4, arguments), alone, strict=True):
        assert found == pytest.approx(expected, abs=2e-5)


def test_flux_on_four_ranks_writes_the_picture_of_one(tmp_path: Path) -> None:
    from PIL import Image

    size = ("--height", "336", "--width", "208")  # 21 x 13 image tokens
    pictures = []
    for ranks in (1, 4):
        out = tmp_path / f"{ranks}.png"
        assert f"{out}: 208 x 336 pixels" in printed("flux.py", ranks, (*size, "--out", str(out)))
        pictures.append(np.asarray(Image.open(out)).astype(int))
    alone, together = pictures
    assert alone.std() > 5
    # fp32 sums in another order: a value between two of the 256 levels may go either way.
    assert abs(alone - together).max() <= 1
