"""`seqmesh plan` as its users see it: JSON, text, files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from plan_command import JOB, KERNEL, Run
from rich.console import Console

from seqmesh.planner import command
from seqmesh.planner.inputs.point import KEYS

pytestmark = pytest.mark.fast


HEADLINE = "tp=8,ulysses=1,ring=2,dp=1,pp=1,zero=1,checkpointing=none,offload=none,tiling=none,micro_batch=1"


def test_json_has_the_promised_keys_best_first(plan: Run) -> None:
    candidates = plan.json(*JOB)["candidates"]
    promised = {
        *KEYS, "fits", "step_seconds", "step_seconds_lower", "step_seconds_upper", "tokens_per_second",
        "tflops_per_gpu", "mfu_causal", "mfu_noncausal", "memory_bytes", "capacity_bytes", "bytes_per_step",
        "bound_by", "reasons",
    }  # fmt: skip
    assert len(candidates) == 5
    for one in candidates:
        assert promised <= one.keys()
        assert one["fits"] is True
        assert one["reasons"]
        assert one["tp"] * one["ulysses"] * one["ring"] * one["dp"] * one["pp"] == 16
        categories = dict(one["memory_bytes"])
        total = categories.pop("total")
        assert total == sum(categories.values())
        assert total <= one["capacity_bytes"]
        assert one["step_seconds_lower"] <= one["step_seconds"] <= one["step_seconds_upper"]
        assert one["tokens_per_second"] == pytest.approx(208 * 1024 / one["step_seconds"])
        assert one["mfu_causal"] == pytest.approx(one["tflops_per_gpu"] / 312)
        assert one["mfu_causal"] < one["mfu_noncausal"] < 2 * one["mfu_causal"]
    times = [one["step_seconds"] for one in candidates]
    assert times == sorted(times)


def test_the_next_mesh_is_named_however_few_are_shown(plan: Run) -> None:
    pins = ("--pin", "ulysses=1,ring=1,tp=1")
    job = ("--model", "llama3-8b", "--gpu", "h100-sxm", "--seq-len", "8K", "--global-batch", "8", *pins)
    for shown in ("1", "5"):
        assert "Ties: none. It wins: the next, dp4 pp2, takes 21% longer." in plan(*job, "--top", shown)[1]


def test_the_next_mesh_is_another_one(plan: Run) -> None:
    """Of the answer's own mesh another point is faster, with less room to spare."""
    pins = ("--pin", "dp=1,pp=1,tp=1")
    job = ("--model", "llama3-8b", "--gpu", "h100-sxm", "--nodes", "2", "--seq-len", "64K", *pins)
    _, told, _ = plan(*job)
    assert "Run u8 r2" in told
    assert "Ties: none" in told
    assert "the next, u8 r2," not in told


def test_a_pinned_point_is_priced_alone_whether_it_fits_or_not(plan: Run) -> None:
    (fits,) = plan.json(*JOB, "--pin", HEADLINE)["candidates"]
    assert fits["fits"] is True
    assert [fits[key] for key in KEYS] == [
        *(8, 1, 2, 1, 1, 1, "none", "none", "none", 1),
        *("1f1b", 1, 1, False),
    ]
    on_the_ring = HEADLINE.replace("tp=8", "tp=1").replace("ring=2", "ring=16")
    (too_big,) = plan.json(*JOB, "--pin", on_the_ring)["candidates"]
    assert too_big["fits"] is False
    assert too_big["bound_by"] == "memory"
    assert "too much; " in too_big["reasons"][0]


def test_pins_that_leave_nothing_that_fits_still_give_json_with_fits_false(plan: Run) -> None:
    pins = "tp=1,ulysses=8,ring=2,zero=1,checkpointing=none,offload=none,tiling=none"
    candidates = plan.json(*JOB, "--pin", pins)["candidates"]
    assert [one["fits"] for one in candidates] == [False]
    assert plan(*JOB, "--pin", pins)[0] == 2  # without --json, one line


def test_some_pins_leave_the_rest_to_the_search(plan: Run) -> None:
    candidates = plan.json(*JOB, "--pin", "tp=8", "--pin", "zero=1,checkpointing=none")["candidates"]
    assert len(candidates) > 1
    assert {(one["tp"], one["zero"], one["checkpointing"]) for one in candidates} == {(8, 1, "none")}


def test_kernel_mode_ranks_the_splits_by_iterations_per_second(plan: Run) -> None:
    candidates = plan.json(*KERNEL, "--seq-len", "128K")["candidates"]
    tables_order = [(2, 4), (1, 8), (4, 2), (8, 1)]  # of Table 3
    assert [(one["ulysses"], one["ring"]) for one in candidates] == tables_order
    speeds = [one["iterations_per_second"] for one in candidates]
    assert speeds == sorted(speeds, reverse=True)


def test_text_says_what_why_why_not_and_what_would_change_it(plan: Run) -> None:
    code, out, error = plan(*JOB, "--explain")
    assert (code, error) == (0, "")
    for part in (
        "34 legal meshes",
        "predicted, not measured",
        "Memory of a rank",
        "Why this one",
        "Why not the next",
        "What would change",
        "practice 7",
    ):
        assert part in out
    assert max(map(len, out.splitlines())) <= 150


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_answer_and_the_mesh_are_readable_on_a_real_console(
    plan: Run, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """Rendered by rich as wide as the terminal is: nothing that a choice needs is cut or squeezed away."""

    def terminal() -> Console:
        return Console(width=width, force_terminal=True, color_system=None, highlight=False)

    monkeypatch.setattr(command, "console", terminal)
    code, out, _ = plan(*JOB)
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out
    text = " ".join(out.split())
    assert "Run u8 r2, zero 3, loss in tiles: add --emit plan.toml, then seqmesh train plan.toml" in text
    assert text.index("Run u8 r2") < text.index("It takes") < text.index("Ties") < text.index("It rests on")
    assert text.index("It rests on") < text.index("Try first") < text.index("34 legal meshes")
    assert "Why this one" not in out
    (row,) = (line for line in lines if line.startswith("run"))
    for cell in ("u8 r2", "19.5 s", "46.6%", "79.4 GB", "compute"):
        assert cell in row
    assert [line.split()[0] for line in lines if line.startswith(("run", "tie"))] == ["run", "tie"]
    assert ("tokens/s" in out) == (width >= 120)


def test_an_assumption_of_zero_has_no_share_to_move(plan: Run) -> None:
    """What the answer rests on leaves it out; it is no error."""
    code, out, error = plan(*JOB, "--assume", "launch=0", "--explain")
    assert (code, error) == (0, "")
    assert "launch" not in out.partition("What would change")[2].partition("Constants")[0]


def test_explain_prices_the_best_point_in_full_with_every_constant_and_its_source(plan: Run) -> None:
    _, out, _ = plan(*JOB, "--explain")
    for part in (
        "Time of a step",
        "attention kernel",
        "Bytes that a GPU sends",
        "one_nic_per_partial_node",
        "inferred from Table 6",
        "assumption",
    ):
        assert part in out


def test_the_longest_sequence_is_found_and_planned(plan: Run) -> None:
    found = plan.json(*JOB, "--max-seq")
    assert found["seq_len"] > 2**20
    assert found["candidates"][0]["fits"]
    assert found["candidates"][0]["memory_bytes"]["total"] > 0.8 * found["candidates"][0]["capacity_bytes"]


def test_the_traced_memory_of_the_trainers_step_is_shown_beside_the_predicted_one(
    plan: Run, tmp_path: Path
) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 500,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = "--gpu l20 --gpus-per-node 4 --seq-len 8K --pin ulysses=2,ring=2,zero=3 --trace-memory"
    arguments = ("--model", str(tmp_path), "--precision", "bf16", *options.split())
    found = plan.json(*arguments)
    assert (found["ulysses"], found["ring"]) == (2, 2)
    assert found["predicted_over_traced"] == pytest.approx(1, abs=0.01)
    assert found["predicted_bytes"]["total"] == pytest.approx(found["traced_bytes"]["peak_bytes"], rel=0.01)
    code, out, error = plan(*arguments)
    assert (code, error) == (0, "")
    assert "predicted / traced" in out


def test_the_trainers_stack_is_planned_with_its_own_rules_and_memory(plan: Run) -> None:
    job = ("--model", "llama3.2-1b", "--gpu", "h100-sxm", "--seq-len", "32K", "--stack", "trainer")
    (candidate, *_) = plan.json(*job, "--pin", "tp=1,dp=1,zero=0,checkpointing=none")["candidates"]
    parameters = 1.2358e9  # tied embeddings
    assert candidate["memory_bytes"]["parameters"] == pytest.approx(4 * parameters, rel=1e-3)
    sharded = plan.json(*job, "--precision", "bf16", "--pin", "tp=2,zero=3,checkpointing=selective")
    for one in sharded["candidates"]:
        shards = 8 // one["tp"] // one["pp"]
        assert one["memory_bytes"]["parameters"] == pytest.approx(2 * parameters / shards, rel=1e-2)
        assert one["checkpointing"] == "selective"
    code, _, error = plan(*job, "--precision", "bf16", "--pin", "zero=1")
    assert code == 2
    assert "use zero=2 or 3, or --precision fp32" in error


def test_files_are_written_and_what_the_trainer_cannot_run_is_named(
    plan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = plan(*JOB, "--emit", "recipe.toml", "--trace", "step.json", "--plot", "--json")
    assert code == 0
    assert json.loads(out)["candidates"]
    assert "the trainer's are bytes" in error
    assert json.loads(Path("step.json").read_text())["traceEvents"]
    assert Path("plan.png").stat().st_size > 10_000
    assert "zero = 3" in Path("recipe.toml").read_text()


def test_the_published_tables_are_shown_beside_the_predictions(plan: Run) -> None:
    code, out, _ = plan("--published")
    assert code == 0
    assert "DISAGREES" not in out
    assert "Table 6 without tp = 2: Spearman" in out


def test_packed_documents_are_balanced_unless_zigzag_is_asked_for(plan: Run) -> None:
    arguments = (*JOB, "--documents", "lognormal:7,1.3", "--pin", "ring=16,ulysses=1,dp=1,tp=1,pp=1,zero=3")
    auto, zigzag = (
        plan.json(*arguments, "--layout", layout)["candidates"][0] for layout in ("auto", "zigzag")
    )
    assert auto["step_seconds"] < zigzag["step_seconds"]
    assert auto["tflops_per_gpu"] > zigzag["tflops_per_gpu"]


def test_a_hugging_face_config_and_hardware_of_ones_own(plan: Run, tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.toml").write_text(
        '[gpu.mine]\nlike = "a800-sxm"\n[cluster.lab]\ngpu = "mine"\nnodes = 2\ngpus_per_node = 8\n'
    )
    mine = plan.json(
        "--model",
        str(tmp_path),
        "--cluster",
        "lab",
        "--hardware",
        str(tmp_path / "mine.toml"),
        "--seq-len",
        "208K",
    )
    assert mine["candidates"][0]["step_seconds"] == plan.json(*JOB)["candidates"][0]["step_seconds"]


def test_names_that_look_like_markup_are_shown_as_they_are(plan: Run, tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text(
        '[gpu."[/bold]"]\nlike = "a800-sxm"\nsource = "[red]"\n'
        '[model."a[v2]"]\nlayers = 4\nhidden = 512\nheads = 8\nkv_heads = 8\n'
        "head_dim = 64\nintermediate = 1024\nvocabulary = 1000\n"
    )
    code, out, _ = plan("--model", "a[v2]", "--gpu", "[/bold]", "--hardware", str(file), "--explain")
    assert code == 0
    assert out.startswith("a[v2] (")
    assert "[/bold]: [red]" in out


def test_fp32_is_priced_by_the_fp32_rate(plan: Run, tmp_path: Path) -> None:
    arguments = (
        "--model",
        "llama3.2-1b",
        "--gpu",
        "h100-sxm",
        "--seq-len",
        "8K",
        "--pin",
        "dp=1,tp=1,pp=1,ulysses=8,ring=1,zero=1",
    )
    bf16, fp32 = (
        plan.json(*arguments, "--precision", precision)["candidates"][0] for precision in ("bf16", "fp32")
    )
    assert fp32["tflops_per_gpu"] < 67 < bf16["tflops_per_gpu"]
    measured = tmp_path / "cpu.toml"
    measured.write_text(
        '[gpu.cpu]\nlike = "l20"\n'
        "[gpu.new]\ntflops = 100\nmemory_gb = 8\nmemory_tb_per_s = 1\n"
        "pcie_gb_per_s = 1\nnetwork_gb_per_s = 1\n"
    )
    code, _, error = plan(
        "--model", "llama3.2-1b", "--gpu", "new", "--hardware", str(measured), "--precision", "fp32"
    )
    assert code == 2
    assert "has no tflops_fp32" in error


def test_a_measured_profile_overrides_rates_and_assumptions(plan: Run, tmp_path: Path) -> None:
    profile = tmp_path / "measured.toml"
    profile.write_text(
        '[gpu.a800-sxm]\nlike = "a800-sxm"\nmeasured = true\n'
        "[gpu.a800-sxm.assumptions]\nattention_backward = 0.26\n"
    )
    slow = plan.json(*JOB, "--pin", HEADLINE, "--profile", str(profile))["candidates"][0]
    assert slow["step_seconds"] > 1.5 * plan.json(*JOB, "--pin", HEADLINE)["candidates"][0]["step_seconds"]
    assert "measured profile" in plan(*JOB, "--profile", str(profile))[1]


def test_planning_a_thousand_gpus_imports_no_torch() -> None:
    program = """
import sys
from rich.console import Console

from seqmesh import cli
from seqmesh.planner import command
asked = "--model llama3-70b --gpu h100-sxm --nodes 128 --seq-len 128K --global-batch 256 --json"
sys.argv = ["seqmesh", "plan", *asked.split()]
try:
    cli.main()
except SystemExit as stop:
    slow = ("torch", "transformers", "numpy")
    print(stop.code, [m for m in sys.modules if m.split(".")[0] in slow], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr == "0 []\n"
    assert json.loads(done.stdout)["candidates"][0]["fits"]
