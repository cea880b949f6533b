"""`seqmesh bench hybrid`: bytes and buffers of a rank are as promised, and the program runs."""

from pathlib import Path

from train_command import python_program

PROGRAM = """
from seqmesh.bench.hybrid import QUICK, measure_hybrid
time, sent, *buffers = measure_hybrid(QUICK)
assert time.ok is None and time.values["wall_ratio_median"] > 0
assert sent.ok and sent.values["bytes_sent"] == sent.values["scheduled_bytes"] > 0
assert [round(figure.values["share"], 1) for figure in buffers][0] == 1.0
print(*(figure.values["share"] for figure in buffers))
"""


def test_what_a_rank_sends_is_scheduled_and_what_it_holds_falls_with_ranks(tmp_path: Path) -> None:
    done = python_program(PROGRAM, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two, four = map(float, done.stdout.split())
    assert one == 1
    assert 0.9 < two < 1.3
    assert 0.9 < four < 1.3
