"""Attention masks as sets of bands: which query may meet which key, exactly and without a tensor.

Every mask that long-context training uses is a handful of *bands*: a rectangle of (query, key) pairs, cut by
at most two diagonals. Bands are closed under intersection, their area is a closed form, and both survive
sharding, so the schedule, the load balance, the FLOP count and the MFU numerator all come from this one
description (docs/masks.md).

      key j ->        causal          window 2        two documents    prefix 2
    query i    0      X . . .         X . . .         X . . .          X X . .
       |       1      X X . .         X X . .         X X . .          X X . .
       v       2      X X X .         . X X .         . . X .          X X X .
               3      X X X X         . . X X         . . X X          X X X X
             bands:      1               1               2                2

Trade-off: a mask that is not a few bands (random sparsity) is legal as many one-pair bands, but slow. Use a
dense library.

    band.py          one band: trim, intersect, shift, area
    band_index.py    which bands meet
    mask.py          disjoint bands: a mask
    families.py      the masks that have a name
    conventions.py   masks from cumulative offsets, position ids and padding
    batch.py         a mask for each row of a batch
    tree.py          one prompt and many completions: the mask, and what training over a tree needs
"""

from seqmesh.masks.band import Band
from seqmesh.masks.batch import rows
from seqmesh.masks.conventions import from_cu_seqlens, from_key_mask, from_padding, from_position_ids
from seqmesh.masks.families import causal, chunked, cross, documents, full, prefix_lm, sliding_window
from seqmesh.masks.mask import Mask
from seqmesh.masks.tree import Predictions, Tree, tree

__all__ = [
    "Band",
    "Mask",
    "Predictions",
    "Tree",
    "causal",
    "chunked",
    "cross",
    "documents",
    "from_cu_seqlens",
    "from_key_mask",
    "from_padding",
    "from_position_ids",
    "full",
    "prefix_lm",
    "rows",
    "sliding_window",
    "tree",
]
