"""A call in a process of its own, of which nothing stays; and that no rank is forked from one with a GPU."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from model_folders import save_config

from seqmesh.processes import ChildError, in_a_child

ROOT = Path(__file__).parents[1]


def _set_and_tell() -> tuple[int, str]:
    os.environ["SEQMESH_TEST"] = "set"
    return os.getpid(), os.environ["SEQMESH_TEST"]


def test_a_child_answers_and_leaves_nothing() -> None:
    number, value = in_a_child(_set_and_tell)
    assert number != os.getpid()
    assert value == "set"
    assert "SEQMESH_TEST" not in os.environ


def _raises(error: Exception) -> None:
    raise error


def test_a_mistake_of_the_user_stays_one() -> None:
    with pytest.raises(ValueError, match=r"^no such folder; pass another$"):
        in_a_child(partial(_raises, ValueError("no such folder; pass another")))


def test_another_error_and_a_death_are_told_in_one_line() -> None:
    with pytest.raises(ChildError, match=r"^TypeError: not a number$"):
        in_a_child(partial(_raises, TypeError("not a number\nbut a list")))
    with pytest.raises(ChildError, match=r"^its process ended with exit code 3$"):
        in_a_child(partial(os._exit, 3))


MODELING = "transformers.models.qwen3_next.modeling_qwen3_next"
"""Imports flash-linear-attention where that is installed, which claims the GPU."""
BEFORE_RANKS = f"""
import sys, torch
from seqmesh.cli import main

def told(*_, **__):
    print("ranks start", "{MODELING}" in sys.modules, torch.cuda.is_initialized())
    raise ValueError("told")

torch.cuda.device_count = lambda: 2
for module in ("seqmesh.processes", "seqmesh.train.launch"):
    __import__(module)
    vars(sys.modules[module])["start_ranks"] = told
sys.exit(main())
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "--device", "cuda", "--model", "MODEL"),
        ("train", "--folder", "RUN", "--model.folder", "MODEL", "--device", "cuda", "--seq_len", "256"),
    ],
    ids=lambda given: given[0],
)
def test_no_kernels_of_a_model_are_loaded_before_ranks_of_a_gpu_are_forked(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    names = {"MODEL": save_config("qwen3_next", tmp_path / "model"), "RUN": str(tmp_path / "run")}
    found = subprocess.run(
        [sys.executable, "-c", BEFORE_RANKS, *(names.get(word, word) for word in arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "ranks start False False" in found.stdout, found.stdout + found.stderr
