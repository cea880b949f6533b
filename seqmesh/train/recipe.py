"""Recipes: TOML file + command-line overrides -> a checked `Config`, and back to TOML.

Every mistake is one line with its remedy.

    seqmesh train recipe.toml --mesh.ring 4 --train.steps=20 --lr 1e-3 --data book.txt

An override is a full key (`--mesh.ring`) or a field's own name where only one section has it (`--ring`);
`--data` is short for `--data.path`, `--check` for `--run.check_every`, `--model` for `--model.folder`,
`--folder` for `--run.folder`. Values are TOML values, quotes may be left out.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from seqmesh.train.config import Config

Sections = dict[str, Any]
_SHORT = {
    "data": "data.path",
    "model": "model.folder",
    "folder": "run.folder",
    "check": "run.check_every",
    "experts": "mesh.experts",  # not model.experts
}
"""Overrides with a name of their own."""


def keys() -> dict[str, Any]:
    """Every key of a recipe as section.field, with its default."""
    default = Config()
    found: dict[str, Any] = {}
    for section in fields(default):
        values = getattr(default, section.name)
        for leaf in fields(values):
            found[f"{section.name}.{leaf.name}"] = getattr(values, leaf.name)
    return found


def load(recipe: str | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe file (None: the default recipe) and overrides like `--mesh.ring 4`.

    Raises:
        ValueError: an unreadable file, an unknown key, a value of another type or out of range: one line,
            with the remedy.
    """
    sections = _read(recipe) if recipe is not None else {}
    for key, text in _pairs(overrides):
        section, leaf = _resolve(key).split(".")
        place = sections.setdefault(section, {})
        if not isinstance(place, dict):
            raise ValueError(
                f"{section} = {place!r} is not a section; write [{section}] and its keys below it"
            )
        place[leaf] = _value(f"{section}.{leaf}", text)
    return config_of(sections, f"{recipe}: " if recipe is not None else "")


def config_of(sections: Sections, where: str = "") -> Config:
    """The configuration that sections of keys and values make; what is left out has its default.

    Raises:
        ValueError: in one line that starts with `where`.
    """
    try:
        # As JSON: of Python objects, pydantic's strict mode takes no dict for a section. TOML's dates, which
        # JSON has not, become texts and are judged as such.
        return TypeAdapter(Config).validate_json(json.dumps(sections, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(where + _explain(first["type"], first["loc"], first)) from None


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe, if there is one, and the overrides: `[recipe.toml] [--key value | --key=value]...`.

    Raises:
        ValueError: two recipes, or a key without a value.
    """
    recipe: str | None = None
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            if recipe is not None:
                raise ValueError(
                    f"two recipes, {recipe!r} and {argument!r};"
                    " give one, and override its keys with --key value"
                )
            recipe = argument
        elif "=" in argument:
            overrides.append(argument)
        else:
            value = next(rest, None)
            if value is None:
                raise ValueError(f"{argument} has no value; write {argument} VALUE")
            overrides.append(f"{argument}={value}")
    return recipe, overrides


def _read(recipe: str) -> Sections:
    try:
        return tomllib.loads(Path(recipe).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"recipe {recipe!r} does not exist; give a .toml file, or none for the default recipe"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot read recipe {recipe!r}: {error.strerror}; give a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"recipe {recipe!r} is not TOML: {error}; see recipes/stdlib.toml for the form"
        ) from None


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    for override in overrides:
        key, _, text = override.removeprefix("--").partition("=")
        yield key.replace("-", "_"), text


def _resolve(key: str) -> str:
    """The full key that an override means."""
    known = keys()
    if key in known:
        return key
    if key in _SHORT:
        return _SHORT[key]
    meant = [full for full in known if full.split(".")[1] == key]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise ValueError(f"--{key} could be {' or '.join(meant)}; write the section too, --{meant[0]}")
    raise _unknown(key, "--")


def _unknown(key: str, dashes: str = "") -> ValueError:
    """The error for an unknown key, which names the nearest one."""
    known = list(keys())
    sections = sorted({full.split(".")[0] for full in known})
    # Only a recipe has sections without a key: [section].
    candidates = known if dashes or "." in key else sections + known
    near = difflib.get_close_matches(key, candidates, 1)
    if not near:
        # The field's own name may be right, or nearly, in a wrong section or without one.
        by_leaf = {full.split(".")[1]: full for full in known}
        leaves = difflib.get_close_matches(key.split(".")[-1], list(by_leaf), 1, cutoff=0.5)
        near = [by_leaf[leaf] for leaf in leaves]
    remedy = f"did you mean {dashes}{near[0]}?" if near else f"known keys: {', '.join(known)}"
    return ValueError(f"unknown key {dashes}{key}; {remedy}")


def _value(key: str, text: str) -> Any:
    """An override's text as a value: text for text fields, TOML for the others."""
    if isinstance(keys()[key], str):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # of the wrong type, whatever it is: pydantic says so, with the key


def _explain(kind: str, loc: tuple[int | str, ...], error: Any) -> str:
    """One line, with a remedy, for pydantic's error."""
    key = ".".join(map(str, loc))
    # Sections are dataclasses to pydantic: an unknown key is an argument that their __init__ does not have.
    if kind == "unexpected_keyword_argument":
        return str(_unknown(key))
    # Raised by config/, whose messages are whole already: pydantic only wraps them.
    if kind == "value_error":
        return str(error["ctx"]["error"])
    default = keys().get(key)
    if default is None:
        return f"{key} = {error['input']!r} is not a section; write [{key}] and its keys below it"
    return (
        f"{key} = {json.dumps(error['input'])} is ill-typed: {_lower(error['msg'])};"
        f" write for example {key} = {to_toml(default)}"
    )


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def to_toml(value: object) -> str:
    """A scalar as TOML: JSON strings, without escapes for what is not ASCII, are TOML strings too."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (str, bool)) else repr(value)


def dump(config: Config) -> str:
    """The configuration as a recipe that `load` reads back to an equal one."""
    lines: list[str] = []
    for section in fields(config):
        values = getattr(config, section.name)
        lines.append(f"[{section.name}]")
        for leaf in fields(values):
            lines.append(f"{leaf.name} = {to_toml(getattr(values, leaf.name))}")
        lines.append("")
    return "\n".join(lines)
