"""Online softmax: merge the attention of one more block; and sums of gradients by row.

    lse = log(e^lse_a + e^lse_b)        out = out_a e^(lse_a - lse) + out_b e^(lse_b - lse)

An empty row is (0, -inf) and stays so: no NaN from inf - inf. The running pair is fp32 (fp64 for fp64
inputs).

Legend: b batch, h heads, n rows, d head dim. out (n, b, h, d), lse (b, h, n) natural log.
Source: Milakov & Gimelshein 2018; Ring-Attention.
"""

from bisect import bisect_left, bisect_right

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial results add up: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weight(part: Tensor, total: Tensor) -> Tensor:
    """e^(part - total) of (b, h, n), as (n, b, h, 1): 0 where the part is empty, and total may be -inf."""
    weight = torch.where(part == -torch.inf, 0.0, (part - total).exp())
    return weight.permute(2, 0, 1).unsqueeze(-1)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block into the running pair, in place.

    Args:
        out: (n, b, h, d) running output, fp32 or fp64.
        lse: (b, h, n) running log-sum-exp; -inf where nothing came yet.
        block_out: (n, b, h, d) output of the block, any float dtype.
        block_lse: (b, h, n) its log-sum-exp.
    """
    total = torch.logaddexp(lse, block_lse)
    out.mul_(_weight(lse, total))
    out.addcmul_(block_out.to(out.dtype), _weight(block_lse, total))
    lse.copy_(total)


def apply_sinks_(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Add one learned logit per head to the softmax's denominator, in place, once, on the final pair.

    Args:
        out: (n, b, h, d) output of all keys.
        lse: (b, h, n) its log-sum-exp; afterwards it includes the sink, which is what the backward needs.
        sinks: (h,) logits.
    """
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    out.mul_(_weight(lse, total))
    lse.copy_(total)


class RunningAttention:
    """The merged (out, lse) of the blocks added so far, for n query rows.

    Rows that nothing was added to are (0, -inf). A first block that covers every row is taken as it is; rows
    that are touched for the first time are copied, not merged.
    """

    def __init__(self, q: Tensor) -> None:
        """For queries q (n, b, h, d)."""
        self._q = q
        self._touched = _Rows()
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merge the attention of some rows to some more keys: out (b, h, rows, d), lse (b, h, rows)."""
        out = out.permute(2, 0, 1, 3)
        is_fresh = self._touched.add(rows.start, rows.stop)
        if self._out is None and rows.stop - rows.start == self._q.shape[0]:
            # As stage 0 of zigzag is: what the kernel made is taken, nothing is copied.
            self._out = out
            self._lse = lse
            return
        running, running_lse = self._accumulators()
        if is_fresh:
            running[rows].copy_(out)
            running_lse[:, :, rows].copy_(lse)
        else:
            merge_(running[rows], running_lse[:, :, rows], out, lse)

    def _accumulators(self) -> tuple[Tensor, Tensor]:
        """The running pair in a dtype that adds up, made when it is first needed."""
        dtype = accumulator_dtype(self._q.dtype)
        if self._out is None or self._lse is None:
            n, b, h, _ = self._q.shape
            self._out = self._q.new_zeros(self._q.shape, dtype=dtype)
            # Rows are its second dim in memory, as they are of out: a merge walks through both in the same
            # order.
            self._lse = self._q.new_full((b, n, h), -torch.inf, dtype=dtype).transpose(1, 2)
        self._out = self._out.to(dtype)
        return self._out, self._lse

    def finish(self, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """The merged out (n, b, h, d) in the dtype of q, and lse (b, h, n).

        Sinks (h,), if there are any, join the denominator here, once.
        """
        if sinks is not None or self._out is None or self._lse is None:
            self._accumulators()
        assert self._out is not None
        assert self._lse is not None
        if sinks is not None:
            apply_sinks_(self._out, self._lse, sinks)
        return self._out.to(self._q.dtype), self._lse


class RowSums:
    """Sums of gradients by row, in fp32 (fp64 for fp64).

    Rows that are touched for the first time are copied, not added: most rows are touched once.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        """For a gradient of this shape (n, b, heads, d), on the device and for the dtype of `like`."""
        self._shape = shape
        self._like = like
        self._touched = _Rows()
        self._sums: Tensor | None = None

    def add(self, rows: slice, *parts: Tensor) -> None:
        """Add (b, heads_i, rows, d) parts, whose heads follow one another, to some rows."""
        is_fresh = self._touched.add(rows.start, rows.stop)
        if self._sums is None and len(parts) == 1 and rows.stop - rows.start == self._shape[0]:
            self._sums = parts[0].permute(2, 0, 1, 3).to(accumulator_dtype(self._like.dtype))
            return
        into = self.sums()[rows]
        head = 0
        for part in parts:
            heads = into[:, :, head : head + part.shape[1]]
            if is_fresh:
                heads.copy_(part.permute(2, 0, 1, 3))
            else:
                heads.add_(part.permute(2, 0, 1, 3))
            head += part.shape[1]

    def sums(self) -> Tensor:
        """The (n, b, heads, d) sums so far; zero where nothing was added."""
        if self._sums is None:
            self._sums = self._like.new_zeros(self._shape, dtype=accumulator_dtype(self._like.dtype))
        return self._sums


class _Rows:
    """Which rows were touched, as sorted disjoint ranges that grow together.

    A narrow band is thousands of strips: each costs two bisections here, not a walk.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> bool:
        """Mark rows; True if none of them was marked before.

        A partly marked range counts as marked: merging into zeros is exact, too.
        """
        # The ranges that meet [start, stop) or touch it.
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        met = zip(self._starts[first:last], self._stops[first:last], strict=True)
        is_fresh = all(their_stop <= start or stop <= their_start for their_start, their_stop in met)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]
        return is_fresh
