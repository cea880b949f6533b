"""`[lora]` of a recipe: adapters train, are saved, resumed and exported, and the model's weights stay."""

import json
import re
import shutil
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from meshes import mesh_of
from model_folders import save_config, save_model
from parallel_runs import whole
from peft import PeftModel
from ranks import Ranks
from test_train_mixes import TEXT, trained
from test_train_models import config_of as plain_config_of
from test_train_models import loss_of_plain_transformers, saved_and_resumed
from torch import Tensor
from train_command import seqmesh_command
from transformers import AutoModelForCausalLM

from seqmesh.parallel import ParallelDims
from seqmesh.trace.tracing import trace_recipe
from seqmesh.train import folder as model_folder
from seqmesh.train import setup, step_folders
from seqmesh.train.checkpoint import Checkpoint, Progress
from seqmesh.train.config import AdapterConfig, Config, ModelConfig
from seqmesh.train.data import lengths_of, sequences
from seqmesh.train.export import export
from seqmesh.train.model import build_hollow, sizes_of
from seqmesh.train.recipe import dump
from seqmesh.train.resume import check_same_training
from seqmesh.train.setup import dims_of
from seqmesh.train.trainer import Trainer

LORA = AdapterConfig(rank=3, alpha=6.0)
MIXES: dict[str, dict[str, Any]] = {
    "tp and shards": {"dp_shard": 2, "ring": 2, "tp": 2, "zero": 3, "micro_batch": 2, "shard_norms": True},
    "stages": {"pp": 2, "ring": 2, "ulysses": 2, "micro_batch": 2, "zero": 1, "pipeline": "interleaved"},
    "whole weights": {"dp_replicate": 2, "ring": 4, "zero": 0, "checkpointing": "full"},
    "one pool, tiles": {"dp_shard": 2, "ring": 2, "ulysses": 2, "pool": True, "zero": 2, "tiling": "mlp"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a model with weights."""
    return save_model("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


def config_of(folder: str, **settings: Any) -> Config:
    return replace(plain_config_of(folder, **settings), lora=LORA)


@cache
def on_one_rank(folder: str) -> tuple[list[float], list[float], dict[str, Tensor]]:
    return trained(config_of(folder))


@pytest.mark.parametrize("name", MIXES)
def test_adapters_train_on_a_mix_as_on_one_rank(ranks: Ranks, folder: str, name: str) -> None:
    config = config_of(folder, **MIXES[name])
    setup.check(config)
    losses, norms, weights = on_one_rank(folder)
    found = ranks.run(8, trained, config)
    for found_losses, found_norms, _ in found:
        assert found_losses == pytest.approx(losses, rel=1e-6)
        assert found_norms == pytest.approx(norms, rel=2e-5)
    assert found[0][2].keys() == weights.keys()
    assert all(".lora_" in key for key in weights)
    for key, weight in found[0][2].items():
        # As in test_train_mixes.py: AdamW divides a gradient by its own size.
        assert (weight - weights[key]).norm() <= 2e-4 * weights[key].norm(), key


def test_a_checkpoint_of_adapters_is_resumed_on_another_mesh_and_exported_for_peft(
    ranks: Ranks, folder: str, tmp_path: Path
) -> None:
    config = config_of(folder, dp_shard=2, ring=2, tp=2, zero=3)
    other = config_of(folder, pp=2, ring=2, ulysses=2, zero=1, micro_batch=4)
    model_folder.copy(folder, tmp_path)
    after, again = ranks.run(8, saved_and_resumed, config, other, tmp_path)[0]
    assert again == pytest.approx(after, rel=2e-5)
    saved = Checkpoint(step_folders.newest(tmp_path)).metadata.state_dict_metadata
    weights = [name for name in saved if not name.startswith("rng.")]
    assert len(weights) == 4 * 7 * 2 * 4  # layers, matrices, A and B, weight with two moments and a count
    assert all(".lora_A." in name or ".lora_B." in name for name in weights)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of transformers, in peft
        adapted = PeftModel.from_pretrained(base, export(tmp_path))
    assert adapted.peft_config["default"].base_model_name_or_path == folder
    stream = sequences(TEXT, seq_len=config.data.seq_len, seed=config.train.seed, skip=2 * 8)
    pieces = [piece for _ in range(8) for piece in next(stream)]
    ids = torch.cat([TEXT.ids(piece) for piece in pieces])
    assert loss_of_plain_transformers(adapted, lengths_of(pieces), ids).item() == pytest.approx(
        after[0], rel=1e-6
    )


def test_only_adapters_move_and_the_first_loss_is_the_models(folder: str) -> None:
    config = config_of(folder)
    trainer = Trainer(config, TEXT, ParallelDims().build(), peak_flops_per_s=1.0)
    plain = Trainer(replace(config, lora=AdapterConfig()), TEXT, ParallelDims().build(), peak_flops_per_s=1.0)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    assert trainer.step().loss == pytest.approx(plain.step().loss, rel=1e-6)
    trainer.step()
    moved = {
        name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])
    }
    assert moved == {name for name in before if ".lora_" in name}


def in_bf16(config: Config) -> tuple[list[float], dict[str, torch.dtype]]:
    trainer = Trainer(config, TEXT, mesh_of(dims_of(config.mesh)), peak_flops_per_s=1.0)
    losses = [trainer.step().loss for _ in range(3)]
    return losses, {name: weight.dtype for name, weight in trainer.model.named_parameters()}


def test_weights_that_stay_are_held_in_what_layers_compute_in(ranks: Ranks, folder: str) -> None:
    config = config_of(folder, dp_shard=2, ring=2, zero=3, precision="bf16")
    plain = replace(config, lora=AdapterConfig())
    (first, *_), _ = ranks.run(4, in_bf16, plain)[0]
    losses, dtypes = ranks.run(4, in_bf16, config)[0]
    assert losses[0] == first  # to the bit: gathered in bf16 either way
    assert losses == pytest.approx(on_one_rank(folder)[0], rel=2e-3)
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name


def started_from(config: Config) -> dict[str, Tensor]:
    model = setup.build(config, mesh_of(dims_of(config.mesh)), build_hollow(config))
    return {name: whole(weight.detach()) for name, weight in model.named_parameters()}


def test_weights_whose_names_are_converted_and_adapters_start_alike_on_any_mesh(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Experts that the folder has one by one; peft adapts their two parameters, one around the other."""
    folder = save_model("mixtral", tmp_path)
    config = config_of(folder, dp_shard=2, ring=2, zero=3)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    alone = started_from(config_of(folder))
    for name, weight in ranks.run(4, started_from, config)[0].items():
        assert torch.equal(weight, alone[name]), name
        if ".lora_" not in name:
            assert torch.equal(weight, plain.get_parameter(name.replace("base_layer.", ""))), name
    assert sum(".lora_A." in name for name in alone) == 4 * 7  # q, k, v, o, the router, and experts twice


def test_adapted_experts_train_on_several_ranks_as_on_one(ranks: Ranks, tmp_path: Path) -> None:
    folder = save_config("mixtral", tmp_path)
    losses, norms, _ = trained(config_of(folder))
    found = ranks.run(4, trained, config_of(folder, dp_shard=2, ring=2, zero=3))
    for found_losses, found_norms, _ in found:
        assert found_losses == pytest.approx(losses, rel=1e-6)
        assert found_norms == pytest.approx(norms, rel=2e-5)


def test_flops_count_no_gradients_of_weights_that_stay(folder: str) -> None:
    plain = sizes_of(replace(config_of(folder), lora=AdapterConfig()))
    sizes = sizes_of(config_of(folder))
    shapes = [(64, 32), (8, 32), (8, 32), (32, 64), (48, 32), (48, 32), (32, 48)]
    adapters = 4 * sum(LORA.rank * sum(shape) for shape in shapes)
    assert (sizes.trained, plain.trained) == (adapters, plain.parameters)
    assert sizes.parameters == plain.parameters + adapters
    assert sizes.step_flops(10, 7) == 10 * (4 * plain.matmul_parameters + 6 * adapters) + 42
    assert plain.step_flops(10, 7) == 10 * 6 * plain.matmul_parameters + 42


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "q_proj,nonesuch_proj,lm_head"}, "lm_head is adapted, and lies outside the layers"),
        ({"targets": "nonesuch"}, "lora.targets='nonesuch' with Qwen3ForCausalLM ("),
        ({"targets": "input_layernorm"}, "lora.targets='input_layernorm' with Qwen3ForCausalLM ("),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused_before_a_rank_starts(
    folder: str, settings: dict[str, Any], message: str
) -> None:
    config = replace(config_of(folder), lora=AdapterConfig(rank=2, **settings))
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        setup.check(config)
    assert "\n" not in str(refused.value)


def test_adapted_experts_that_are_spread_are_refused_before_a_rank_starts(tmp_path: Path) -> None:
    config = config_of(save_config("mixtral", tmp_path), dp_shard=2, ring=2, zero=3, experts=2)
    with pytest.raises(ValueError, match="whose adapters belong to all experts"):
        setup.check(config)


def test_wrong_settings_are_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"lora\.alpha=0\.0: adapters would do nothing"):
        AdapterConfig(rank=2, alpha=0.0)
    with pytest.raises(ValueError, match=r"lora\.rank=-1: use a value of at least 0"):
        AdapterConfig(rank=-1)
    for targets in ("", "q_proj, v_proj", "q_proj,"):
        with pytest.raises(ValueError, match="write names with commas between"):
            AdapterConfig(rank=2, targets=targets)
    with pytest.raises(ValueError, match=r"lora\.rank=3 without model\.folder"):
        replace(config_of(folder), model=ModelConfig())


def test_without_peft_adapters_are_refused_with_the_remedy(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora\.rank needs peft; pip install peft"):
        setup.check(config_of(folder))


def test_a_run_with_other_adapters_is_not_resumed(folder: str) -> None:
    config = config_of(folder)
    saved = Progress(step=1, sequences=8, recipe=dump(config), text=TEXT.fingerprint, world=1)
    check_same_training(config, TEXT, saved)
    with pytest.raises(ValueError, match=r"lora\.rank=2 but .* was trained with 3"):
        check_same_training(replace(config, lora=AdapterConfig(rank=2, alpha=6.0)), TEXT, saved)
    older = dump(replace(config, lora=AdapterConfig())).replace("[lora]", "[x]")
    assert "[x]" in older


def test_a_dry_run_knows_that_states_of_adapters_are_few(folder: str) -> None:
    """The optimiser has two fp32 moments of a rank's rows of A and B, a count for each, and no more."""
    config = config_of(folder, dp_shard=2, ring=2, zero=3)
    trace = trace_recipe(config)
    rows = {name: -(-shape[0] // 4) for name, shape in setup.check(config).items() if ".lora_" in name}
    columns = {name: shape[1] for name, shape in setup.check(config).items() if name in rows}
    assert trace.optimizer == sum(2 * 4 * rows[name] * columns[name] + 4 for name in rows)


def run_of(folder: str, text: Path, home: Path, *more: str) -> str:
    """Standard output of a run of four steps."""
    common = ("--seq_len=96", "--sequences=2", "--dp_shard=2", "--lora.rank=2", "--targets=q_proj,v_proj")
    given = ("--model", folder, "--data", str(text), "--steps=4", *more)
    done = seqmesh_command("train", *common, *given, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_by_peft(folder: str, run: Path) -> dict[str, Tensor]:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        adapted = PeftModel.from_pretrained(base, run / "checkpoint")
    return {name: weight for name, weight in adapted.named_parameters() if ".lora_" in name}


def test_the_command_trains_adapters_of_a_folder_goes_on_with_them_and_writes_what_peft_reads(
    folder: str, text: Path, tmp_path: Path
) -> None:
    shown = run_of(folder, text, tmp_path, "--folder=run", "--checkpoint_every=2")
    count = 4 * 2 * (32 + 64 + 32 + 8)
    assert f"of which {count / 1e6:,.2f} M train" in shown
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["trained_parameters"] == count
    assert report["matches_one_rank"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    run_of(folder, text, tmp_path, "--folder=again", "--resume=run")
    at_once, again = (read_by_peft(folder, tmp_path / run) for run in ("run", "again"))
    assert len(at_once) == 4 * 2 * 2
    for name, weight in again.items():
        assert torch.equal(weight, at_once[name]), name
