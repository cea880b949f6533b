"""What users write, checked: names against the known ones, files against their form, and tables key by key.

Every mistake is one line: the file and table, what was got, which rule broke, what to do, and the nearest
known name.

    unknown model 'lama3-8b'; did you mean 'llama3-8b'? known: llama2-7b, llama3-8b, ...
    'lab.toml' [gpu.ours]: unknown key 'tflop'; did you mean 'tflops'? known: like, tflops, ...
"""

import difflib
import reprlib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Final, TypeGuard, TypeVar, get_args

T = TypeVar("T")

FROM_ZERO: Final[Mapping[str, int]] = {"least": 0}
"""Metadata of a dataclass's field that counts, and may be 0."""

SECTIONS: Final = ("gpu", "cluster", "model")
"""The kinds of tables that a TOML file for the planner may hold: [gpu.NAME], [cluster.NAME], [model.NAME]."""

LARGEST_COUNT: Final = 2**31 - 1
"""Layers, heads, nodes and the like: beyond this it is a slip.

Products of larger ones would no longer be exact as floats.
"""

LARGEST_NUMBER: Final = 1e15
"""The same for rates and factors, which are in units of 1e9 or 1e12."""

SMALLEST: Final = 1e-9
LARGEST: Final = 1e12
"""Of rates and sizes in the units of the keys."""


def unknown(kind: str, got: str, known: Iterable[str], where: str = "") -> ValueError:
    """The error for a name that is not known: the nearest one, if any is near, and all of them.

    Args:
        kind: what the name stands for, such as "model".
        got: the name as it was given.
        known: every name that would have been taken.
        where: the file and table, if the name stood in one.
    """
    names = list(known)
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(got.lower(), list(by_lower), 1, cutoff=0.4)
    suggestion = f"did you mean {by_lower[near[0]]!r}? " if near else ""
    place = f"{where}: " if where else ""
    listed = ", ".join(map(shown, names)) or "none"
    return ValueError(f"{place}unknown {kind} {got!r}; {suggestion}known: {listed}")


def shown(name: str) -> str:
    """A user's name as it may stand in one line."""
    return name if name.isprintable() else repr(name)


def is_count(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether a value is a whole number of at least `least`, and no slip. Booleans and floats are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST_COUNT


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a TOML file or an object of a JSON file.

    Each method reads one key (`read`: all of them), and raises a one-line ValueError.
    """

    name: str
    """The last part of the table's header: "ours" of [gpu.ours]."""
    where: str
    """How errors name it: file and header."""
    values: Mapping[str, object]
    """Its keys. JSON's null counts as absent."""

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def check_keys(self, known: Sequence[str]) -> None:
        """Refuse keys that have no meaning."""
        for key, value in self.values.items():
            if key not in known and isinstance(value, dict):
                raise ValueError(
                    f"{self.where}: {key!r} is a table inside it;"
                    ' put quotes around a name with a dot, as in [model."a-1.5b"]'
                )
            if key not in known:
                raise unknown("key", key, known, self.where)

    def text(self, key: str, default: str | None = None) -> str:
        """A string; `default`, if there is one, where the key is absent."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", "put it in quotes")
        return value

    def flag(self, key: str, default: bool | None) -> bool:
        """True or false; `default`, if there is one, where the key is absent."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", "write one of the two, without quotes")
        return value

    def count(self, key: str, least: int = 1, default: int | None = None) -> int:
        """A whole number of at least `least`; `default`, if there is one, where the key is absent."""
        if key not in self and default is not None:
            return default
        value = self._get(key)
        if not is_count(value, least):
            raise self._wrong(
                key,
                f"a whole number from {least} to {LARGEST_COUNT}",
                "give one, without quotes or decimal point",
            )
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST_NUMBER:
            raise self._wrong(
                key, f"a finite number up to {LARGEST_NUMBER:.0e}", "give one, without quotes or unit"
            )
        return float(value)

    def positive(self, key: str) -> float:
        """A finite number above zero."""
        value = self.number(key)
        if value <= 0:
            raise self._wrong(key, "above zero", "give a positive number")
        if not SMALLEST <= value <= LARGEST:
            raise self._wrong(key, f"from {SMALLEST:g} to {LARGEST:g}", "mind the unit in the key's name")
        return value

    def table(self, key: str) -> "Table":
        """A table inside this one; empty where the key is absent."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, "a table", f"write its keys below a header that ends in {key}")
        return Table(name=key, where=f"{self.where} {key}", values=value)

    def read(self, *kinds: type[T], **given: Any) -> T:
        """A dataclass of counts, texts, flags and tables, from the keys that bear its fields' names.

        A field with a default may be left out. A count is at least 1, or what the field's metadata says.

        Args:
            kinds: the class; of several, the one whose `kind` is the table's.
            given: fields that are no keys of the table.

        Raises:
            ValueError: a key that is missing, unknown or wrong, or an unknown `kind`.
        """
        kind = self._kind(kinds)
        leaves = [leaf for leaf in fields(kind) if leaf.name not in given]  # type: ignore[arg-type]
        self.check_keys([*(["kind"] if len(kinds) > 1 else []), *(leaf.name for leaf in leaves)])
        wanted = [leaf for leaf in leaves if leaf.name in self or leaf.default is MISSING]
        return kind(**given, **{leaf.name: self._field(leaf) for leaf in wanted})

    def _kind(self, kinds: Sequence[type[T]]) -> type[T]:
        if len(kinds) == 1:
            return kinds[0]
        by_name = {str(vars(kind)["kind"]): kind for kind in kinds}
        name = self.text("kind")
        if name not in by_name:
            raise unknown(f"kind of {self.name}", name, by_name, self.where)
        return by_name[name]

    def _field(self, leaf: Field[Any]) -> object:
        """The value of a field by its type, which may also be None."""
        types = [each for each in get_args(leaf.type) or (leaf.type,) if each is not NoneType]
        if types == [int]:
            return self.count(leaf.name, leaf.metadata.get("least", 1))
        if types == [bool]:
            return self.flag(leaf.name, None)
        if types == [str]:
            return self.text(leaf.name)
        # A table inside: of a class, or of one of several.
        return self.table(leaf.name).read(*types)

    def _get(self, key: str, default: object = None) -> object:
        if key in self:
            return self.values[key]
        if default is None:
            raise ValueError(f"{self.where}: {key} is missing; add it")
        return default

    def _wrong(self, key: str, rule: str, remedy: str) -> ValueError:
        return ValueError(
            f"{self.where}: {shown(key)} = {reprlib.repr(self.values[key])} is not {rule}; {remedy}"
        )


def read_text(path: Path, form: str) -> str:
    """The text of a file, which should be of this `form` ("a TOML file with ...").

    Raises:
        ValueError: the file is absent, unreadable or not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{str(path)!r} does not exist; give {form}") from None
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}; give {form}") from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a text file: {error}; give {form}") from None


def data_file(name: str) -> Path:
    """One of the files beside the code that hold presets and constants."""
    return Path(__file__).parent / "data" / name


def read_data(name: str) -> dict[str, Any]:
    """What is in one of them."""
    return read_toml(data_file(name))


def read_toml(path: Path) -> dict[str, Any]:
    """What is in a file of the package."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def read_tables(path: Path, section: str) -> dict[str, Table]:
    """The tables [section.NAME] of a TOML file, by NAME in lower case.

    Raises:
        ValueError: an unreadable file, one that is not TOML, or one with other sections than `SECTIONS`.
    """
    form = f"a TOML file with tables {', '.join(f'[{known}.NAME]' for known in SECTIONS)}"
    text = read_text(path, form)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not TOML: {error}; give {form}") from None
    whole = Table(name=path.name, where=repr(str(path)), values=values)
    for key in whole.values:
        if key not in SECTIONS:
            raise unknown("section", key, SECTIONS, whole.where)
    found: dict[str, Table] = {}
    for name, inner in whole.table(section).values.items():
        where = f"{whole.where} [{section}.{shown(name)}]"
        if not isinstance(inner, dict):
            raise ValueError(
                f"{whole.where} [{section}]: {shown(name)} has no table of its own;"
                f" name the table, as in [{section}.NAME]"
            )
        if name.lower() in found:
            raise ValueError(f"{where} is there twice but for upper and lower case; rename one")
        found[name.lower()] = Table(name=name, where=where, values=inner)
    return found
