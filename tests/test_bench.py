"""The benchmark's exact parts: bytes, memory, loads, and a table that says what was measured.

Nothing here judges a time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import Ranks

from seqmesh.bench import dealing, schedules
from seqmesh.bench.costs import Case, bytes_cases, bytes_of, memory_cases, memory_of
from seqmesh.bench.figures import Spread
from seqmesh.bench.report import run_bench

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("case", bytes_cases(256, [(2, 1), (1, 2), (2, 2)]), ids=str)
def test_bytes_counted_are_the_schedules_and_not_zero(ranks: Ranks, case: Case) -> None:
    for found in ranks.run(case.ulysses * case.ring, bytes_of, case):
        assert (found.forward, found.backward) == (found.forward_scheduled, found.backward_scheduled)
        assert found.forward + found.backward > 0


@pytest.mark.parametrize("case", memory_cases(512, [(2, 2)]), ids=str)
def test_extra_memory_is_a_small_multiple_of_the_local_kv(ranks: Ranks, case: Case) -> None:
    for found in ranks.run(4, memory_of, case):
        assert 0 < found.forward <= 3
        assert 0 < found.backward <= 6


def test_documents_of_a_given_count_add_up() -> None:
    lengths = schedules.given_count(2**20, 1000, seed=0)
    assert len(lengths) == 1000
    assert sum(lengths) == 2**20
    assert min(lengths) >= schedules.SHORTEST_DOCUMENT
    assert lengths != schedules.given_count(2**20, 1000, seed=1)


def test_documents_of_a_given_tail_fill_the_batch() -> None:
    tail = schedules.Tail(mu=5, sigma=1.0, tokens=5000)
    assert sum(schedules.given_tail(tail, seed=0)) == 5000


def test_schedule_times_come_in_pairs_of_layout_and_schedule() -> None:
    batch = schedules.TimedBatch(name="small", tokens=4096, documents=20, ring=4, target_s=60.0, seeds=2)
    figures = list(schedules.measure_times([batch]))
    assert [figure.what for figure in figures][:2] == ["small, auto: layout", "small, auto: schedule"]
    assert len(figures) == 2 * len(schedules.LAYOUTS)
    for figure in figures:
        assert figure.values["milliseconds_min"] <= figure.values["milliseconds_median"]
        assert not figure.exact


def test_balanced_documents_are_balanced_where_zigzag_is_not() -> None:
    area, rows = schedules.measure_load([schedules.Tail(mu=7, sigma=1.3, seeds=1)])
    assert area.ok
    assert rows.ok
    assert area.values["balanced_area_ratio"] <= 1.05 < area.values["zigzag_area_ratio"]


def test_a_step_waits_for_the_busiest_of_each_column_or_of_the_whole() -> None:
    by_hand = dealing.waiting([9.0, 1.0, 2.0, 8.0], [[(0,), (2,)], [(1,), (3,)]])
    assert by_hand == (17 / 10, 11 / 10)
    evened = dealing.waiting([9.0, 1.0, 2.0, 8.0], [[(0,), (1,)], [(3,), (2,)]])
    assert evened == (11 / 10, 10 / 10)


def test_evened_sequences_wait_less_than_those_in_turn_and_a_pool_hardly_at_all() -> None:
    tail = schedules.Tail(mu=5, sigma=1.5, seeds=1)
    columns, end = dealing.measure_dealing([dealing.Steps(tail=tail, seq_len=4096, ranks=8, steps=2)])
    assert columns.ok
    assert end.ok
    assert 1 <= columns.values["evened"] < columns.values["in_turn"]
    assert 1 <= end.values["evened"] <= columns.values["evened"]
    work, busiest, total = dealing.measure_pool([schedules.Tail(mu=8, sigma=1.5, seeds=1)])
    assert work.ok
    assert work.values["pool"] < 1.01 < work.values["groups"]
    assert 0 < busiest.values["rows_ratio"] < total.values["rows_ratio"]


def test_one_pool_is_planned_to_be_faster_than_groups_that_are_packed_by_tokens() -> None:
    """The claim of docs/planner_results.md, for the first draw of the longer documents."""
    wide, ring = dealing.measure_planned([schedules.Tail(mu=8, sigma=1.5, seeds=1)])
    assert wide.ok
    assert 1 < ring.values["speedup_mean"] < wide.values["speedup_mean"] < 2.5


def test_a_models_flops_are_those_of_the_trainer() -> None:
    from seqmesh.planner.inputs.models import load_model
    from seqmesh.train.config import Config, ModelConfig
    from seqmesh.train.model import sizes_of

    shape = load_model(dealing.MODEL)
    model = ModelConfig(
        hidden=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        intermediate=shape.intermediate,
        vocabulary=shape.vocabulary,
    )
    sizes = sizes_of(Config(model=model))
    expected = sizes.step_flops(1000, sizes.attention_work([500, 300, 200]))
    assert dealing.Flops()(1000, 500 * 501 // 2 + 300 * 301 // 2 + 200 * 201 // 2) == expected


def test_a_spread_is_the_median_with_its_range() -> None:
    spread = Spread.of([3.0, 1.0, 2.0])
    assert spread.text(1, " s") == "2.0 s (1.0-3.0)"
    assert spread.values("x") == {"x_median": 2.0, "x_min": 1.0, "x_max": 3.0}


def test_a_json_path_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name a file in an existing folder"):
        run_bench(True, tmp_path / "missing" / "bench.json")


def test_the_quick_benchmark_prints_every_section_and_writes_json(tmp_path: Path) -> None:
    """In a process of its own: ranks are forked, which must come before any tensor work."""
    program = """
import pathlib, sys
from seqmesh.bench.report import run_bench
sys.exit(run_bench(True, pathlib.Path(sys.argv[1])))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "b.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stderr == ""
    written = json.loads((tmp_path / "b.json").read_text())
    figures = written["figures"]
    assert written["torch"]
    assert written["machine"]
    assert len({figure["section"] for figure in figures}) == 8
    for figure in figures:
        assert figure["section"][:40] in done.stdout
        if figure["exact"]:
            assert figure["ok"] is True
        if "wall_ratio_median" in figure["values"]:
            assert figure["ok"] is None
            assert figure["values"]["wall_ratio_median"] > 0
