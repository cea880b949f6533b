"""Results that come in parts: the merged attention of some query rows, and sums of gradients by row.

Which rows are final as they come, and which add up, is known before (rows.py): a row that one part brings is
copied into the result in its own dtype, and only rows of several parts have an accumulator in fp32. A single
part that is the whole result is taken as it is. What a kernel returned is never changed: it may be saved.

Legend: b batch, h heads, n rows, t rows of a part, e head dim of values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqmesh.engine.exchange import columns
from seqmesh.engine.merge import accumulator_dtype, merge_, sink_weights
from seqmesh.engine.rows import Put, RowPlan


class _RowBuffers:
    """The rows of a result in its own dtype, and sums in a dtype that adds up for those of several parts."""

    def __init__(self, plan: RowPlan, like: Tensor, row: tuple[int, ...]) -> None:
        """For rows of shape `row`, in the dtype of `like` (n, ...)."""
        self._plan = plan
        self._like = like
        self._row = row
        self._sums_dtype = accumulator_dtype(like.dtype)
        self._out: Tensor | None = None
        self._sums: Tensor | None = None

    def rows_of(self, put: Put) -> Tensor:
        """The rows that a put is written or added to."""
        if put.is_only:
            return self._final()[put.target]
        sums = self._accumulator()
        return sums[put.target if sums is self._out else put.place]

    def finished(self, weight: Tensor | None = None) -> Tensor:
        """The result, 0 in rows of no part; its rows times `weight`, if there is one. Hands it over."""
        out = self._final()
        for rows in self._plan.untouched:
            out[rows].zero_()
        if weight is not None:
            out.mul_(weight)
        if self._sums is not None and self._sums is not out:
            for target, place in self._plan.shared:
                summed = self._sums[place]
                # Rows that are summed are weighted before they are rounded, the others after.
                out[target].copy_(summed if weight is None else summed.mul_(weight[target]))
        self._out = self._sums = None
        return out

    def _final(self) -> Tensor:
        """(n, ...) in the dtype of the result, made when it is first needed."""
        if self._out is None:
            self._out = self._like.new_empty((self._like.shape[0], *self._row))
        return self._out

    def _accumulator(self) -> Tensor:
        """(shared rows, ...) in a dtype that adds up; the result itself if its dtype does."""
        if self._sums is None:
            if self._like.dtype == self._sums_dtype:
                self._sums = self._final()
            else:
                size = (self._plan.shared_rows, *self._row)
                self._sums = self._like.new_empty(size, dtype=self._sums_dtype)
        return self._sums


class RunningAttention:
    """The merged (out, lse) of the parts added so far, for n query rows. Rows of no part are (0, -inf)."""

    def __init__(self, plan: RowPlan, q: Tensor, value_head_dim: int) -> None:
        """For queries q (n, b, h, d)."""
        self._plan = plan
        self._q = q
        self._buffers = _RowBuffers(plan, q, (*q.shape[1:3], value_head_dim))
        self._taken: tuple[Tensor, Tensor] | None = None
        self._lse: Tensor | None = None

    def add(self, part: int, out: Tensor, lse: Tensor) -> None:
        """Merge a part: out (b, h, t, e), lse (b, h, t)."""
        if self._plan.is_one_part:
            self._taken = out, lse
            return
        rows_first = out.permute(2, 0, 1, 3)
        for put in self._plan.puts[part]:
            running = self._buffers.rows_of(put)
            running_lse = self._running_lse()[:, :, put.target]
            block_out = rows_first[put.source]
            block_lse = lse[:, :, put.source]
            if put.is_first:
                running.copy_(block_out)
                running_lse.copy_(block_lse)
            else:
                merge_(running, running_lse, block_out, block_lse)

    def finish(self, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """The merged out (n, b, h, e) in the dtype of q, and lse (b, h, n).

        Sinks (h,), if there are any, join the denominator here, once.
        """
        if self._taken is not None:
            out, lse = self._taken
            out = out.permute(2, 0, 1, 3)
            if sinks is not None:
                weight, lse = sink_weights(lse, sinks)
                out = out * weight
            return out.to(self._q.dtype), lse
        lse = self._running_lse()
        for rows in self._plan.untouched:
            lse[:, :, rows].fill_(-torch.inf)
        if sinks is None:
            return self._buffers.finished(), lse
        weight, lse = sink_weights(lse, sinks)
        return self._buffers.finished(weight), lse

    def _running_lse(self) -> Tensor:
        """(b, h, n): rows are its second dim in memory, as of `out` the first: merges walk both alike."""
        if self._lse is None:
            n, b, h, _ = self._q.shape
            dtype = accumulator_dtype(self._q.dtype)
            self._lse = self._q.new_empty((b, n, h), dtype=dtype).transpose(1, 2)
        return self._lse


class RowSums:
    """Sums of gradients by row: one gradient, or several side by side, such as of K and V."""

    def __init__(self, plan: RowPlan, like: Sequence[Tensor]) -> None:
        """For gradients of tensors (n, b, heads, dim) of any strides, in their dtype."""
        self._plan = plan
        self._shapes = [(x.shape[2], x.shape[3]) for x in like]
        width = sum(heads * dim for heads, dim in self._shapes)
        self._dtype = like[0].dtype
        self._buffers = _RowBuffers(plan, like[0], (like[0].shape[1], width))
        self._taken: tuple[Tensor, ...] | None = None

    def add(self, part: int, *gradients: Tensor) -> None:
        """Add a part, of each gradient (b, heads, t, dim)."""
        if self._plan.is_one_part:
            self._taken = gradients
            return
        for put in self._plan.puts[part]:
            into = columns(self._buffers.rows_of(put), self._shapes)
            for column, x in zip(into, gradients, strict=True):
                _put(column, x.permute(2, 0, 1, 3)[put.source], is_first=put.is_first)

    def add_flat(self, part: int, gradients: Tensor) -> None:
        """Add a part whose gradients lie side by side: (t, b, sum of heads x dim)."""
        for put in self._plan.puts[part]:
            _put(self._buffers.rows_of(put), gradients[put.source], is_first=put.is_first)

    def finish(self) -> list[Tensor]:
        """Each gradient (n, b, heads, dim), 0 in rows of no part. They are handed over, not held on to."""
        if self._taken is not None:
            gradients = [x.permute(2, 0, 1, 3).to(self._dtype) for x in self._taken]
            self._taken = None
            return gradients
        return columns(self._buffers.finished(), self._shapes)

    def finish_flat(self) -> Tensor:
        """The same side by side: (n, b, sum of heads x dim), contiguous."""
        if self._taken is not None:
            return torch.cat([x.flatten(2) for x in self.finish()], -1)
        return self._buffers.finished()


def _put(into: Tensor, came: Tensor, *, is_first: bool) -> None:
    """The first part of some rows is copied, the others are added."""
    if is_first:
        into.copy_(came)
    else:
        into.add_(came)
