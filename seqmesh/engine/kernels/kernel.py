"""The protocol of a kernel: the attention of one block, (out, lse), and its gradients.

A kernel declares what it supports by *refusing* the rest with a reason. It cuts a block into the tiles that
it can compute, and gets every tile back, with the queries and keys already cut to it. No kernel may invent a
log-sum-exp, ignore an argument or fall back silently.

Legend: b batch, h query heads, g K/V heads, nq and nk rows of the tile, d head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from seqmesh.engine.kernels.tiles import Tile
from seqmesh.masks import Band


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a kernel is asked to support."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    softcap: float | None


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
            v: likewise.
            tile: one of `tiles`; nq and nk are the sides of its band.
            rule: scale and softcap.

        Returns:
            out (b, h, nq, d) in the input's dtype (a kernel may keep fp32), and lse (b, h, nq): natural log,
            fp32 (fp64 for fp64).
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
        """Gradients of one tile, given the *global* out (b, h, nq, d) and lse (b, h, nq) of its query rows.

        Returns:
            dq (b, h, nq, d), dk and dv (b, g, nk, d); their sums over all tiles are the gradients.
        """
        ...
