"""The planner against runs of other programs, which it was not built on."""

from statistics import fmean

import pytest

from seqmesh.planner.answer import answer
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.errors import MIXTURE_ERROR, STEP_ERROR
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.legality import violations
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.stack import stack_named
from seqmesh.planner.paper.held_out import ROWS, RUNS, HeldOutRow, render
from seqmesh.planner.search import search

pytestmark = pytest.mark.fast


ALL = [row for rows in RUNS.values() for row in rows]


@pytest.mark.parametrize("row", ALL, ids=lambda row: row.name)
def test_a_row_is_priced_on_the_gpus_and_the_batch_that_it_names(row: HeldOutRow) -> None:
    estimate = row.estimate
    assert estimate.gpus == row.gpus
    assert estimate.tokens == row.seq_len * row.batch
    assert row.batch % (row.point.dp * row.point.micro_batch) == 0
    assert row.gpus % row.each == 0
    job = Job(
        model=load_model(row.model),
        cluster=Cluster(gpu=load_gpu(row.gpu), nodes=row.gpus // row.each, gpus_per_node=row.each),
        seq_len=row.seq_len,
        global_batch=row.batch,
        stack=stack_named(row.stack),
    )
    assert list(violations(job, row.point)) == []
    assert row.error == pytest.approx(estimate.tokens_per_second / row.gpus / row.published - 1)


def test_steps_and_tflops_are_compared_as_tokens_a_second() -> None:
    by_name = {row.name: row for row in ROWS}
    assert by_name["M22f"].published == pytest.approx(2048 * 4 / 8 / 1.42)
    # 430 TFLOP/s at 6 N + 6 L h s (causal) a token: 405.5e9 weights in products, 126 layers of 16384.
    linear = 6 * (126 * (16384 * (128 + 8) * 2 * 128 + 3 * 16384 * 53248) + 128256 * 16384)
    assert by_name["L8K"].published == pytest.approx(430e12 / (linear + 6 * 126 * 16384 * 8193), rel=1e-3)


def test_speeds_are_within_15_percent_on_average_and_none_is_35_off() -> None:
    errors = [abs(row.error) for row in ROWS]
    assert fmean(errors) <= 0.15
    assert max(errors) <= 0.35


def test_memory_is_within_15_percent_wherever_it_was_published() -> None:
    assert all(abs(row.memory_error) <= 0.15 for row in ROWS if row.memory_error is not None)


def test_all_rows_are_shown_with_their_failures_and_errors_by_gpu_and_by_length() -> None:
    shown = render().splitlines()
    for row in ALL:
        (line,) = (line for line in shown if line.split()[:1] == [row.name])
        assert f"{row.error:+.0%}" in line
        assert ("FAILS" in line) == (abs(row.error) > 0.35)
    assert any("by GPU: h100-96gb-500w" in line for line in shown)
    assert any("by length: 8K" in line for line in shown)
    assert any("dense" in line for line in shown)
    assert any(line.startswith("  speed by model: gpt-oss-120b") for line in shown)
    assert "10 of 37 rows above 35%" in "\n".join(shown)


def test_dense_runs_that_were_not_seen_are_within_the_goals_too() -> None:
    errors = [abs(row.error) for row in RUNS["dense"]]
    assert fmean(errors) <= 0.11
    assert max(errors) <= 0.20


def test_the_error_bars_of_an_answer_are_those_of_published_runs() -> None:
    dense = fmean(abs(row.error) for row in (*ROWS, *RUNS["dense"]))
    mixtures = fmean(abs(row.error) for row in RUNS["mixtures"])
    assert dense == pytest.approx(STEP_ERROR, abs=0.005)
    assert mixtures == pytest.approx(MIXTURE_ERROR, abs=0.005)
    cluster = Cluster(gpu=load_gpu("h100-sxm"), nodes=2, gpus_per_node=8)
    for model, bar in (("llama3-8b", "(± 9%)"), ("qwen3-30b-a3b", "(± 33%)")):
        costs = CostModel(Job(model=load_model(model), cluster=cluster, seq_len=8192, global_batch=32))
        assert bar in answer(costs, search(costs, {}))[1]
