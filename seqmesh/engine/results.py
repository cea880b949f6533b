"""Results that come in parts: the merged attention of some query rows, and sums of gradients by row.

Which rows are final as they come, and which add up, is known before (rows.py): a row that one part brings is
copied into the result in its own dtype, and only rows of several parts have an accumulator in fp32. A single
part that is the whole result is taken as it is. What a kernel returned is never changed: it may be saved.

Legend: b batch, h heads, n rows, t rows of a part, e head dim of values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqmesh.engine.merge import accumulator_dtype, merge_, sink_weights
from seqmesh.engine.rows import RowPlan


class RunningAttention:
    """The merged (out, lse) of the parts added so far, for n query rows. Rows of no part are (0, -inf)."""

    def __init__(self, plan: RowPlan, q: Tensor, value_head_dim: int) -> None:
        """For queries q (n, b, h, d)."""
        _, b, h, _ = q.shape
        self._plan = plan
        self._q = q
        self._row = (b, h, value_head_dim)
        self._sums_dtype = accumulator_dtype(q.dtype)
        self._taken: tuple[Tensor, Tensor] | None = None
        self._out: Tensor | None = None
        self._sums: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, part: int, out: Tensor, lse: Tensor) -> None:
        """Merge a part: out (b, h, t, e), lse (b, h, t)."""
        if self._plan.is_one_part:
            self._taken = out, lse
            return
        rows_first = out.permute(2, 0, 1, 3)
        running_lse = self._running_lse()
        for put in self._plan.puts[part]:
            block_out = rows_first[put.source]
            block_lse = lse[:, :, put.source]
            if put.is_only:
                self._final()[put.target].copy_(block_out)
                running_lse[:, :, put.target].copy_(block_lse)
                continue
            sums = self._accumulator()
            rows = put.target if sums is self._out else put.place
            if put.is_first:
                sums[rows].copy_(block_out)
                running_lse[:, :, put.target].copy_(block_lse)
            else:
                merge_(sums[rows], running_lse[:, :, put.target], block_out, block_lse)

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
            self._final()[rows].zero_()
            lse[:, :, rows].fill_(-torch.inf)
        if sinks is None:
            return self._finished(None), lse
        weight, lse = sink_weights(lse, sinks)
        return self._finished(weight), lse

    def _finished(self, weight: Tensor | None) -> Tensor:
        """The final output; `weight` (n, b, h, 1) are factors of its rows."""
        out = self._final()
        if weight is not None and (self._sums is None or self._sums is out):
            return out.mul_(weight)
        if weight is not None:
            # Rows that are summed are weighted before they are rounded, the others after.
            assert self._sums is not None
            out.mul_(weight)
            for target, place in self._plan.shared:
                self._sums[place].mul_(weight[target])
        if self._sums is not None and self._sums is not out:
            for target, place in self._plan.shared:
                out[target].copy_(self._sums[place])
        return out

    def _final(self) -> Tensor:
        """(n, b, h, e) in the dtype of q, made when it is first needed."""
        if self._out is None:
            self._out = self._q.new_empty((self._q.shape[0], *self._row))
        return self._out

    def _accumulator(self) -> Tensor:
        """(shared rows, b, h, e) in a dtype that adds up; the final output itself if its dtype does."""
        if self._sums is None:
            if self._q.dtype == self._sums_dtype:
                self._sums = self._final()
            else:
                self._sums = self._q.new_empty((self._plan.shared_rows, *self._row), dtype=self._sums_dtype)
        return self._sums

    def _running_lse(self) -> Tensor:
        """(b, h, n): rows are its second dim in memory, as of `out` the first: merges walk both alike."""
        if self._lse is None:
            b, h, _ = self._row
            self._lse = self._q.new_empty((b, self._q.shape[0], h), dtype=self._sums_dtype).transpose(1, 2)
        return self._lse


class RowSums:
    """Sums of gradients by row: one gradient, or several side by side, such as of K and V."""

    def __init__(self, plan: RowPlan, like: Sequence[Tensor]) -> None:
        """For gradients of tensors (n, b, heads, dim) of any strides, in their dtype."""
        self._plan = plan
        self._shapes = [tuple(x.shape[2:]) for x in like]
        self._widths = [x.shape[2:].numel() for x in like]
        self._like = like[0]
        self._sums_dtype = accumulator_dtype(self._like.dtype)
        self._taken: tuple[Tensor, ...] | None = None
        self._out: Tensor | None = None
        self._sums: Tensor | None = None

    def add(self, part: int, *gradients: Tensor) -> None:
        """Add a part, of each gradient (b, heads, t, dim)."""
        if self._plan.is_one_part:
            self._taken = gradients
            return
        for put in self._plan.puts[part]:
            into = self._into(put.is_only)
            rows = put.target if into is self._out else put.place
            for column, x in zip(self._columns(into[rows]), gradients, strict=True):
                came = x.permute(2, 0, 1, 3)[put.source]
                if put.is_first:
                    column.copy_(came)
                else:
                    column.add_(came)

    def add_flat(self, part: int, gradients: Tensor) -> None:
        """Add a part whose gradients lie side by side: (t, b, sum of heads x dim)."""
        for put in self._plan.puts[part]:
            into = self._into(put.is_only)
            rows = put.target if into is self._out else put.place
            if put.is_first:
                into[rows].copy_(gradients[put.source])
            else:
                into[rows].add_(gradients[put.source])

    def finish(self) -> list[Tensor]:
        """Each gradient (n, b, heads, dim), 0 in rows of no part. They are handed over, not held on to."""
        if self._taken is not None:
            gradients = [x.permute(2, 0, 1, 3).to(self._like.dtype) for x in self._taken]
            self._taken = None
            return gradients
        return self._columns(self._finished())

    def finish_flat(self) -> Tensor:
        """The same side by side: (n, b, sum of heads x dim), contiguous."""
        if self._taken is not None:
            return torch.cat([x.flatten(2) for x in self.finish()], -1)
        return self._finished()

    def _finished(self) -> Tensor:
        out = self._final()
        for rows in self._plan.untouched:
            out[rows].zero_()
        if self._sums is not None and self._sums is not out:
            for target, place in self._plan.shared:
                out[target].copy_(self._sums[place])
        self._out = self._sums = None
        return out

    def _columns(self, flat: Tensor) -> list[Tensor]:
        """(rows, b, width) as one (rows, b, heads, dim) view per gradient."""
        rows, b, _ = flat.shape
        parts = torch.split_with_sizes(flat, self._widths, -1)
        return [part.view(rows, b, *shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _into(self, is_only: bool) -> Tensor:
        """What a part is written to."""
        return self._final() if is_only else self._accumulator()

    def _final(self) -> Tensor:
        """(n, b, width) in the dtype of the tensors, made when it is first needed."""
        if self._out is None:
            n, b = self._like.shape[:2]
            self._out = self._like.new_empty((n, b, sum(self._widths)))
        return self._out

    def _accumulator(self) -> Tensor:
        """(shared rows, b, width) in a dtype that adds up; the final gradients themselves if theirs does."""
        if self._sums is None:
            if self._like.dtype == self._sums_dtype:
                self._sums = self._final()
            else:
                size = (self._plan.shared_rows, self._like.shape[1], sum(self._widths))
                self._sums = self._like.new_empty(size, dtype=self._sums_dtype)
        return self._sums
