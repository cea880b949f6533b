"""A mask for each row of a batch: the rows become documents of one long row.

    batch of 2 rows x 3 tokens           one row of 6 tokens         block-diagonal mask
        a a a                            a a a b b b                 A A A . . .
        b b b                                                        A A A . . .
                                                                     A A A . . .
                                                                     . . . B B B  (and twice more)

Attention shares its mask among the sequences of its batch dimension. Rows whose masks differ are laid one
after the other instead: nothing is computed between them, and the layout spreads them over the ring like
documents.
"""

from collections.abc import Iterable

from seqmesh.masks.band import Band
from seqmesh.masks.mask import Mask


def rows(row_masks: Iterable[Mask]) -> Mask:
    """The mask of rows laid one after the other: each sees by its own mask, and no other row.

    Args:
        row_masks: any mask for each row, of any length; the queries and the keys of rectangular ones
            (cross-attention) are laid out each for themselves.

    Raises:
        ValueError: something that is not a mask.
    """
    bands: list[Band] = []
    q_len = k_len = 0
    for at, mask in enumerate(row_masks):
        if not isinstance(mask, Mask):
            raise ValueError(f"row {at} is {mask!r}, not a mask; pass one Mask for each row of the batch")
        bands.extend(band.shift(q_len, k_len) for band in mask.bands)
        q_len += mask.q_len
        k_len += mask.k_len
    return Mask(q_len, k_len, tuple(bands))
