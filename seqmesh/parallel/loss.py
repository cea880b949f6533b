"""Next-token loss from hidden states: logits of all rows never exist, nor does the vocabulary on one rank.

    hidden (n, H)  x  weight (V / t, H)  ->  sum over n of  log sum exp(logits) - logit of the label

Rows are taken in chunks. A chunk's logits, (chunk, V / t) in fp32, are all that exists of them: the backward
computes them again, from the hidden states and the log-sum-exp that the forward kept, (n,). Ranks of tp hold
a part of the vocabulary each; they tell each other three numbers a row in the forward, and their part of the
gradient of the hidden states in the backward.

The loss is a sum over this rank's labels, divided by the labels of everywhere (`LocalBatch.label_count`). A
rank without a valid label gives exactly 0 and zero gradients, and still takes part in every collective.

Legend: n local rows, H hidden size, V vocabulary, t tp degree.
Source: Megatron-LM's vocabulary-parallel cross entropy (Shoeybi et al. 2019); cut cross-entropy (Wijmans et
al. 2024) for not keeping logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional as F

from seqmesh.engine.merge import accumulator_dtype
from seqmesh.parallel.packing import IGNORED_LABEL


@dataclass(frozen=True, kw_only=True)
class HeadRule:
    """How logits follow from hidden states and the head's weight, and how many rows at once."""

    softcap: float | None = None
    """c for logits c tanh(logits / c)."""
    chunk_rows: int = 1024
    """Rows whose logits exist at once."""

    def __post_init__(self) -> None:
        """Refuse chunks without a row."""
        if self.chunk_rows < 1:
            raise ValueError(f"chunk_rows={self.chunk_rows}: a chunk has at least 1 row; use 1024")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Vocabulary:
    """The part of the vocabulary that this rank holds."""

    start: int
    """Its first token id."""
    group: Any
    """Ranks that hold the other parts; None if there are none."""

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the parts, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The largest x of the parts, in place."""
        if self.group is not None:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x


def hidden_loss(
    hidden: Tensor, weight: Tensor, shift_labels: Tensor, label_count: int, rule: HeadRule | None = None
) -> Tensor:
    """This rank's share of the mean next-token cross entropy.

    Args:
        hidden: (b, n, H) after the last norm, any floating dtype.
        weight: (V, H) of the output embedding; a DTensor whose rows are sharded over tp is used as it lies.
        shift_labels: (b, n) int64, -100 where there is nothing to predict.
        label_count: labels of all ranks and micro-batches of the step.
        rule: chunks and softcap.

    Returns:
        A scalar in fp32 (fp64 for fp64), the same on all ranks of tp.

    Raises:
        ValueError: labels of another shape, or more of them on this rank than label_count.
    """
    if hidden.shape[:-1] != shift_labels.shape:
        raise ValueError(
            f"hidden states {tuple(hidden.shape)} with labels {tuple(shift_labels.shape)}:"
            " need (b, n, H) and (b, n)"
        )
    labels = shift_labels.flatten()
    here = int((labels != IGNORED_LABEL).sum())
    if label_count < max(1, here):
        raise ValueError(
            f"label_count={label_count} but this rank alone has {here} labels; pass the count of all ranks"
            " and micro-batches (LocalBatch.label_count)"
        )
    vocabulary = _Vocabulary(start=0, group=None)
    if isinstance(weight, DTensor):
        placed = (weight.shape, weight.device_mesh, weight.placements)
        (_, offset) = compute_local_shape_and_global_offset(*placed)
        vocabulary = _Vocabulary(start=offset[0], group=weight.device_mesh.get_group())
        weight = weight.to_local()
    total: Tensor = _SummedLoss.apply(hidden.flatten(0, -2), weight, labels, vocabulary, rule or HeadRule())
    return total / label_count


class _SummedLoss(torch.autograd.Function):
    """rows (n, H), weight (V / t, H), labels (n,) -> the sum of cross entropies of the valid labels."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, vocabulary: _Vocabulary, rule: HeadRule
    ) -> Tensor:
        dtype = accumulator_dtype(rows.dtype)
        all_lse = rows.new_empty(rows.shape[0], dtype=dtype)
        total = rows.new_zeros((), dtype=dtype)
        for chunk in _chunks(rows.shape[0], rule):
            logits = _logits(rows[chunk], weight, rule)
            here, place = _targets(labels[chunk], vocabulary, weight.shape[0])
            peak = vocabulary.largest(logits.amax(1))
            own = logits.gather(1, place[:, None])[:, 0].where(here, 0.0)
            sums = vocabulary.sum(torch.stack([(logits - peak[:, None]).exp().sum(1), own]))
            all_lse[chunk] = peak + sums[0].log()
            total += (all_lse[chunk] - sums[1]).where(labels[chunk] != IGNORED_LABEL, 0.0).sum()
        ctx.vocabulary, ctx.rule = vocabulary, rule
        ctx.save_for_backward(rows, weight, labels, all_lse)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, labels, all_lse = ctx.saved_tensors
        needs_rows, needs_weight, *_ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight, dtype=all_lse.dtype) if needs_weight else None
        for chunk in _chunks(rows.shape[0], ctx.rule):
            logits = _logits(rows[chunk], weight, ctx.rule)
            here, place = _targets(labels[chunk], ctx.vocabulary, weight.shape[0])
            # d loss / d logits = softmax - one-hot of the label, 0 where nothing is predicted
            slope = (logits - all_lse[chunk, None]).exp()
            slope.scatter_add_(1, place[:, None], -here.to(slope.dtype)[:, None])
            slope *= grad * (labels[chunk] != IGNORED_LABEL)[:, None]
            if ctx.rule.softcap is not None:
                slope *= 1 - (logits / ctx.rule.softcap) ** 2
            slope = slope.to(weight.dtype)
            grad_rows[chunk] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.T @ rows[chunk]
        if needs_rows:
            ctx.vocabulary.sum(grad_rows)
        weights = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_rows if needs_rows else None, weights, None, None, None


def _chunks(rows: int, rule: HeadRule) -> Iterator[slice]:
    for start in range(0, rows, rule.chunk_rows):
        yield slice(start, min(rows, start + rule.chunk_rows))


def _logits(rows: Tensor, weight: Tensor, rule: HeadRule) -> Tensor:
    """(chunk, V / t) in the dtype of accumulators."""
    logits = F.linear(rows, weight)
    logits = logits.to(accumulator_dtype(logits.dtype))
    return logits if rule.softcap is None else rule.softcap * (logits / rule.softcap).tanh()


def _targets(labels: Tensor, vocabulary: _Vocabulary, size: int) -> tuple[Tensor, Tensor]:
    """Whether this rank holds the logit of each row's label, and where (0 if it does not)."""
    place = labels - vocabulary.start
    here = (labels != IGNORED_LABEL) & (place >= 0) & (place < size)
    return here, place.where(here, 0)
