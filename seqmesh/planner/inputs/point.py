"""One way to run a training step: the degrees of the mesh and the knobs that trade memory for time.

ranks = pp x dp x ring x ulysses x tp        from the slowest links to the fastest (best practice 7)
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product

from seqmesh.planner.inputs.tables import unknown

AXES = ("tp", "ulysses", "ring", "dp", "pp")
"""From the fastest links to the slowest: best practice 7."""

CHECKPOINTING = ("none", "selective", "full")
OFFLOAD = ("none", "activations", "optimizer", "both")
TILING = ("none", "loss", "mlp")
TILE_ROWS = 4096
"""Tokens of a tile of the loss, and of the MLP."""
PIPELINES = ("1f1b", "interleaved", "zero-bubble")
CHOICES: dict[str, tuple[str, ...]] = {
    "checkpointing": CHECKPOINTING,
    "offload": OFFLOAD,
    "tiling": TILING,
    "pipeline": PIPELINES,
}
"""Values of the knobs of a `Point` that are words."""
_KNOWN = frozenset(product(*CHOICES.values()))
"""Every combination of them: one look-up for a search that makes a million points."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to run a job: the keys of `--pin`.

    Raises:
        ValueError: a degree below 1, a ZeRO stage beyond 3, or an unknown word.
    """

    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    dp: int = 1
    pp: int = 1
    zero: int = 1
    checkpointing: str = "none"
    offload: str = "none"
    tiling: str = "none"
    micro_batch: int = 1
    pipeline: str = "1f1b"
    """Order of a pipeline's micro-batches."""
    virtual: int = 1
    """Stages of a rank in an interleaved pipeline."""
    experts: int = 1
    """Ranks over which a layer's experts are spread: neighbours among those with the same weights.

    A second view of dp x ulysses x ring, which it does not multiply. 1: each rank has all experts.
    """
    pool: bool = False
    """Whether the documents of a micro-batch's sequences lie in one row on the one ring there is."""

    def __post_init__(self) -> None:
        if (self.checkpointing, self.offload, self.tiling, self.pipeline) not in _KNOWN:
            for name, known in CHOICES.items():
                if getattr(self, name) not in known:
                    raise unknown(f"value of {name}", str(getattr(self, name)), known)
        degrees = (self.tp, self.ulysses, self.ring, self.dp, self.pp, self.experts)
        smallest = min(*degrees, self.micro_batch, self.virtual)
        if smallest < 1 or not 0 <= self.zero <= 3:
            raise ValueError(f"{self}: degrees are at least 1, and ZeRO has stages 0 to 3; correct them")

    @property
    def sp(self) -> int:
        """Ranks that share a sequence by its tokens."""
        return self.ulysses * self.ring

    @property
    def replicas(self) -> int:
        """Ranks with the same weights: N of the ZeRO formulas."""
        return self.dp * self.sp

    @property
    def gpus(self) -> int:
        """Ranks in all."""
        return self.tp * self.sp * self.dp * self.pp

    def used(self, axes: Sequence[str] = AXES) -> list[str]:
        """The axes with more than one rank, in an order of all."""
        return [axis for axis in axes if getattr(self, axis) > 1]

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's states live on the host."""
        return self.offload in ("optimizer", "both")

    @property
    def offloads_activations(self) -> bool:
        """Whether checkpoints live on the host."""
        return self.offload in ("activations", "both")

    @property
    def savers(self) -> dict[str, str]:
        """The memory savers that are in use, by their knob."""
        values = {name: str(getattr(self, name)) for name in ("checkpointing", "offload", "tiling")}
        return {name: value for name, value in values.items() if value != "none"}

    def __str__(self) -> str:
        knobs = ["one pool"] if self.pool else []
        knobs += [f"zero {self.zero}", f"micro-batch {self.micro_batch}"]
        knobs += [f"{name} {value}" for name, value in self.savers.items()]
        if self.pipeline != "1f1b":
            knobs.append(self.pipeline + (f" x{self.virtual}" if self.virtual > 1 else ""))
        spread = f" ep{self.experts}" if self.experts > 1 else ""
        return f"tp{self.tp} u{self.ulysses} r{self.ring} dp{self.dp} pp{self.pp}{spread}, {', '.join(knobs)}"

    def but(self, **changes: int | str) -> "Point":
        """The same with some fields replaced, in half the time of `dataclasses.replace`."""
        return Point(**{**vars(self), **changes})


KEYS = tuple(f.name for f in fields(Point))
"""What can be pinned."""
SEARCHED = tuple(key for key in KEYS if key not in ("pipeline", "virtual", "pool", "experts"))
"""What a search varies: the others are as they are pinned, or as the default has them.

Of a mixture also `experts`.
"""


def as_pin(key: str, value: object) -> str:
    """A pin as it is written: tp=8, checkpointing=none, pool=true."""
    return f"{key}={str(value).lower()}"
