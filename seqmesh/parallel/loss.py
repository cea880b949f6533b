"""Next-token loss from hidden states: logits of all rows never exist, nor does the vocabulary on one rank.

    hidden (n, H)  x  weight (V / t, H)  ->  sum over n of  log sum exp(logits) - logit of the label

Rows are taken in chunks. A chunk's logits and their exp, (chunk, V / t) in fp32, are all that exists of them.
They are made once: the forward makes the gradients from them too, of the hidden states and of the weight, and
the backward multiplies those by its own. Ranks of tp hold a part of the vocabulary each; they tell each other
three numbers a row, and their part of the gradient of the hidden states.

The loss is a sum over this rank's labels, divided by the labels of everywhere (`LocalBatch.label_count`). A
rank without a valid label gives exactly 0 and zero gradients, and still takes part in every collective.

Legend: n local rows, H hidden size, V vocabulary, t tp degree.
Source: Megatron-LM's vocabulary-parallel cross entropy (Shoeybi et al. 2019); cut cross-entropy (Wijmans et
al. 2024) for not keeping logits; Liger kernels' fused linear cross entropy (Hsu et al. 2024) for gradients in
the forward.
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
        ValueError: labels of another shape, out of the vocabulary, or more of them on this rank than
            label_count; a weight that is sharded otherwise.
    """
    labels = shift_labels.flatten()
    _check_labels(hidden, shift_labels, label_count, weight.shape[0])
    vocabulary = _Vocabulary(start=0, group=None)
    if isinstance(weight, DTensor):
        if weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard(0):
            raise ValueError(
                f"the weight is a DTensor with placements {weight.placements}: need its rows sharded over a"
                " 1-D mesh (Shard(0)), or a plain tensor"
            )
        placed = (weight.shape, weight.device_mesh, weight.placements)
        (_, offset) = compute_local_shape_and_global_offset(*placed)
        vocabulary = _Vocabulary(start=offset[0], group=weight.device_mesh.get_group())
        weight = weight.to_local()
    asked = _Asked(rule=rule or HeadRule(), label_count=label_count, with_gradients=torch.is_grad_enabled())
    share: Tensor = _LossShare.apply(hidden.flatten(0, -2), weight, labels, vocabulary, asked)
    return share


def _check_labels(hidden: Tensor, shift_labels: Tensor, label_count: int, size: int) -> None:
    if hidden.shape[:-1] != shift_labels.shape:
        raise ValueError(
            f"hidden states {tuple(hidden.shape)} with labels {tuple(shift_labels.shape)}:"
            " need (b, n, H) and (b, n)"
        )
    is_label = shift_labels != IGNORED_LABEL
    here = int(is_label.sum())
    if label_count < max(1, here):
        raise ValueError(
            f"label_count={label_count} but this rank alone has {here} labels; pass the count of all ranks"
            " and micro-batches (LocalBatch.label_count)"
        )
    inside = int((is_label & (shift_labels >= 0) & (shift_labels < size)).sum())
    if inside < here:
        raise ValueError(
            f"{here - inside} labels out of a vocabulary of {size}: need 0 to {size - 1}, or {IGNORED_LABEL}"
            " where there is nothing to predict"
        )


class _LossShare(torch.autograd.Function):
    """rows (n, H), weight (V / t, H), labels (n,) -> sum of valid labels' cross entropies / label_count."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, vocabulary: _Vocabulary, asked: "_Asked"
    ) -> Tensor:
        """The loss and, if `asked`, its gradients: what a chunk's logits are made for once serves both."""
        with_rows, with_weight = (asked.with_gradients and needs for needs in ctx.needs_input_grad[:2])
        dtype = accumulator_dtype(rows.dtype)
        total = rows.new_zeros((), dtype=dtype)
        grad_rows = torch.empty_like(rows) if with_rows else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if with_weight else None
        for chunk in _chunks(rows.shape[0], asked.rule):
            loss, slope = _chunk_loss(rows[chunk], weight, labels[chunk], vocabulary, asked)
            total += loss
            if grad_rows is not None:
                grad_rows[chunk] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.T @ rows[chunk]
            del slope  # before the next chunk's logits are made
        if grad_rows is not None:
            vocabulary.sum(grad_rows)
        ctx.save_for_backward(grad_rows, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total / asked.label_count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients times the loss's own. They stay: a pipeline may come twice, for rows and for weights."""
        grad_rows, grad_weight = (None if x is None else x * grad for x in ctx.saved_tensors)
        return grad_rows, grad_weight, None, None, None


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What the loss is to be."""

    rule: HeadRule
    label_count: int
    with_gradients: bool


def _chunk_loss(
    rows: Tensor, weight: Tensor, labels: Tensor, vocabulary: _Vocabulary, asked: _Asked
) -> tuple[Tensor, Tensor]:
    """The sum of a chunk's cross entropies, (), and d loss / d (rows @ weight.T), (chunk, V / t)."""
    cap = asked.rule.softcap
    logits = F.linear(rows, weight)
    logits = logits.to(accumulator_dtype(logits.dtype))
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    here, place = _targets(labels, vocabulary, weight.shape[0])
    peak = vocabulary.largest(logits.amax(1))
    own = logits.gather(1, place[:, None])[:, 0].where(here, 0.0)
    slope = logits.sub_(peak[:, None]).exp()
    sums = vocabulary.sum(torch.stack([slope.sum(1), own]))
    is_valid = labels != IGNORED_LABEL
    total = (peak + sums[0].log() - sums[1]).where(is_valid, 0.0).sum()
    if not asked.with_gradients:
        return total, slope
    # softmax - one-hot of the label, 0 where nothing is predicted
    slope /= sums[0, :, None]
    slope.scatter_add_(1, place[:, None], -here.to(slope.dtype)[:, None])
    slope *= is_valid[:, None].to(slope.dtype) / asked.label_count
    if cap is not None:
        slope *= 1 - ((logits + peak[:, None]) / cap) ** 2
    del logits
    return total, slope.to(weight.dtype)


def _chunks(rows: int, rule: HeadRule) -> Iterator[slice]:
    for start in range(0, rows, rule.chunk_rows):
        yield slice(start, min(rows, start + rule.chunk_rows))


def _targets(labels: Tensor, vocabulary: _Vocabulary, size: int) -> tuple[Tensor, Tensor]:
    """Whether this rank holds the logit of each row's label, and where (0 if it does not)."""
    place = labels - vocabulary.start
    here = (labels != IGNORED_LABEL) & (place >= 0) & (place < size)
    return here, place.where(here, 0)
