"""Next-token loss over a sequence that is spread over ranks: a sum here, divided by the count of everywhere.

    loss of rank r  =  sum of cross entropies of its valid tokens / valid tokens of ALL ranks
    global loss     =  sum of these over ranks

Hence the global loss is the mean over all valid tokens, however unevenly they are spread.

The count comes from the global batch, which every rank has before sharding (`PackedTokens.label_count`), so
the loss needs no communication, and a rank without a valid label gives exactly 0 with zero gradients: it
still runs its whole backward, whose collectives the other ranks wait for. A mean per rank would weigh tokens
differently and be 0/0 there.

Gradients combine by a SUM over ranks (all-reduce with SUM). Wrappers that average over W ranks
(DistributedDataParallel, FSDP) need W times this loss; nothing else changes.

Labels must be shifted before sharding (data.py).
"""

from typing import cast

from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from seqmesh.engine.merge import accumulator_dtype
from seqmesh.parallel.packing import IGNORED_LABEL


def next_token_loss(
    logits: Tensor, shift_labels: Tensor, label_count: int, *, chunk_rows: int = 4096
) -> Tensor:
    """This rank's share of the mean next-token cross entropy: its sum over the valid tokens of all ranks.

    Rows are taken in chunks and each chunk's fp32 logits are recomputed in the backward, so neither fp32
    logits nor log-probabilities of all rows exist at once.

    Args:
        logits: (b, n, vocabulary) of this rank's tokens, any floating dtype; n may be 0.
        shift_labels: (b, n) int64, -100 where there is nothing to predict.
        label_count: valid labels in the global batch, over all ranks.
        chunk_rows: rows per chunk.

    Returns:
        A scalar in fp32 (fp64 for fp64 logits), with a gradient path even if no label is valid.

    Raises:
        ValueError: shapes that do not match, a count below 1, or below the valid labels of this rank alone.
    """
    if logits.shape[:-1] != shift_labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} with labels {tuple(shift_labels.shape)}:"
            " need (b, n, vocabulary) and (b, n)"
        )
    rows = logits.flatten(0, -2)
    labels = shift_labels.flatten()
    here = int((labels != IGNORED_LABEL).sum())
    if label_count < max(1, here):
        raise ValueError(
            f"label_count={label_count} but this rank alone has {here} labels;"
            " pass the count of the global batch (PackedTokens.label_count)"
        )
    # The sum of no rows is 0, but has a gradient: a rank without tokens must run its backward too.
    total = rows.new_zeros((), dtype=accumulator_dtype(rows.dtype)) + rows[:0].sum()
    for start in range(0, rows.shape[0], chunk_rows):
        chunk = slice(start, start + chunk_rows)
        part = checkpoint(_cross_entropy_sum, rows[chunk], labels[chunk], use_reentrant=False)
        total = total + cast(Tensor, part)
    return total / label_count


def _cross_entropy_sum(rows: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        rows.to(accumulator_dtype(rows.dtype)), labels, ignore_index=IGNORED_LABEL, reduction="sum"
    )
