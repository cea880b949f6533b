"""A figure: something measured, next to its target."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the benchmark's table."""

    section: str
    what: str
    measured: str
    target: str
    ok: bool | None
    """Whether the target is reached; None if there is none, or the run is too small to judge."""
    exact: bool
    """The same on every machine and in every run (bytes, pairs, rows), unlike a time."""
    values: dict[str, float]
    """What `measured` says, as numbers, with units in the names."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median of repeated measurements with their range."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return Spread(median=median(values), least=min(values), most=max(values))

    def text(self, digits: int, unit: str = "") -> str:
        """`1.03 (1.01-1.08)`."""
        return f"{self.median:.{digits}f}{unit} ({self.least:.{digits}f}-{self.most:.{digits}f})"

    def values(self, name: str) -> dict[str, float]:
        """As numbers, for JSON."""
        return {f"{name}_median": self.median, f"{name}_min": self.least, f"{name}_max": self.most}
