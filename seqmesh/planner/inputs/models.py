"""Models by name: from a preset, a Hugging Face config.json, or a TOML file.

load_model("llama3-8b")                         # data/models.toml
load_model("checkpoints/ours")                  # a folder with config.json, or the file itself
load_model("ours", [Path("lab.toml")])          # [model.ours] of a file in the form of data/models.toml
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from seqmesh.planner.inputs.hugging_face import shape_from_config
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.inputs.tables import Table, data_file, read_tables, unknown

_PRESETS: Final = data_file("models.toml")


def known_models(extra: Iterable[Path] = ()) -> list[str]:
    """Names that `load_model` takes, besides paths."""
    return [table.name for table in _tables(extra).values()]


def load_model(given: str, extra: Iterable[Path] = ()) -> ModelShape:
    """The model of this name, in upper or lower case, or of this Hugging Face config.json.

    Args:
        given: a preset, NAME of a table [model.NAME] in one of the files, or the path of a config.json or of
            its folder.
        extra: TOML files, which go before the presets; the last goes first.

    Raises:
        ValueError: an unknown model, a file with a mistake, or a model that is no decoder of known layers.
    """
    tables = _tables(extra)
    table = tables.get(given.lower())
    if table is not None:
        return table.read(ModelShape, name=table.name, folder="")
    if given.endswith(".toml"):
        raise ValueError(
            f"{given!r} is no model but may hold some;"
            " give the NAME of one of its [model.NAME] tables, beside the file"
        )
    if "/" in given or given.endswith(".json") or (given and os.path.exists(given)):
        return shape_from_config(Path(given))
    raise unknown("model", given, [table.name for table in tables.values()])


def _tables(extra: Iterable[Path]) -> Mapping[str, Table]:
    """By name in lower case; those of later files in place of earlier ones."""
    tables: dict[str, Table] = {}
    for path in (_PRESETS, *map(Path, extra)):
        tables |= read_tables(path, "model")
    return tables
