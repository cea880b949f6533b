"""`seqmesh train` as users run it: the real command, its forked ranks, a tiny model and a short run."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from train_command import ROOT, TEXT, TINY, one_line_error, python_program, seqmesh_command
from transformers import ByT5Tokenizer, LlamaForCausalLM

import seqmesh
from seqmesh.trace.expect import expect
from seqmesh.train import data
from seqmesh.train.recipe import load


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics, a dict for each step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(text: Path) -> tuple[Path, str]:
    """The folder and the output of a run on 4 ranks."""
    folder = text.parent / "run"
    more = ("--data", str(text), "--steps=12", "--warmup=2", "--folder", str(folder))
    done = seqmesh_command("train", *TINY, *more, cwd=text.parent)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder, done.stdout


def test_the_report_has_every_figure_and_every_check_passes(finished: tuple[Path, str]) -> None:
    folder, output = finished
    report = json.loads((folder / "report.json").read_text())
    assert report["last_loss"] < report["first_loss"] - 0.3
    assert report["matches_one_rank"] is True
    assert report["compared_steps"] == 3
    assert 0 <= report["largest_loss_difference"] <= 1e-4
    assert 0 <= report["largest_grad_norm_difference"] <= 1e-4
    assert report["bytes_agree"] is True
    assert report["bytes_sent"] == report["bytes_scheduled"] > 0
    assert len(report["peak_memory_bytes"]) == 4
    assert min(report["peak_memory_bytes"]) > 50e6
    assert 0 < report["mfu_mask"] < report["mfu_noncausal"]
    for said in (
        "loss ",
        "|Δloss|",
        "measured = scheduled",
        "MFU ",
        "memory",
        str(folder),
        "ulysses 2 x ring 2",
    ):
        assert said in output
    assert report["torch"] == torch.__version__


def test_the_metrics_have_a_line_for_each_step(finished: tuple[Path, str]) -> None:
    lines = metrics_of(finished[0])
    weights_of_a_layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64  # q and o, k and v, the gated MLP
    weights = 2 * weights_of_a_layer + 32 * 259
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert line["tokens"] == 256
        assert line["labels"] == 256 - line["documents"]
        assert line["bytes_sent"] == line["bytes_scheduled"]
        assert line["flops"] == 6 * weights * 256 + 12 * 2 * line["area"] * 32
        assert line["tokens_per_s"] == pytest.approx(256 / line["seconds"])


def test_the_loss_curve_is_a_picture(finished: tuple[Path, str]) -> None:
    picture = (finished[0] / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_the_written_configuration_runs_again(finished: tuple[Path, str]) -> None:
    config = load(str(finished[0] / "config.toml"))
    assert config.model.hidden == 32
    assert config.train.steps == 12
    assert load(str(finished[0] / "config.toml"), ["--steps=3"]).train.steps == 3


def test_plain_transformers_loads_the_checkpoint_with_the_trained_loss(finished: tuple[Path, str]) -> None:
    """Its loss under plain attention continues the run's curve: same weights, same mathematics."""
    folder = finished[0]
    model = LlamaForCausalLM.from_pretrained(folder / "checkpoint")
    assert model.config._attn_implementation == "sdpa"
    ids = data.encode(TEXT.encode())[None, :256]
    loss = model(ids, labels=ids).loss.item()
    assert loss == pytest.approx(metrics_of(folder)[-1]["loss"], abs=0.3)
    tokenizer = ByT5Tokenizer.from_pretrained(folder / "checkpoint")
    assert tokenizer("fox").input_ids[:-1] == data.encode(b"fox").tolist()


def test_one_rank_trains_the_same_model(finished: tuple[Path, str], text: Path) -> None:
    """The whole run again with the 1 x 1 mesh: the curves agree far beyond the compared steps."""
    together = finished[0]
    alone = text.parent / "alone"
    config = str(together / "config.toml")
    done = seqmesh_command(
        "train", config, "--ulysses=1", "--ring=1", "--folder", str(alone), cwd=text.parent
    )
    assert done.returncode == 0, done.stderr
    for four, one in zip(metrics_of(together), metrics_of(alone), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert four["grad_norm"] == pytest.approx(one["grad_norm"], abs=1e-4)
        assert one["bytes_sent"] == 0
    weights = LlamaForCausalLM.from_pretrained(together / "checkpoint").state_dict()
    weights_alone = LlamaForCausalLM.from_pretrained(alone / "checkpoint").state_dict()
    for name, weight in weights.items():
        # Adam's first steps amplify rounding of tiny gradients.
        torch.testing.assert_close(weight, weights_alone[name], rtol=0, atol=2e-3)


WRONG_INPUT = [
    ("--mesh.rign=4", "unknown key --mesh.rign; did you mean --mesh.ring?"),
    ("--ring=four", "ill-typed"),
    ("--ring=2.5", "ill-typed"),
    ("--ring=0", "at least 1"),
    ("--layout=spiral", "'zigzag'"),
    ("--kv-heads=3", "does not divide model.heads=4; use a divisor of 4"),
    ("--ulysses=16", "leaves 12 ranks without a head; use mesh.ulysses <= 4"),
    ("--hidden=100", "use a multiple of 8"),
    ("--steps", "--steps has no value"),
    ("--lr=nan", "use a finite value"),
    ("missing.toml", "does not exist; give a .toml file"),
    ("unknown.toml", "unknown key mesh.rings; did you mean mesh.ring?"),
    ("typed.toml", 'train.steps = "many" is ill-typed'),
    ("broken.toml", "is not TOML"),
    ("--data=nowhere", "'nowhere' does not exist; pass a text file"),
    ("--data=empty.txt", "has no text"),
    ("--data=binary.bin", "is binary"),
    ("--data=short.txt", "too few for one sequence of 8192; use more text or data.seq_len <= 6"),
    ("--architecture=mamba", "cannot be plugged in"),
    ("--architecture=mixtral", "model.experts=0 with model.architecture='mixtral', whose layers have"),
    ("--model.experts=4", "model.experts_per_token=0 of model.experts=4: use 1 to 4"),
    ("--architecture=lama", "is not a model type of transformers"),
    ("--architecture=gemma2", "gemma2"),
    ("--architecture=olmo3", "sliding windows"),
    ("--seed=99999999999999999999", "at least 0 and below 2^63"),
    ("--seed=-1", "at least 0 and below 2^63"),
    ("--vocabulary=5", "for byte tokens, of which there are 259"),
    ("--device=cuda", "PyTorch sees no CUDA device here"),
    ("--tp=3", "mesh.tp=3 does not divide model.heads=4; use a divisor of 4"),
    ("--tp=4", "mesh.ulysses=2 with model.heads=4 / mesh.tp=4 query heads leaves 1 ranks without a head"),
    ("--pp=4", "model.layers=3 for 4 pipeline stages"),
    ("--pp=2", "1 micro-batches of train.micro_batch=1 sequences for mesh.pp=2 in the order 1f1b"),
    ("--dp_shard=2", "data.sequences=1 does not divide over 2 data-parallel ranks"),
    ("--micro_batch=2", "train.micro_batch=2 does not divide the 1 sequences"),
    ("--zero=4", "ZeRO has stages 0 to 3"),
    ("--precision=bf16", "use train.zero=2 or 3"),
    ("--offload=activations", 'use train.checkpointing="full" too'),
    ("--offload=optimizer", "use train.zero=2 or 3"),
    ("--pipeline=interleaved", "there are no stages to order"),
    ("--shard_norms=true", "no other rank has the same tokens"),
    ("--checkpointing=half", "'selective'"),
    ("--timeout_s=1e7", "use at most 1000000 seconds"),
    ("--data=~nosuchuser/x", "write data.path in full"),
    ("--folder=full", "is not empty; choose a new folder"),
    ("--folder=~nosuchuser/x", "write --folder in full"),
    ("--folder=" + "x" * 5000, "File name too long; choose another with --folder"),
]


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    files = {
        "unknown.toml": "[mesh]\nrings = 4\n",
        "typed.toml": '[train]\nsteps = "many"\n',
        "broken.toml": "[train\n",
        "empty.txt": "",
        "binary.bin": "\0\1",
        "short.txt": "short",
        "full/results": "mine",
    }
    (folder / "full").mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("argument", "said"), WRONG_INPUT, ids=[argument[:40] for argument, _ in WRONG_INPUT]
)
def test_wrong_input_is_one_line_with_a_remedy_and_exit_code_2(
    mistakes: Path,
    argument: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In this process, to be quick: these are all found before a rank starts.

    The next test uses the real command.
    """
    from seqmesh.cli import main

    monkeypatch.chdir(mistakes)
    monkeypatch.setattr(sys, "argv", ["seqmesh", "train", argument])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capfd.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("seqmesh: error: ")
    assert said in printed.err
    assert not (mistakes / "runs").exists()


def test_wrong_input_to_the_real_command_leaves_no_traceback(mistakes: Path) -> None:
    mistyped_key = seqmesh_command("train", "--mesh.rign", "4", cwd=mistakes)
    assert "did you mean --mesh.ring?" in one_line_error(mistyped_key)
    not_text = seqmesh_command("train", "--data", "binary.bin", cwd=mistakes)
    assert "is binary" in one_line_error(not_text)
    mistyped_command = seqmesh_command("trian", cwd=mistakes)
    assert "No such command" in one_line_error(mistyped_command)


def test_version() -> None:
    assert seqmesh_command("--version", cwd=ROOT).stdout == f"seqmesh {seqmesh.__version__}\n"


def test_no_command_shows_the_help() -> None:
    shown = seqmesh_command(cwd=ROOT)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "train" in shown.stdout


@pytest.mark.parametrize(
    ("of_torchrun", "said"), [({}, "late"), ({"RANK": "0", "WORLD_SIZE": "1"}, "")], ids=["alone", "a rank"]
)
def test_a_rank_of_torchruns_ends_without_pythons_own_end(
    of_torchrun: dict[str, str], said: str, tmp_path: Path
) -> None:
    """Where PyTorch's threads may abort it; what it printed is there, and its exit code."""
    program = "import atexit, sys; atexit.register(print, 'late'); from seqmesh.cli import main; main()"
    for argument, code in (("--version", 0), ("--nonsense", 2)):
        done = python_program(program, argument, cwd=tmp_path, **of_torchrun)
        assert done.returncode == code
        assert ("late" in done.stdout) == bool(said)
        assert ("seqmesh 0" in done.stdout) == (code == 0)
        assert ("seqmesh: error" in done.stderr) == (code == 2)


def test_ranks_find_loaded_what_pytorch_loads_on_use(tmp_path: Path) -> None:
    """In a fresh process: this one may have loaded it already."""
    program = """
import sys
from pathlib import Path
from seqmesh.processes import LOADED_ON_USE
from seqmesh.train.launch import run_local
assert "torch._dynamo" not in sys.modules
def work(place, emit):
    emit([name in sys.modules for name in LOADED_ON_USE])
run_local(work, 1, 60.0, print, Path())
"""
    done = python_program(program, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[True, True]\n", "")


def test_mistral_trains_on_documents_longer_than_its_default_window(text: Path) -> None:
    """Its configuration has a window of 4096 tokens, and the first longer document ended the run."""
    from seqmesh.parallel import ParallelDims
    from seqmesh.train.data import read
    from seqmesh.train.trainer import Trainer

    tiny = ("--hidden=32", "--layers=1", "--heads=4", "--kv-heads=2", "--intermediate=64", "--seq_len=5000")
    config = load(None, [*tiny, "--architecture=mistral", "--ulysses=1", "--ring=1"])
    trainer = Trainer(config, read(str(text)), ParallelDims().build(), peak_flops_per_s=1.0)
    assert trainer.step().documents == 1


def test_a_rank_alone_trains_in_bf16_with_states_on_the_host_and_goes_on(text: Path, tmp_path: Path) -> None:
    folder, more = tmp_path / "run", ("--ulysses=1", "--ring=1", "--zero=2", "--precision=bf16")
    more += ("--offload=both", "--checkpointing=full", "--data", str(text), "--steps=4", "--warmup=1")
    more += ("--checkpoint_every=2", "--folder", str(folder))
    done = seqmesh_command("train", *TINY, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "report.json").read_text())["matches_one_rank"] is True
    shutil.rmtree(folder / "checkpoints" / "step-4")
    again = ("--resume", str(folder), "--folder", str(tmp_path / "again"))
    resumed = seqmesh_command("train", str(folder / "config.toml"), *again, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    whole, rest = metrics_of(folder), metrics_of(tmp_path / "again")
    assert [step["loss"] for step in rest[-2:]] == [step["loss"] for step in whole[-2:]]


def test_a_rank_alone_in_bf16_is_traced() -> None:
    config = load(None, ["--ulysses=1", "--ring=1", "--zero=2", "--precision=bf16", "--seq_len=256"])
    assert not expect(config, 260).unknown
