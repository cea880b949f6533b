"""Whether a recipe goes on with what a checkpoint began: the same model on the same text in the same order.

What may change is how it is computed: the mesh, what ranks share and recompute, how a step is cut into
micro-batches. Those change a training by rounding, everything else makes it another one.
"""

import tomllib
from pathlib import Path
from typing import Any

from seqmesh.train.checkpoint import Progress
from seqmesh.train.config import Config
from seqmesh.train.data import Corpus
from seqmesh.train.folder import copy_in, is_same_model
from seqmesh.train.recipe import config_of, dump, to_toml

_MAY_DIFFER = frozenset(
    {
        *("zero", "checkpointing", "offload", "tiling", "shard_norms", "micro_batch", "pipeline"),
        *("minutes", "compare_steps"),
    }
)
"""Keys of [train] that do not change what is trained but by rounding."""
_WHERE = frozenset({"path", "field", "tokenizer", "cache"})
"""Keys of [data] that say where tokens come from: compared by the tokens. model.folder likewise."""


def check_same_training(config: Config, corpus: Corpus, saved: Progress) -> None:
    """Refuse a recipe or a text that a checkpoint does not go on with.

    Raises:
        ValueError: the first key that differs, another text, or no step that is left.
    """
    now, before = tomllib.loads(dump(config)), _with_defaults(saved.recipe)
    for section in ("model", "lora", "data", "train"):
        for key, value in now[section].items():
            is_place = (section == "data" and key in _WHERE) or (section, key) == ("model", "folder")
            if key in _MAY_DIFFER or is_place:
                continue
            _check_equal(f"{section}.{key}", value, before[section][key], config.run.resume)
    if config.train.balance:
        # A product of two means over a micro-batch: other micro-batches have another.
        saved_with = config_of(before).micro_batch
        _check_equal("train.micro_batch", config.micro_batch, saved_with, config.run.resume)
    if corpus.fingerprint != saved.text:
        raise ValueError(
            f"data.path={config.data.path!r} has another text than run.resume={config.run.resume!r} was"
            " trained on, or data.tokenizer makes other tokens of it; use that text and that tokenizer"
        )
    if saved.step >= config.train.steps:
        raise ValueError(
            f"run.resume={config.run.resume!r} has taken all its train.steps={config.train.steps}; nothing is"
            " left to resume"
        )


def _with_defaults(recipe: str) -> dict[str, Any]:
    """The sections of a recipe, which may be older than some keys."""
    return tomllib.loads(dump(config_of(tomllib.loads(recipe))))


def check_same_model(config: Config, run: Path) -> None:
    """Refuse a folder, or none, that a run was not started from.

    Raises:
        ValueError: another config.json than the one that the run has kept.
    """
    folder = config.model.folder
    had_one = copy_in(run).is_dir()
    if bool(folder) != had_one or (folder and not is_same_model(folder, run)):
        was = f"the config.json in {str(copy_in(run))!r}" if had_one else "the keys of [model] alone"
        raise ValueError(
            f"model.folder={folder!r} but run.resume={config.run.resume!r} was trained with {was};"
            " use that model, or start a new run without run.resume"
        )


def _check_equal(key: str, value: Any, before: Any, run: str) -> None:
    if value != before:
        raise ValueError(
            f"{key}={to_toml(value)} but run.resume={run!r} was trained with {to_toml(before)};"
            " leave it so, or start a new run without run.resume"
        )
