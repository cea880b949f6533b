"""`seqmesh bench generate`: what a rank holds and sends is exact, and the program runs."""

from train_command import python_program

PROGRAM = """
from seqmesh.bench.generation import QUICK, measure_generation
figures = list(measure_generation(QUICK))
assert [figure.ok for figure in figures] == [None, None, True, True], figures
assert all(figure.values["wall_ratio_median"] > 0 for figure in figures[:2])
assert figures[2].values["share"] == 0.25
# 3 ranks, 4 layers, 8 heads of 8 numbers and a log-sum-exp, in fp32; a digest of 8 bytes
assert figures[3].values["bytes_sent"] == 3 * (4 * 8 * (8 + 1) * 4 + 8)
"""


def test_what_a_rank_holds_and_sends(tmp_path) -> None:  # type: ignore[no-untyped-def]
    done = python_program(PROGRAM, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
