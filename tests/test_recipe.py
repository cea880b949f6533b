"""Recipes and overrides become a checked configuration, and back. Their mistakes are in test_train_cli.py."""

import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from seqmesh.train.bits import joined, weight_bits
from seqmesh.train.config import Config
from seqmesh.train.costs import AXES, RankCosts
from seqmesh.train.facts import RankFacts, check_agreement
from seqmesh.train.fingerprint import fingerprint
from seqmesh.train.recipe import dump, load, split_arguments
from seqmesh.train.trainer import learning_rate

ROOT = Path(__file__).parent.parent


def test_the_default_recipe_is_the_default_configuration() -> None:
    recipe = ROOT / "recipes" / "stdlib.toml"
    assert load(str(recipe)) == Config() == load(None)
    written = tomllib.loads(recipe.read_text())
    assert written == tomllib.loads(dump(Config()))  # every key is spelled out


def test_a_configuration_survives_writing_and_reading(tmp_path: Path) -> None:
    config = load(
        None, ['--data=a "quoted" \\ näme\t', "--lr=1e-5", "--tie-embeddings=true", "--mesh.ring=3"]
    )
    (tmp_path / "r.toml").write_text(dump(config))
    assert load(str(tmp_path / "r.toml")) == config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (None, [])),
        (["r.toml"], ("r.toml", [])),
        (["--steps", "3", "r.toml", "--lr=1"], ("r.toml", ["--steps=3", "--lr=1"])),
        (["--minutes", "-1"], (None, ["--minutes=-1"])),
    ],
)
def test_arguments_are_a_recipe_and_overrides_in_any_order(arguments: list[str], expected: Any) -> None:
    assert split_arguments(arguments) == expected


def test_the_learning_rate_warms_up_and_decays() -> None:
    train = load(None, ["--steps=100", "--warmup=10", "--lr=1.0", "--min_lr_ratio=0.1"]).train
    rates = [learning_rate(step, train) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_seeds_that_torch_takes_are_taken(seed: int) -> None:
    assert load(None, [f"--seed={seed}"]).train.seed == seed


def facts_with(bits: int) -> RankFacts:
    return RankFacts(
        loss_share=1.0,
        grad_norm=2.0,
        bytes_scheduled=0.0,
        weight_sum=3.0,
        weight_bits=bits,
        costs=RankCosts(0.0, 0.0, dict.fromkeys(AXES, 0)),
    )


def test_a_rank_with_other_weights_is_named() -> None:
    """The gradient norm, which was compared before, is the same on every rank whatever its weights are."""
    model = torch.nn.Linear(64, 64)
    weights = joined(weight_bits(model.parameters()))
    with torch.no_grad():
        model.weight[3, 5] = torch.nextafter(model.weight[3, 5], torch.tensor(9.0))
    strayed = joined(weight_bits(model.parameters()))
    facts = [facts_with(weights), facts_with(weights), facts_with(strayed)]
    check_agreement(facts[:2], 7, ["all"] * 2)
    check_agreement(facts, 7, ["a shard", "a shard", "another shard"])
    with pytest.raises(
        RuntimeError, match=r"rank 2 diverged at step 7: the bits of its weights .* rank 0's to"
    ):
        check_agreement(facts, 7, ["all"] * 3)
    with pytest.raises(RuntimeError, match=r"rank 2 diverged .* rank 1's to"):
        check_agreement(facts, 7, ["a shard", "another shard", "another shard"])


def test_the_text_that_ranks_compare_knows_where_documents_end() -> None:
    assert fingerprint([b"ab", b"c"]) == fingerprint(iter([b"ab", b"c"])) != fingerprint([b"a", b"bc"])
