"""Table 2: every printed cell follows from the rules, the corrections from what the schedules really send."""

import json
import re
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import pytest

from seqmesh import layouts, masks
from seqmesh.layouts import load
from seqmesh.planner.cost.fused_memory import FusedMemory
from seqmesh.planner.cost.step_loads import Loads
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import known_models, load_model
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.paper.compare import PRINTED, Comparison, compare
from seqmesh.planner.paper.compare_text import as_record, render
from seqmesh.planner.paper.symbols import cost, shown, symbol
from seqmesh.planner.paper.table2 import methods, mixed
from seqmesh.planner.paper.table2_numbers import activations_per_token
from seqmesh.schedule.heads import split_heads
from seqmesh.schedule.traffic import attention_traffic

pytestmark = pytest.mark.fast


DOCS = Path(__file__).parent.parent / "docs" / "table2.md"
PAPER = """
SP-Ulysses | all-reduce | 12d² | 8 all-to-all | (8/N)·bsLd | heads / L | P+G | 6P | A/N
SP-Ring | all-reduce | 12d² | P2P | 4·bsLd | L / L | P+G | 6P | A/N
DP | all-reduce | 12d² | none | 0 | bs / bs | P+G | 6P | A/N
ZeRO-1 | all-gather + reduce-scatter | 12d² | none | 0 | | P+G | 6P/N | A/N
Unified + ZeRO-1 | AG + RS | 12d² | P2P + 8 a2a | <= 4·bsLd | heads / L | P+G | 6P/N | A/N
Unified + ZeRO-2 | AG + RS | 12d² | same | <= 4·bsLd | heads / L | P+G/N | 6P/N | A/N
Unified + ZeRO-3 | 2 AG + RS | 18d² | same | <= 4·bsLd | heads / L | (P+G)/N | 6P/N | A/N
TP | 0 | 0 | 4 all-reduce | 8·bsLd | heads / d | (P+G)/N | 6P/N | αA
TP-sp | 0 | 0 | 6 AG + 4 RS | 10·bsLd | heads / d | (P+G)/N | 6P/N | A/N
"""
TABLE = [[cell.strip() for cell in line.split("|")] for line in PAPER.strip().splitlines()]
GPT2 = ModelShape(
    name="gpt2-style",
    layers=1,
    hidden=64,
    heads=8,
    kv_heads=8,
    head_dim=8,
    intermediate=256,
    vocabulary=1000,
    gated=False,
)


def llama3(**changes: int) -> Comparison:
    given = {"ranks": 8, "batch": 8, "seq_len": 8192} | changes
    return compare(load_model("llama3-8b"), **given)


def cells(comparison: Comparison, name: str) -> dict[str, str]:
    return asdict(next(row for row in comparison.rows if row.name == name).corrected)


@pytest.mark.parametrize(("number", "expected"), list(enumerate(TABLE)), ids=[row[0] for row in TABLE])
def test_every_printed_cell_follows_from_the_rules(number: int, expected: list[str]) -> None:
    row = llama3().rows[number]
    assert row.printed is not None
    assert [row.name, *asdict(row.printed).values()] == expected


def test_the_printed_parameter_column_is_half_of_what_its_own_rule_gives() -> None:
    for method, row in zip(methods(PRINTED), TABLE, strict=True):
        by_rule = cost(method.parameter_calls)
        assert str(by_rule * Fraction(1, 2)) == row[2]
        assert str(by_rule) == {"12d²": "24d²", "18d²": "36d²", "0": "0"}[row[2]]


def test_the_printed_bound_holds_on_every_mesh_and_is_reached() -> None:
    units = {"bsLd": Fraction(1)}
    for u in range(1, 65):
        for r in range(1, 65):
            if u * r > 1:
                moved = mixed(PRINTED, r, u, exact=False).value(units, {"N": u * r, "u": u})
                assert moved <= 4
                assert (moved == 4) >= (u == 1)


def test_grouped_heads_change_the_printed_rows_as_the_text_says() -> None:
    printed = {row.name: row.printed_groups for row in llama3().rows}
    assert printed["SP-Ulysses"] == "(4/N)·bsLd + (4/N)·bsLd/G"
    assert printed["SP-Ring"] == "4·bsLd/G"
    assert printed["TP-sp"] == "10·bsLd"


def test_a_gpt2_block_gives_the_column_that_the_rule_demands() -> None:
    costs = {
        row.name: row.corrected.parameter_cost for row in compare(GPT2, ranks=2, batch=2, seq_len=64).rows
    }
    # 2 norms of 64 beside 12 x 64²: the printed 12d² leaves them out.
    assert shown(Fraction(GPT2.layer_matmul_parameters, 64**2)) == "12"
    assert costs["DP"] == "24.06d²"
    assert costs["Unified + ZeRO-3"] == "36.09d²"
    assert costs["EP (derived)"] == "8.06d²"


@pytest.mark.parametrize(("model", "block"), [("llama2-7b", "12.06"), ("llama3-8b", "13.00")])
def test_a_block_has_the_models_own_parameters(model: str, block: str) -> None:
    assert shown(compare(load_model(model), ranks=8, batch=1, seq_len=8192).block) == block


def test_corrected_costs_count_groups_and_the_rings_whole_backward() -> None:
    eight = llama3()
    assert cells(eight, "SP-Ulysses")["activation_cost"] == "(4/N)·bsLd + (4/N)·bsLd/G"
    assert cells(eight, "SP-Ring")["activation_cost"] == "8·bsLd/G"
    assert cells(eight, "SP-Ring (seqmesh)")["activation_cost"] == "4.5·bsLd/G"
    assert cells(eight, "Unified + ZeRO-2")["activation_cost"] == "(4/N)·bsLd + (4/N)·bsLd/G + (8/u)·bsLd/G"
    assert cells(eight, "TP-sp")["activation_cost"] == "10·bsLd"
    assert cells(llama3(ranks=16), "SP-Ulysses")["activation_cost"] == "(4/N)·bsLd + (4/K)·bsLd/G"
    assert cells(compare(GPT2, ranks=2, batch=2, seq_len=64), "SP-Ring")["activation_cost"] == "8·bsLd"


def test_expert_parallelism_is_derived_from_its_four_exchanges() -> None:
    row = cells(llama3(), "EP (derived)")
    assert list(row.values()) == [
        "all-reduce",
        "5.00d²",
        "4 all-to-all",
        "(4k/N)·bsLd",
        "bs / experts",
        "Pₐ+Gₐ+(Pₑ+Gₑ)/N",
        "6Pₐ+6Pₑ/N",
        "A/N",
    ]
    (numbers,) = [row.numbers for row in llama3().rows if row.name == "EP (derived)"]
    assert numbers is not None
    assert numbers.activation_elements == 4 * 2 * 8 * 8192 * 4096 // 8
    # One expert a rank: as much as the dense layer.
    assert numbers.states_elements == 2 * load_model("llama3-8b").layer_parameters


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_seqmesh_rows_are_what_the_schedule_sends(ulysses: int, ring: int) -> None:
    """Traffic counts what really leaves a rank, the table whole parts.

    That is (R-1)/R of the ring's part and (U-1)/U of Ulysses' part of the table's figure.
    """
    model, s = load_model("llama3-8b"), 8192
    layout = layouts.zigzag(s, ring)
    received = load.rows_received(masks.causal(s), layout)
    (shares,) = split_heads(model.heads, model.kv_heads, ulysses)
    rows = [s // ring // ulysses] * ulysses
    sent = [
        attention_traffic(
            rows_sent=count,
            rows_received=count,
            rows=rows,
            kv_rows=rows,
            shares=shares,
            ulysses_rank=0,
            row_head_bytes=model.head_dim,
        )
        for count in received
    ]
    bsld, n, groups = s * model.hidden, ulysses * ring, 4
    heads = Fraction(sum(one.heads_forward + one.heads_backward for one in sent), ring)
    moved = Fraction(sum(one.rows_forward + one.rows_backward for one in sent), ring)
    assert heads == Fraction(4 * bsld, n) * (1 + Fraction(1, groups)) * Fraction(ulysses - 1, ulysses)
    assert moved == Fraction(9, 2) * bsld / groups / ulysses * Fraction(ring - 1, ring)


def test_ulysses_beyond_the_kv_heads_moves_the_copies_too() -> None:
    model, s, ulysses = load_model("llama3-8b"), 8192, 16
    (shares,) = split_heads(model.heads, model.kv_heads, ulysses)
    rows = [s // ulysses] * ulysses
    sent = attention_traffic(
        rows_sent=0,
        rows_received=0,
        rows=rows,
        kv_rows=rows,
        shares=shares,
        ulysses_rank=0,
        row_head_bytes=model.head_dim,
    )
    (numbers,) = [
        row.numbers for row in llama3(ranks=16, seq_len=s, batch=1).rows if row.name == "SP-Ulysses"
    ]
    assert numbers is not None
    assert (sent.heads_forward + sent.heads_backward) * Fraction(16, 15) == numbers.activation_elements


@pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b", "gpt2-xl"])
def test_activations_are_those_of_the_memory_model(name: str) -> None:
    model = load_model(name)
    job = Job(model=model, cluster=Cluster(gpu=load_gpu("a800-sxm"), nodes=1, gpus_per_node=1), seq_len=1024)
    of_a_layer = FusedMemory(job, Loads(job)).layer_activations(Point())
    assert sum(of_a_layer.values()) == 2 * 1024 * sum(activations_per_token(model))


def test_numbers_are_the_formulas_at_the_models_sizes() -> None:
    rows = {row.name: row for row in llama3(ranks=16, batch=1, seq_len=65536).rows}
    unified, ring = rows["Unified + ZeRO-3"].numbers, rows["SP-Ring"].numbers
    assert unified is not None
    assert ring is not None
    bsld, layer = 65536 * 4096, load_model("llama3-8b").layer_parameters
    assert rows["Unified + ZeRO-3"].note == "u8 r2"
    assert unified.activation_elements == bsld * 4 // 16 + bsld // 16 + bsld * 8 // 8 // 4
    assert ring.activation_elements == 2 * bsld
    assert (unified.parameter_elements, unified.states_elements) == (3 * layer, 2 * layer // 16)
    assert (ring.optimizer_elements, unified.optimizer_elements) == (6 * layer, 6 * layer // 16)


def test_what_cannot_be_spread_has_a_reason_and_no_numbers() -> None:
    rows = {row.name: row for row in llama3(ranks=64, batch=1).rows}
    for name in ("SP-Ulysses", "DP", "ZeRO-1", "TP", "TP-sp", "EP (derived)"):
        assert rows[name].numbers is None
        assert rows[name].note
    assert rows["SP-Ring"].numbers is not None


def test_differences_name_every_cell_that_contradicts_the_print() -> None:
    comparison = llama3()
    listed = {(name, difference.column) for difference in comparison.differences for name in difference.rows}
    for row in comparison.rows:
        if row.printed is not None:
            for column in ("parameter_cost", "activation_cost"):
                differs = getattr(row.printed, column) != getattr(row.corrected, column)
                assert differs == ((row.name, column.replace("_", " ")) in listed)


def test_other_blocks_than_the_tables_are_refused() -> None:
    latent = replace(load_model("deepseek-v3"), mixture=None)
    for model in (latent, load_model("mixtral-8x7b"), load_model("gemma3-27b")):
        with pytest.raises(ValueError, match="Table 2 is of one plain block; compare a dense model"):
            compare(model, ranks=8, batch=8, seq_len=8192)


@pytest.mark.parametrize("ranks", [3, 16, 1024])
@pytest.mark.parametrize("model", [name for name in known_models() if load_model(name).is_plain])
def test_the_text_stays_within_a_terminal(model: str, ranks: int) -> None:
    text = render(compare(load_model(model), ranks=ranks, batch=4, seq_len=65536))
    assert max(map(len, text.splitlines())) <= 150


def test_the_record_is_json_with_bytes() -> None:
    record = json.loads(json.dumps(as_record(llama3()), allow_nan=False))
    ring = next(row for row in record["rows"] if row["name"] == "SP-Ring")
    assert ring["bf16_bytes"]["activation"] == 2 * ring["numbers"]["activation_elements"]
    assert record["block"] == pytest.approx(13.0, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": 1}, "ranks=1"),
        ({"batch": 0}, "batch=0"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"top_k": 9}, "top_k=9"),
    ],
)
def test_a_senseless_comparison_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        llama3(**changes)


def test_like_terms_add_up() -> None:
    assert str(symbol("bsLd", 4) / "N" + symbol("bsLd", 4) / "N") == "(8/N)·bsLd"
    assert str(symbol("bsLd") + symbol("bsLd", -1)) == "0"


def test_the_page_shows_these_tables() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCS.read_text().splitlines()
        if line.startswith("| ")
    ]
    for expected in TABLE:
        assert expected in rows
    for row in llama3().rows:
        assert [row.name, *asdict(row.corrected).values()] in rows
