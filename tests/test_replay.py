"""A failing case can be replayed from what the test printed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import Case
from replay import parse

from seqmesh import layouts, masks
from seqmesh.masks import Band, Mask

CASES = [
    Case(mask=masks.documents([5, 9]) & masks.sliding_window(14, 4), ulysses=2, sinks=True, softcap=1.5),
    Case(mask=Mask(8, 9, (Band(0, 8, 0, 9, None, 3),)), ring=2, dtype=torch.bfloat16, own_keys=True),
    Case(mask=masks.causal(12), ring=3, layout=layouts.striped(12, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=["documents", "cross", "own layout"])
def test_a_printed_case_is_the_case(case: Case) -> None:
    assert parse(repr(case)) == case


def test_a_case_is_replayed_under_torchrun() -> None:
    program = str(Path(__file__).parent / "replay.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    case = repr(Case(mask=masks.documents([5, 9]), ulysses=2, sinks=True))
    done = subprocess.run(
        [*launcher, program, case], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == ["out", "dq", "dk", "dv", "dsinks"]
    assert all(float(error) < 1e-12 for _, error in lines)
