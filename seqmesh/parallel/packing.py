"""Sequences as a data loader gives them -> one packed row without padding: ids, labels, positions, mask.

    input_ids        a a a 0 0        packed     a a a b b b b b
                     b b b b b        position   0 1 2 0 1 2 3 4         mask: documents of 3 and 5 tokens
    attention_mask   1 1 1 0 0        label      a a - b b b b -         the next token, - for none
                     1 1 1 1 1

Labels are shifted here, inside documents and before anything is sharded: on a shard the next token lies on
another rank. What says less than a mask must not leave anything open: it is read by `masks.from_...`, which
refuse what is ambiguous.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from seqmesh import masks
from seqmesh.masks import Mask

IGNORED_LABEL = -100
"""The label of a token that has nothing to predict, as in PyTorch and transformers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """Sequences of one micro-batch, in the names of Hugging Face. `pack` makes one row of them."""

    input_ids: Tensor
    """(b, s) int64"""
    labels: Tensor | None = None
    """(b, s) int64, not shifted, -100 to ignore a token; default: every token is its own label."""
    position_ids: Tensor | None = None
    """(b, s) int64: documents begin where it is 0. May go with `attention_mask`."""
    cu_seqlens: Tensor | None = None
    """(documents + 1,) offsets of documents in the b x s tokens, row after row: flash-attn's form."""
    attention_mask: Tensor | None = None
    """(b, s), 0 for padding, on the left or on the right of a row: it is dropped."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedTokens:
    """Whole sequences in one row, the same on all ranks that share them."""

    input_ids: Tensor
    """(1, s) int64"""
    shift_labels: Tensor
    """(1, s) int64: the next token of the same document, -100 where there is none."""
    position_ids: Tensor
    """(1, s) int64: place in the document."""
    mask: Mask

    @property
    def label_count(self) -> int:
        """Tokens that have something to predict."""
        return int((self.shift_labels != IGNORED_LABEL).sum())


def pack(batch: TokenBatch) -> PackedTokens:
    """One row of all documents of a micro-batch.

    Raises:
        ValueError: shapes that differ, documents said twice, or what `masks.from_...` refuse.
    """
    _check_shapes(batch)
    ids = batch.input_ids
    labels = ids if batch.labels is None else batch.labels
    if batch.attention_mask is None:
        kept = torch.ones_like(ids, dtype=torch.bool)
    else:
        kept = batch.attention_mask.bool()
    lengths = _lengths(batch, kept)
    positions = torch.cat([torch.arange(length) for length in lengths]) if lengths else torch.empty(0)
    return PackedTokens(
        input_ids=ids[kept][None],
        shift_labels=_shifted(labels[kept], lengths)[None],
        position_ids=positions.to(ids)[None],
        mask=masks.documents(lengths),
    )


def _check_shapes(batch: TokenBatch) -> None:
    shape = tuple(batch.input_ids.shape)
    if len(shape) != 2:
        raise ValueError(f"input_ids of shape {shape}: need (b, s); add the batch dimension")
    for name in ("labels", "position_ids", "attention_mask"):
        given: Tensor | None = getattr(batch, name)
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(
                f"{name} of shape {tuple(given.shape)} with input_ids of shape {shape};"
                " pass one number for each token"
            )
    if batch.cu_seqlens is None:
        return
    for name in ("position_ids", "attention_mask"):
        if getattr(batch, name) is not None:
            raise ValueError(
                f"cu_seqlens and {name} both say where documents are; pass cu_seqlens alone,"
                " of tokens without padding"
            )


def _lengths(batch: TokenBatch, kept: Tensor) -> list[int]:
    """Tokens of every document that has any, row after row."""
    if batch.cu_seqlens is not None:
        mask = masks.from_cu_seqlens(batch.cu_seqlens)
        if mask.q_len != batch.input_ids.numel():
            raise ValueError(
                f"cu_seqlens ends at {mask.q_len} but input_ids holds {batch.input_ids.numel()} tokens;"
                " its last offset is the number of tokens"
            )
        offsets = batch.cu_seqlens.tolist()
        return [stop - start for start, stop in pairwise(offsets) if stop > start]
    found: list[int] = []
    for row, mine in enumerate(kept):
        if batch.attention_mask is not None:
            masks.from_padding(batch.attention_mask[row])  # refuses padding between tokens
        if batch.position_ids is None:
            whole = int(mine.sum())
            found += [whole] if whole else []
        else:
            bands = masks.from_position_ids(batch.position_ids[row][mine]).bands
            found += [band.q_stop - band.q_start for band in bands]
    return found


def _shifted(labels: Tensor, lengths: list[int]) -> Tensor:
    """(s,) labels of the next token of the same document."""
    shifted = labels.roll(-1)
    ends = torch.tensor(lengths, dtype=torch.int64, device=labels.device).cumsum(0) - 1
    shifted[ends] = IGNORED_LABEL
    return shifted
