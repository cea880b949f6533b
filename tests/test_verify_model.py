"""`seqmesh verify --model`: a model on a mesh against itself on one device, and where the two part."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import KINDS, SIZES
from hybrid_models import hybrid
from ranks import Ranks
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from seqmesh import cli
from seqmesh.integrations import transformers as integration
from seqmesh.schedule.chains import DocumentPiece
from seqmesh.verify.hf_model import check, has_weights, masks_of, packed
from seqmesh.verify.judge import LIMIT, TensorError
from seqmesh.verify.model import FEW, ModelCase, ModelOutcome, _not_by_luck, compare_model
from seqmesh.verify.model_report import verdict

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def saved(kind: str, folder: Path, *, positions: int = 97, weights: bool = False) -> Path:
    """A folder with a tiny model's config.json, and its weights."""
    logging.set_verbosity_error()
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(
        kind, vocab_size=64, max_position_embeddings=positions, **SIZES, **ids, **KINDS[kind]
    )
    if weights:
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    return folder


def compared(given: Path, ulysses: int, ring: int, dtype: str = "fp32") -> ModelOutcome | None:
    """On one rank."""
    return compare_model(ModelCase(given=str(given), ulysses=ulysses, ring=ring, dtype=dtype), 0, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_model_passes_with_every_module_and_gradient_compared(
    ranks: Ranks, kind: str, tmp_path: Path
) -> None:
    outcome, *others = ranks.run(4, compared, saved(kind, tmp_path), 2, 2)
    assert others == [None, None, None]
    assert outcome.ok, verdict(outcome)
    assert outcome.left_out == 0
    assert outcome.missing == ()
    modules = list(outcome.modules)
    assert modules.index("model.layers.0.self_attn.q_proj") < modules.index("model.layers.0.self_attn.o_proj")
    assert modules.index("model.layers.0.self_attn.o_proj") < modules.index("model.layers.1")
    assert "lm_head" in modules
    assert {"model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"} <= outcome.gradients.keys()
    assert verdict(outcome).startswith("PASS: loss, ")


def test_half_precision_and_a_single_rank_pass_too(ranks: Ranks, tmp_path: Path) -> None:
    given = saved("llama", tmp_path)
    assert ranks.run(2, compared, given, 1, 2, "bf16")[0].ok
    assert compared(given, 1, 1).ok


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear", "bamba", "lfm2"])
def test_a_hybrid_passes_against_its_definitions(ranks: Ranks, family: str, tmp_path: Path) -> None:
    hybrid(family).config.save_pretrained(tmp_path)
    outcome = ranks.run(4, compared, tmp_path, 2, 2)[0]
    assert outcome.ok, verdict(outcome)
    assert outcome.missing == ()
    assert any("in_proj" in name or "conv" in name or "q_proj" in name for name in outcome.gradients)


def test_a_gradient_of_few_numbers_has_at_least_its_modules_noise() -> None:
    errors = {
        name: TensorError(ours=1e-6, one_device=noise, floor=1e-8)
        for name, noise in (
            ("gate.A_log", 1e-7),
            ("gate.bias", 4e-7),
            ("gate.wide", 2e-7),
            ("b_proj.few", 1e-7),
        )
    }
    sizes = {name: torch.zeros(FEW if name == "gate.wide" else FEW - 1) for name in errors}
    noises = {name: error.one_device for name, error in _not_by_luck(errors, sizes).items()}
    assert noises == {"gate.A_log": 4e-7, "gate.bias": 4e-7, "gate.wide": 2e-7, "b_proj.few": 1e-7}


def without_passing(given: Path) -> ModelOutcome | None:
    """On one rank: what comes of mixers whose states and halos stay at home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DocumentPiece, "is_first", property(lambda _: True))
        patch.setattr(DocumentPiece, "is_last", property(lambda _: True))
        return compared(given, 1, 2)


def test_states_that_are_not_passed_are_found_in_the_layer_that_needs_them(
    ranks: Ranks, tmp_path: Path
) -> None:
    hybrid("qwen3_5").config.save_pretrained(tmp_path)
    outcome = ranks.run(2, without_passing, tmp_path)[0]
    assert not outcome.ok
    assert outcome.first_deviating == "model.layers.0.linear_attn.out_proj"


def with_attention(change: Callable[[int, Tensor], Tensor], given: Path) -> ModelOutcome | None:
    """On one rank: the same with another attention, told how many calls there were before."""
    right = integration.attention
    calls = iter(range(1000))

    def wrong(*tensors: Any, **options: Any) -> Tensor:
        return change(next(calls), right(*tensors, **options))

    integration.attention = wrong
    try:
        return compared(given, 2, 1)
    finally:
        integration.attention = right


def wrong_in_layer_1(layer: int, out: Tensor) -> Tensor:
    return out * (1 + 1e-4 * layer)


def wrong_backward(_: int, out: Tensor) -> Tensor:
    return out + 1e-4 * (out - out.detach())


def test_the_first_module_that_deviates_is_named(ranks: Ranks, tmp_path: Path) -> None:
    outcome, _ = ranks.run(2, with_attention, wrong_in_layer_1, saved("llama", tmp_path))
    assert not outcome.ok
    assert outcome.first_deviating == "model.layers.1.self_attn.o_proj"
    assert outcome.last_agreeing == "model.layers.1.self_attn.v_proj"
    assert "the first module that deviates is model.layers.1.self_attn.o_proj" in verdict(outcome)
    assert outcome.modules["model.layers.1.self_attn.o_proj"].ratio > LIMIT
    assert outcome.modules["model.layers.1.self_attn.o_proj"].ours == pytest.approx(1e-4, rel=0.02)


def test_a_wrong_gradient_behind_a_right_forward_is_found(ranks: Ranks, tmp_path: Path) -> None:
    outcome, _ = ranks.run(2, with_attention, wrong_backward, saved("llama", tmp_path))
    assert not outcome.ok
    assert outcome.first_deviating is None
    assert "FAIL: the forward agrees, " in verdict(outcome)
    # Scores are scaled, not what follows attention.
    assert outcome.gradients["model.layers.1.self_attn.v_proj.weight"].ratio > LIMIT
    assert outcome.gradients["model.layers.1.mlp.down_proj.weight"].ratio <= LIMIT


def test_a_folders_weights_are_used(tmp_path: Path) -> None:
    bare = saved("llama", tmp_path / "bare")
    full = saved("llama", tmp_path / "full", weights=True)
    assert (has_weights(bare), has_weights(full), has_weights(full / "config.json")) == (False, True, False)
    outcome = compared(full, 1, 1)
    assert outcome.ok
    assert "its weights" in outcome.model
    assert outcome.losses["fp64"] != compared(bare, 1, 1).losses["fp64"]


def test_the_batch_is_packed_documents_whose_labels_end_with_them() -> None:
    batch = packed(vocabulary=50, most=100)
    assert sum(batch.lengths) == 100
    assert 1 in batch.lengths
    assert batch.label_count == 100 - len(batch.lengths)
    ends = (batch.labels == -100)[0]
    assert ends.nonzero().flatten().tolist() == (torch.tensor(batch.lengths).cumsum(0) - 1).tolist()
    assert (batch.positions[0][1:] > batch.positions[0][:-1]).tolist() == (~ends[:-1]).tolist()
    assert packed(vocabulary=50, most=None).ids.shape[1] == 251


def test_layers_get_the_masks_of_their_types() -> None:
    class Config:
        sliding_window = 4
        layer_types = ("full_attention", "sliding_attention")

    both = masks_of(Config, (9, 3))
    assert [mask.area for mask in both.values()] == [45 + 6, 4 * 9 - 6 + 6]
    Config.layer_types = None
    assert list(masks_of(Config, (9, 3))) == ["sliding_attention"]
    Config.sliding_window = None
    assert list(masks_of(Config, (9, 3))) == ["full_attention"]


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    for text in (None, "{", "[]", '{"model_type": ""}'):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"no Hugging Face .* with a model_type there"):
            check(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="transformers cannot build it"):
        check(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}'
    )
    with pytest.raises(ValueError, match="cannot be plugged in"):
        check(tmp_path)


def test_the_command_prints_the_comparison_and_json(tmp_path: Path) -> None:
    given = str(saved("mistral", tmp_path / "model"))
    program = "import sys; from seqmesh import cli; cli.main()"
    for more in ((), ("--json",)):
        done = subprocess.run(
            [sys.executable, "-c", program, "verify", "--model", given, "--ulysses", "2", *more],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["ok"] is True
    assert document["verdict"].startswith("PASS")
    assert document["case"] == {"given": given, "ulysses": 2, "ring": 1, "dtype": "fp32"}
    assert document["modules"]["lm_head"]["ratio"] <= LIMIT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "no Hugging Face config.json"),
        (["--model", "x", "--quick"], "leave out --case and --quick"),
        (["--dtype", "bf16"], "--dtype is the model's"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["seqmesh", "verify", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_dtype_as_good_as_the_truth_is_refused() -> None:
    with pytest.raises(ValueError, match="the truth is fp64; use fp32, bf16, fp16"):
        ModelCase(given="x", ulysses=1, ring=1, dtype="fp64")
