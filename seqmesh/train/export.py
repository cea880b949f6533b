"""`seqmesh export`: a run's newest checkpoint as the model that plain transformers loads, in one process.

    FOLDER/checkpoints/step-N   -- each parameter, whole -->   OUT/model.safetensors, config.json, tokenizer

No rank is started: shards of any mesh are put together as they are read.
"""

import tomllib
from dataclasses import replace
from pathlib import Path

import torch

from seqmesh.parallel.adapters import what_trains
from seqmesh.train import setup, step_folders
from seqmesh.train.checkpoint import Checkpoint
from seqmesh.train.data import copy_in, tokenizer_of
from seqmesh.train.folder import copy_in as model_in
from seqmesh.train.loop import save
from seqmesh.train.recipe import config_of


def export(run: Path, out: Path | None = None) -> Path:
    """Write a model.

    Args:
        run: a run's folder.
        out: new or empty; default: FOLDER/export/step-N.

    Returns:
        The folder of the model.

    Raises:
        ValueError: no complete checkpoint, a damaged file, or a folder that has files or takes none.
    """
    checkpoint = Checkpoint(step_folders.newest(run))
    config = config_of(tomllib.loads(checkpoint.progress.recipe), f"{checkpoint.folder}: ")
    if config.data.tokenizer:
        # The run's own copy: the recipe's folder may be gone, or lie on another machine.
        own = str(copy_in(run))
        config = replace(config, data=replace(config.data, tokenizer=own))
    adapted = config.model.folder
    if adapted:
        own_model = str(model_in(run))
        config = replace(config, model=replace(config.model, folder=own_model))
    shapes = what_trains(setup.check(config))
    checkpoint.check_model(shapes)
    checkpoint.check_files()
    out = out or run / "export" / checkpoint.folder.name
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ValueError(f"{str(out)!r} is not empty; choose a new folder, or remove it")
        weights = {f"model.{name}": torch.empty(shape) for name, shape in shapes.items()}
        checkpoint.read_into(weights)
        named = {name.removeprefix("model."): weight for name, weight in weights.items()}
        save(config, named, out, tokenizer_of(config.data.tokenizer), adapted)
    except OSError as error:
        raise ValueError(f"cannot write {str(out)!r}: {error.strerror}; choose another folder") from None
    return out
