"""Mixtures of experts from a recipe's keys: what is built, and on ranks what it is on one rank."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import save_config
from ranks import Ranks
from test_train_mixes import BASE, TEXT, trained
from transformers import AutoModelForCausalLM

from seqmesh.train import setup, step_folders
from seqmesh.train.checkpoint import Checkpoint
from seqmesh.train.config import Config, MeshConfig, ModelConfig
from seqmesh.train.export import export
from seqmesh.train.model import build, sizes_of
from seqmesh.train.recipe import load
from seqmesh.train.setup import dims_of
from seqmesh.train.trainer import Trainer

EXPERTS = {"experts": 4, "experts_per_token": 2}


def config_of(model: dict[str, Any], **settings: Any) -> Config:
    mesh = {key: value for key, value in settings.items() if hasattr(MeshConfig(), key)}
    train = {key: value for key, value in settings.items() if key not in mesh}
    return replace(
        BASE,
        mesh=MeshConfig(**({"ring": 1, "ulysses": 1} | mesh)),
        model=replace(BASE.model, **(EXPERTS | model)),
        train=replace(BASE.train, **train),
    )


MIXES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"architecture": "mixtral"}, {"dp_shard": 2, "ring": 2, "zero": 3, "experts": 2}),
    # One group of all ranks exchanges rows of attention, another tokens of experts.
    (
        {"architecture": "qwen3_moe", "head_dim": 6, "experts": 8, "window": 23},
        {"ring": 4, "zero": 2, "experts": 4, "micro_batch": 2},
    ),
    ({"architecture": "mixtral"}, {"ulysses": 2, "tp": 2, "zero": 3, "experts": 2, "shard_norms": True}),
]


@pytest.mark.parametrize(("model", "settings"), MIXES, ids=["mixtral", "qwen3_moe", "tp"])
def test_a_mixture_of_keys_trains_on_ranks_as_on_one(
    ranks: Ranks, model: dict[str, Any], settings: dict[str, Any]
) -> None:
    config = config_of(model, **settings)
    setup.check(config)
    losses, norms, weights = trained(config_of(model))
    found = ranks.run(4, trained, config)
    for found_losses, found_norms, _ in found:
        assert found_losses == pytest.approx(losses, rel=1e-6)
        assert found_norms == pytest.approx(norms, rel=2e-5)
    assert found[0][2].keys() == weights.keys()
    for name, weight in found[0][2].items():
        # As in test_train_mixes.py: AdamW divides a gradient by its own size.
        assert (weight - weights[name]).norm() <= 1e-4 * weights[name].norm(), name


def test_a_mixture_of_keys_is_transformers_model_of_the_same_sizes(tmp_path: Path) -> None:
    folder = save_config("mixtral", tmp_path, num_key_value_heads=8, max_position_embeddings=101)
    model = {"architecture": "mixtral", "kv_heads": 8, "vocabulary": 260}
    keys, other = config_of(model), replace(BASE, model=ModelConfig(folder=folder))
    of_keys, of_folder = sizes_of(keys), sizes_of(other)
    assert replace(of_keys, calls=()) == replace(of_folder, calls=())
    assert of_keys.step_flops(10, 7) == of_folder.step_flops(10, 7)
    assert build(keys).state_dict().keys() == build(other).state_dict().keys()


def test_weights_of_a_tokens_experts_add_up_to_1() -> None:
    """As of every published Qwen3 mixture, though not by transformers' default."""
    assert build(config_of({"architecture": "qwen3_moe"})).config.norm_topk_prob


def saved(config: Config, run: Path) -> None:
    trainer = Trainer(config, TEXT, dims_of(config.mesh).build(), peak_flops_per_s=1.0)
    trainer.step()
    trainer.save(run)
    trainer.saver.finish()


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_keys_is_exported(tmp_path: Path, architecture: str) -> None:
    config = config_of({"architecture": architecture, "head_dim": 6})
    saved(config, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(export(tmp_path), dtype=torch.float32)
    assert plain.config.model_type == architecture
    weights = {f"model.{name}": torch.empty_like(p) for name, p in plain.named_parameters()}
    Checkpoint(step_folders.newest(tmp_path)).read_into(weights)
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, weights[f"model.{name}"]), name


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "llama"}, "whose layers have no experts; use mixtral, qwen3_moe"),
    (
        {"architecture": "mixtral", "experts": 0, "experts_per_token": 0},
        "model.experts=0 with model.architecture='mixtral', whose layers have experts; set it",
    ),
    ({"architecture": "gpt_oss"}, "has model.layers.0.mlp.experts.down_proj_bias of (4, 32)"),
    ({"architecture": "qwen2_moe"}, "has model.layers.0.mlp.shared_expert"),
    ({"architecture": "deepseek_v3"}, "is not a decoder with the dimensions of [model]"),
    ({"architecture": "llama4_text"}, "lacks experts in layer 0"),
]


@pytest.mark.parametrize(("model", "said"), REFUSED, ids=[model["architecture"] for model, _ in REFUSED])
def test_a_mixture_that_keys_do_not_say_is_refused_by_what_it_has(model: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        setup.check(config_of(model))
    assert "model.folder" in str(refused.value) or "model.experts" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"experts_per_token": 5}, "model.experts_per_token=5 of model.experts=4: use 1 to 4"),
        ({"experts_per_token": 0}, "model.experts_per_token=0 of model.experts=4: use 1 to 4"),
        ({"experts": 0}, "model.experts_per_token=2 with model.experts=0"),
        ({"head_dim": 7}, "model.head_dim=7 is odd"),
    ],
)
def test_keys_of_a_mixture_that_cannot_be_are_refused(model: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        config_of(model)


def test_spread_experts_are_those_that_keys_say() -> None:
    with pytest.raises(ValueError, match=r"mesh\.experts=3 does not divide the 4 experts of model mixtral"):
        config_of({"architecture": "mixtral"}, experts=3, ring=3, zero=3)
    with pytest.raises(ValueError, match=r"which has no experts; leave them out, or give model\.experts"):
        config_of({"experts": 0, "experts_per_token": 0}, experts=2, ring=2, zero=3)


def test_experts_without_a_section_are_those_of_the_mesh() -> None:
    mixture = ("--model.experts=8", "--experts_per_token=2", "--zero=3", "--experts=2")
    config = load(None, mixture)
    assert (config.model.experts, config.mesh.experts) == (8, 2)
