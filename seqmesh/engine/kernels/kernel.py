"""The protocol of a kernel: the attention of one block, (out, lse), and its gradients.

A kernel declares what it supports by *refusing* the rest with a reason. It cuts a block into the tiles that
it can compute, and gets every tile back, with the queries and keys already cut to it. No kernel may invent a
log-sum-exp, ignore an argument or fall back silently.

    stage -> blocks -> tiles -> launches        a launch is one call: one tile, by default

A kernel that can take several tiles in one call is a `BatchKernel` as well: it says which tiles go together,
and gets their rows packed one after the other.

Legend: b batch, h query heads, g K/V heads, nq and nk rows of the tile, d head dim of queries and keys, e
head dim of values.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from seqmesh.engine.kernels.tiles import Tile
from seqmesh.masks import Band
from seqmesh.schedule.pieces import Runs


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a kernel is asked to support."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    softcap: float | None
    value_head_dim: int | None = None
    """None: as `head_dim`."""
    gpu: str = ""
    """What runs on "cuda": its architecture, such as "sm90" or "rocm"; "" where it is not known."""

    @property
    def widest_head_dim(self) -> int:
        """The larger of both head dims: kernels that know one only get the narrower one padded."""
        return max(self.head_dim, self.value_head_dim or self.head_dim)


ProblemT = TypeVar("ProblemT", contravariant=True)


class Refusing(Protocol[ProblemT]):
    """What says whether it computes a problem: a kernel of attention, or of a recurrence."""

    name: str

    def refusal(self, problem: ProblemT) -> str | None:
        """Why it cannot compute a problem, or None if it can."""
        ...


KernelT = TypeVar("KernelT", bound=Refusing[Any])


def choose(
    kernel: str | KernelT, problem: object, *, automatic: Sequence[KernelT], known: Sequence[KernelT]
) -> KernelT:
    """The first kernel of those that are asked for which does not refuse a problem.

    Args:
        kernel: "auto", the name of a known kernel, or a kernel.
        problem: what it must support.
        automatic: what "auto" tries, in this order.
        known: those that have names.

    Raises:
        ValueError: what is neither a name nor a kernel, an unknown name, or no kernel left; the message lists
            every refusal.
    """
    refusals = []
    for candidate in _candidates(kernel, automatic, known):
        refusal = candidate.refusal(problem)
        if refusal is None:
            return candidate
        refusals.append(f"{candidate.name}: {refusal}")
    raise ValueError(
        f"no kernel computes {problem}; refused by {'; '.join(refusals)}."
        " Change the inputs or pass another kernel"
    )


def _candidates(
    kernel: str | KernelT, automatic: Sequence[KernelT], known: Sequence[KernelT]
) -> Sequence[KernelT]:
    """What `kernel=` allows, in the order of preference."""
    if not isinstance(kernel, str):
        if not hasattr(kernel, "refusal"):
            raise ValueError(
                f"kernel={kernel!r} is neither a name nor a Kernel;"
                " use 'auto', a name, or an object with the members of Kernel"
            )
        return (kernel,)
    if kernel == "auto":
        return automatic
    named = tuple(one for one in known if one.name == kernel)
    if not named:
        names = ", ".join(repr(one.name) for one in known)
        raise ValueError(f"kernel={kernel!r} is unknown; use 'auto', {names}, or pass a Kernel object")
    return named


@dataclass(frozen=True, kw_only=True)
class LogitRule:
    """How a query and a key become a logit: x = scale q k, then c tanh(x / c) if there is a softcap c."""

    scale: float
    softcap: float | None = None


class Kernel(Protocol):
    """The attention of one block. Stateless: everything comes as an argument."""

    name: str
    """How users ask for it."""

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot compute a problem, or None if it can."""
        ...

    def tiles(self, block: Band) -> Sequence[Tile]:
        """Disjoint tiles with the pairs of `block`, each computable in one call."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, rule: LogitRule) -> tuple[Tensor, Tensor]:
        """Attention of one tile.

        Args:
            q: (b, h, nq, d), any strides with a unit last one.
            k: (b, g, nk, d); g divides h.
            v: (b, g, nk, e).
            tile: one of `tiles`; nq and nk are the sides of its band.
            rule: scale and softcap.

        Returns:
            out (b, h, nq, e) in the input's dtype (a kernel may keep fp32), and lse (b, h, nq): natural log,
            fp32 (fp64 for fp64). Neither is changed by the engine.
        """
        ...

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: Tile,
        rule: LogitRule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of one tile, given the *global* out (b, h, nq, e) and lse (b, h, nq) of its query rows.

        Returns:
            dq (b, h, nq, d), dk (b, g, nk, d) and dv (b, g, nk, e); their sums over all tiles are the
            gradients.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Launch:
    """Tiles that one call computes, and whose rows they are."""

    tiles: tuple[Tile, ...]
    """In the order in which their rows are packed; no query row is in two of them."""
    queries: Runs
    """Rows of this rank's queries, packed one after the other."""
    keys: Runs
    """Rows of the keys that the stage has, packed likewise; a key may come twice."""

    @staticmethod
    def of(tiles: Iterable[Tile]) -> "Launch":
        """The launch of some tiles."""
        tiles = tuple(tiles)
        return Launch(
            tiles=tiles,
            queries=_runs((tile.band.q_start, tile.band.q_stop) for tile in tiles),
            keys=_runs((tile.band.k_start, tile.band.k_stop) for tile in tiles),
        )


def _runs(ranges: Iterable[tuple[int, int]]) -> Runs:
    """Ranges in their order, those that continue one another joined."""
    runs: list[tuple[int, int]] = []
    for start, stop in ranges:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return tuple(runs)


def disjoint(tiles: Iterable[Tile]) -> list[list[Tile]]:
    """Tiles in groups, as few as go, in which no query row is in two tiles; each in the order of its rows."""
    groups: list[list[Tile]] = []
    for tile in sorted(tiles, key=lambda tile: tile.band[:4]):
        fits = (group for group in groups if group[-1].band.q_stop <= tile.band.q_start)
        group = next(fits, None)
        if group is None:
            groups.append([tile])
        else:
            group.append(tile)
    return groups


@runtime_checkable
class BatchKernel(Protocol):
    """What a Kernel has besides if it computes several tiles in one call."""

    def launches(self, tiles: Sequence[Tile]) -> Sequence[Launch]:
        """The tiles of a stage, each in one launch. Within a launch no query row may be in two tiles."""
        ...

    def forward_many(
        self, q: Tensor, k: Tensor, v: Tensor, launch: Launch, rule: LogitRule
    ) -> tuple[Tensor, Tensor]:
        """As `Kernel.forward`, of a launch of several tiles.

        Args:
            q: (b, h, sum of nq, d), the tiles' query rows one after the other.
            k: (b, g, sum of nk, d), the tiles' key rows likewise.
            v: (b, g, sum of nk, e).
            launch: one of `launches`.
            rule: scale and softcap.

        Returns:
            out (b, h, sum of nq, e) and lse (b, h, sum of nq), packed alike.
        """
        ...

    def backward_many(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        launch: Launch,
        rule: LogitRule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Kernel.backward`, of a launch of several tiles: dq, dk and dv of the packed rows."""
        ...


def one_by_one(tiles: Iterable[Tile]) -> tuple[Launch, ...]:
    """A launch for each tile: what every kernel can do."""
    return tuple(Launch.of([tile]) for tile in tiles)


def launches_of(kernel: Kernel, blocks: Iterable[Band]) -> tuple[Launch, ...]:
    """The calls of a kernel that compute the blocks of a stage."""
    tiles = [tile for block in blocks for tile in kernel.tiles(block)]
    return tuple(kernel.launches(tiles)) if isinstance(kernel, BatchKernel) else one_by_one(tiles)
