"""[mesh]: the degree of every parallelism."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from seqmesh.train.config.rules import STRICT, at_least, require

AXES = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
"""Of the mesh, from the slowest links to the fastest."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The degree of every parallelism, from the outermost axis to the innermost: the ranks' product."""

    pp: int = 1
    """Pipeline stages: ranks that hold different layers; at most model.layers."""
    dp_replicate: int = 1
    """Copies of what dp_shard ranks share, each with sequences of its own (HSDP)."""
    dp_shard: int = 1
    """Ranks with sequences of their own, which share parameters as train.zero says."""
    ring: int = 2
    """Ranks that exchange K/V rows."""
    ulysses: int = 2
    """Ranks that swap sequence shards for head shards; at most the query heads of a tp rank."""
    tp: int = 1
    """Ranks that share every matrix; divides model.heads."""
    experts: int = 1
    """Of the dp_shard x ring x ulysses x tp ranks, so many share the experts of a layer: tokens travel to
    them (expert parallelism). Another view of the same ranks: they are not multiplied by it. A multiple of
    tp. 1: each rank gathers all experts."""
    pool: bool = False
    """Whether dp_shard x ring ranks are one ring for all sequences of a step, placed by the balanced layout:
    short documents whole on a rank, long ones over several, and no rank waits for a longer one."""
    layout: Literal["auto", "contiguous", "zigzag", "striped", "balanced"] = "auto"
    """Which tokens each ring rank holds; auto looks at every batch's documents."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    def __post_init__(self) -> None:
        at_least("mesh", self, **dict.fromkeys((*AXES, "experts"), 1))
        require(
            not self.pool or self.layout in ("auto", "balanced"),
            f"mesh.layout={self.layout!r} with mesh.pool: a pool places documents by the balanced layout;"
            " leave mesh.layout out",
        )

    @property
    def degrees(self) -> dict[str, int]:
        """Axis -> degree, from the outermost to the innermost, as the ranks run them."""
        found = {axis: int(getattr(self, axis)) for axis in AXES}
        if self.pool:
            found |= {"dp_shard": 1, "ring": self.dp_shard * self.ring}
        return found

    @property
    def world(self) -> int:
        """Ranks of the run."""
        return math.prod(self.degrees.values())

    @property
    def data_parallel(self) -> int:
        """Groups of ranks that have sequences of their own."""
        return self.degrees["dp_replicate"] * self.degrees["dp_shard"]

    @property
    def placement(self) -> str:
        """The layout of every batch."""
        return "balanced" if self.pool else self.layout
