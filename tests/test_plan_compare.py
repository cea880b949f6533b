"""Table 2: the printed cells are the paper's, the corrections follow from what the schedules really send."""

import json
import re
import unicodedata
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
from seqmesh.planner.paper.compare import Row, as_record, differences, render, rows
from seqmesh.planner.paper.table2 import SpreadLayer, shown, unified
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


def llama3(**changes: int) -> SpreadLayer:
    given = {"ranks": 8, "batch": 8, "seq_len": 8192} | changes
    return SpreadLayer(model=load_model("llama3-8b"), **given)


def row_of(layer: SpreadLayer, name: str) -> Row:
    return next(row for row in rows(layer) if row.name == name)


def cells(layer: SpreadLayer, name: str) -> dict[str, str]:
    return asdict(row_of(layer, name).corrected)


def numbers(layer: SpreadLayer, name: str) -> dict[str, int]:
    found = row_of(layer, name).numbers
    assert found is not None
    return found


@pytest.mark.parametrize(("number", "expected"), list(enumerate(TABLE)), ids=[row[0] for row in TABLE])
def test_every_printed_cell_is_the_papers(number: int, expected: list[str]) -> None:
    row = rows(llama3())[number]
    assert row.printed is not None
    assert [row.name, *asdict(row.printed).values()] == expected


def test_the_printed_parameter_column_is_half_of_what_its_own_rule_gives() -> None:
    """An all-reduce counts 2, a gather or scatter 1."""
    counts = {
        "all-reduce": 2,
        "all-gather + reduce-scatter": 2,
        "AG + RS": 2,
        "2 AG + RS": 3,
        "0": 0,
    }
    layer = llama3()
    for name, operations, printed, *_ in TABLE:
        count = counts[operations]
        assert printed == (f"{12 * count // 2}d²" if count else "0")
        corrected = cells(layer, name)
        assert counts[corrected["parameter_op"]] == count
        assert corrected["parameter_cost"] == {0: "0", 2: "26.00d²", 3: "39.00d²"}[count]
    for row in rows(llama3(ranks=4)):
        if row.printed is not None:
            assert row.numbers is not None
            count = counts[row.printed.parameter_op]
            assert row.numbers["parameter_elements"] == count * layer.model.layer_parameters


def test_the_printed_bound_holds_on_every_mesh_and_is_reached() -> None:
    """By the printed rule a ring moves as much as K 4 times: 4/u + 8/N <= 4."""
    one = Fraction(1)
    for u in range(1, 65):
        for r in range(1, 65):
            if u * r > 1:
                moved = unified(one, one, u * r, u, transfers=4)
                assert moved <= 4
                assert (moved == 4) >= (u == 1)


def test_grouped_heads_change_the_printed_rows_as_the_text_says() -> None:
    printed = {row.name: row.printed_groups for row in rows(llama3())}
    assert printed["SP-Ulysses"] == "(4/N)·bsLd + (4/N)·bsLd/G"
    assert printed["SP-Ring"] == "4·bsLd/G"
    assert printed["TP-sp"] == "10·bsLd"


def test_a_gpt2_block_gives_the_column_that_the_rule_demands() -> None:
    layer = SpreadLayer(model=GPT2, ranks=2, batch=2, seq_len=64)
    costs = {row.name: row.corrected.parameter_cost for row in rows(layer)}
    # 2 norms of 64 beside 12 x 64²: the printed 12d² leaves them out.
    assert shown(Fraction(GPT2.layer_matmul_parameters, 64**2)) == "12"
    assert costs["DP"] == "24.06d²"
    assert costs["Unified + ZeRO-3"] == "36.09d²"
    assert costs["EP (derived)"] == "8.06d²"


@pytest.mark.parametrize(("model", "block"), [("llama2-7b", "12.06"), ("llama3-8b", "13.00")])
def test_a_block_has_the_models_own_parameters(model: str, block: str) -> None:
    assert shown(SpreadLayer(model=load_model(model), ranks=8, batch=1, seq_len=8192).block) == block


def test_corrected_costs_count_groups_and_the_rings_whole_backward() -> None:
    eight = llama3()
    assert cells(eight, "SP-Ulysses")["activation_cost"] == "(4/N)·bsLd + (4/N)·bsLd/G"
    assert cells(eight, "SP-Ring")["activation_cost"] == "8·bsLd/G"
    assert cells(eight, "SP-Ring (seqmesh)")["activation_cost"] == "4.5·bsLd/G"
    assert cells(eight, "Unified + ZeRO-2")["activation_cost"] == "(4/N)·bsLd + (4/N)·bsLd/G + (8/u)·bsLd/G"
    assert cells(eight, "TP-sp")["activation_cost"] == "10·bsLd"
    assert cells(llama3(ranks=16), "SP-Ulysses")["activation_cost"] == "(4/N)·bsLd + (4/K)·bsLd/G"
    ungrouped = SpreadLayer(model=GPT2, ranks=2, batch=2, seq_len=64)
    assert cells(ungrouped, "SP-Ring")["activation_cost"] == "8·bsLd"


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
    amounts = numbers(llama3(), "EP (derived)")
    assert amounts["activation_elements"] == 4 * 2 * 8 * 8192 * 4096 // 8
    # One expert a rank: as much as the dense layer.
    assert amounts["states_elements"] == 2 * load_model("llama3-8b").layer_parameters


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
    told = numbers(llama3(ranks=16, seq_len=s, batch=1), "SP-Ulysses")["activation_elements"]
    assert (sent.heads_forward + sent.heads_backward) * Fraction(16, 15) == told


def kept_of_a_token(model: ModelShape) -> dict[str, int]:
    """Elements that a layer keeps, by module, as the memory model has them: in bf16 half its bytes."""
    job = Job(model=model, cluster=Cluster(gpu=load_gpu("a800-sxm"), nodes=1, gpus_per_node=1), seq_len=1024)
    of_a_layer = FusedMemory(job, Loads(job)).layer_activations(Point())
    assert not any(size % 2048 for size in of_a_layer.values())
    return {name.removeprefix("activations_"): size // 2048 for name, size in of_a_layer.items()}


@pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b", "gpt2-xl"])
def test_activations_are_those_of_the_memory_model(name: str) -> None:
    model = load_model(name)
    # Two sequences on two ranks: each keeps what one of them leaves.
    kept = numbers(SpreadLayer(model=model, ranks=2, batch=2, seq_len=1024), "DP")["kept_elements"]
    assert kept == 1024 * sum(kept_of_a_token(model).values())


def worth(cell: str, values: dict[str, float]) -> float:
    """What a cell amounts to, read as the formula that it is."""
    formula = cell.replace("·", "*").replace("d²", "D")
    formula = re.sub(r"(?<=\d)(?=[^\W\d])", "*", formula)
    return float(eval(formula, {}, {unicodedata.normalize("NFKC", name): x for name, x in values.items()}))


@pytest.mark.parametrize(("name", "ranks"), [("llama2-7b", 8), ("llama2-7b", 64), ("llama3-8b", 16)])
def test_every_number_is_what_its_cell_says(name: str, ranks: int) -> None:
    model = load_model(name)
    layer = SpreadLayer(model=model, ranks=ranks, batch=ranks, seq_len=1024)
    tokens, p = ranks * 1024, model.layer_parameters
    expert = 3 * model.hidden * model.intermediate
    kept = kept_of_a_token(model)
    sizes = {"N": ranks, "u": layer.ulysses, "K": model.kv_heads, "k": 2, "D": model.hidden**2}
    moved = {**sizes, "bsLd": tokens * model.hidden, "G": model.heads // model.kv_heads}
    spread = {**sizes, "P": p, "Pₐ": p - expert, "Pₑ": ranks * expert}
    spread |= {"G": spread["P"], "Gₐ": spread["Pₐ"], "Gₑ": spread["Pₑ"]}
    for row in rows(layer):
        if row.numbers is None:
            continue
        copies = 2 if row.name == "EP (derived)" else 1
        whole = tokens * (kept["norms"] + kept["attention"] + copies * kept["mlp"])
        apart = tokens * (kept["norms"] + (kept["attention"] + kept["mlp"]) / ranks)
        told = row.corrected
        activation_cost = told.activation_cost
        if layer.ulysses == ranks:  # a ring of one rank, which moves nothing
            activation_cost = re.sub(r" \+ \([^+]*/u\).*", "", activation_cost)
        assert list(row.numbers.values()) == [
            pytest.approx(worth(told.parameter_cost, moved), rel=1e-3),  # the table rounds d²
            pytest.approx(worth(activation_cost, moved), abs=1),
            pytest.approx(worth(told.states, spread), abs=1),
            pytest.approx(worth(told.optimizer, spread), abs=1),
            pytest.approx(worth(told.activations, {**sizes, "A": whole, "αA": apart}), abs=1),
        ]


def test_numbers_are_the_formulas_at_the_models_sizes() -> None:
    layer = llama3(ranks=16, batch=1, seq_len=65536)
    zero3, ring = numbers(layer, "Unified + ZeRO-3"), numbers(layer, "SP-Ring")
    bsld, parameters = 65536 * 4096, load_model("llama3-8b").layer_parameters
    assert row_of(layer, "Unified + ZeRO-3").note == "u8 r2"
    assert zero3["activation_elements"] == bsld * 4 // 16 + bsld // 16 + bsld * 8 // 8 // 4
    assert ring["activation_elements"] == 2 * bsld
    assert (zero3["parameter_elements"], zero3["states_elements"]) == (3 * parameters, 2 * parameters // 16)
    assert (ring["optimizer_elements"], zero3["optimizer_elements"]) == (6 * parameters, 6 * parameters // 16)


def test_what_cannot_be_spread_has_a_reason_and_no_numbers() -> None:
    layer = llama3(ranks=64, batch=1)
    for name in ("SP-Ulysses", "DP", "ZeRO-1", "TP", "TP-sp", "EP (derived)"):
        assert row_of(layer, name).numbers is None
        assert row_of(layer, name).note
    assert row_of(layer, "SP-Ring").numbers is not None


def test_differences_name_every_cell_that_contradicts_the_print() -> None:
    layer = llama3()
    listed = {(name, difference.column) for difference in differences(layer) for name in difference.rows}
    for row in rows(layer):
        if row.printed is not None:
            for column in ("parameter_cost", "activation_cost"):
                differs = getattr(row.printed, column) != getattr(row.corrected, column)
                assert differs == ((row.name, column.replace("_", " ")) in listed)


def test_other_blocks_than_the_tables_are_refused() -> None:
    latent = replace(load_model("deepseek-v3"), mixture=None)
    for model in (latent, load_model("mixtral-8x7b"), load_model("gemma3-27b")):
        with pytest.raises(ValueError, match="Table 2 is of one plain block; compare a dense model"):
            SpreadLayer(model=model, ranks=8, batch=8, seq_len=8192)


@pytest.mark.parametrize("ranks", [3, 16, 1024])
@pytest.mark.parametrize("model", [name for name in known_models() if load_model(name).is_plain])
def test_the_text_stays_within_a_terminal(model: str, ranks: int) -> None:
    text = render(SpreadLayer(model=load_model(model), ranks=ranks, batch=4, seq_len=65536))
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


def test_the_page_shows_these_tables() -> None:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCS.read_text().splitlines()
        if line.startswith("| ")
    ]
    for expected in TABLE:
        assert expected in lines
    for row in rows(llama3()):
        assert [row.name, *asdict(row.corrected).values()] in lines
