"""Models by name: from a preset, a Hugging Face config.json, or a TOML file.

load_model("llama3-8b")                         # data/models.toml
load_model("checkpoints/ours")                  # a folder with config.json, or the file itself
load_model("ours", [Path("lab.toml")])          # [model.ours] of a file in the form of data/models.toml
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Final

from seqmesh.planner.inputs.hugging_face import shape_from_config
from seqmesh.planner.inputs.mixers import mixer_from_table
from seqmesh.planner.inputs.shape import LatentShape, MixtureShape, ModelShape
from seqmesh.planner.inputs.tables import Table, read_tables, unknown

_PRESETS: Final = Path(__file__).parent / "data" / "models.toml"


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
        return _from_table(table)
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


def _from_table(table: Table) -> ModelShape:
    """A [model.NAME] table: the fields of `ModelShape`, of which those with a default may be left out."""
    table.check_keys([leaf.name for leaf in fields(ModelShape) if leaf.name not in ("name", "folder")])
    return ModelShape(
        name=table.name,
        layers=table.count("layers"),
        hidden=table.count("hidden"),
        heads=table.count("heads"),
        kv_heads=table.count("kv_heads"),
        head_dim=table.count("head_dim"),
        value_dim=_optional(table, "value_dim"),
        intermediate=table.count("intermediate"),
        vocabulary=table.count("vocabulary"),
        gated=table.flag("gated", default=True),
        tied_embeddings=table.flag("tied_embeddings", default=False),
        sliding_window=_optional(table, "sliding_window"),
        full_layers=table.count("full_layers", least=0) if "full_layers" in table else 0,
        mixture=_mixture(table.table("mixture")) if "mixture" in table else None,
        latent=_latent(table.table("latent")) if "latent" in table else None,
        gated_attention=table.flag("gated_attention", default=False),
        mixer=mixer_from_table(table.table("mixer")) if "mixer" in table else None,
        attention_layers=_optional(table, "attention_layers"),
        network_layers=_optional(table, "network_layers"),
        source=table.text("source") if "source" in table else "",
    )


def _optional(table: Table, key: str) -> int | None:
    return table.count(key) if key in table else None


def _mixture(table: Table) -> MixtureShape:
    table.check_keys([leaf.name for leaf in fields(MixtureShape)])
    return MixtureShape(
        experts=table.count("experts"),
        active=table.count("active"),
        intermediate=table.count("intermediate"),
        shared=table.count("shared", least=0) if "shared" in table else 0,
        dense_layers=table.count("dense_layers", least=0) if "dense_layers" in table else 0,
        shared_gate=table.flag("shared_gate", default=False),
        has_router_buffers=table.flag("has_router_buffers", default=False),
        **({"architecture": table.text("architecture")} if "architecture" in table else {}),
    )


def _latent(table: Table) -> LatentShape:
    names = [leaf.name for leaf in fields(LatentShape)]
    table.check_keys(names)
    return LatentShape(**{name: table.count(name, least=int(name != "q_rank")) for name in names})
