"""What several kernels do to their tensors before and after a call: one head dim, the tile's order, its mask.

A kernel that knows one head dim gets the narrower side padded with zeros, which change neither logits nor
outputs. One that knows only "causal" gets an upper triangle with the order of queries and keys reversed. One
that knows no bands gets a small dense mask.

Legend: b batch, n rows, nq and nk rows of a tile's queries and keys.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqmesh.engine.kernels.tiles import Tile, TileShape


class Kind(NamedTuple):
    """What makes tiles alike: sides and shape, and the bounds of a dense mask."""

    queries: int
    keys: int
    shape: TileShape
    lo: int | None
    """Bounds of row - column, counted within the tile; of MASKED tiles."""
    hi: int | None


def kind_of(tile: Tile) -> Kind:
    """The kind of a tile."""
    band = tile.band
    offset = band.q_start - band.k_start
    is_masked = tile.shape is TileShape.MASKED
    return Kind(
        queries=band.q_stop - band.q_start,
        keys=band.k_stop - band.k_start,
        shape=tile.shape,
        lo=band.lo - offset if is_masked and band.lo is not None else None,
        hi=band.hi - offset if is_masked and band.hi is not None else None,
    )


def of_one_head_dim(tensors: list[Tensor], multiple: int = 1) -> list[Tensor]:
    """(b, heads, n, dim) tensors, padded to the widest dim among them and to a multiple."""
    widest = max(x.shape[3] for x in tensors)
    widest += -widest % multiple
    return [x if x.shape[3] == widest else pad(x, (0, widest - x.shape[3])) for x in tensors]


def unpadded(x: Tensor, dim: int) -> Tensor:
    """(b, heads, n, dim) without what was padded."""
    return x if x.shape[3] == dim else x[..., :dim]


def oriented(x: Tensor, tile: Tile) -> Tensor:
    """(b, heads, n, ...), rows reversed if the tile asks for it; it undoes itself."""
    return x.flip(2) if tile.shape is TileShape.REVERSED else x


def is_causal(tile: Tile) -> bool:
    """Whether the call is causal, once rows are in the tile's order."""
    return tile.shape in (TileShape.CAUSAL, TileShape.REVERSED)


def dense_mask(tile: Tile, q: Tensor, multiple: int = 1) -> Tensor | None:
    """(nq, nk) additive mask of a MASKED tile, a row begins at a multiple; None for the others."""
    return _mask_of(kind_of(tile), q.dtype, q.device, multiple) if tile.shape is TileShape.MASKED else None


@lru_cache(maxsize=8)
def _mask_of(kind: Kind, dtype: torch.dtype, device: torch.device, multiple: int) -> Tensor:
    """The mask of all tiles of a kind: the strips of a window are of one. Nobody changes it."""
    columns = kind.keys + -kind.keys % multiple
    difference = torch.arange(kind.queries, device=device)[:, None] - torch.arange(columns, device=device)
    mask = torch.zeros(difference.shape, dtype=dtype, device=device)
    if kind.lo is not None:
        mask.masked_fill_(difference < kind.lo, -torch.inf)
    if kind.hi is not None:
        mask.masked_fill_(difference > kind.hi, -torch.inf)
    return mask[:, : kind.keys]
