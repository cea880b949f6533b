"""The merge of merge.py as one Triton kernel: each output is read once and written once. For CUDA.

    rows          |  plain: sub, sigmoid, logaddexp, lerp, and a wide copy of half-precision blocks
    [ROWS] x [e]  |  here:  one program does all of it for ROWS rows of a head

Loaded on first use only: PyTorch's CUDA builds bring Triton, its CPU builds do not. merge.py's plain version
is the oracle; tests run this one in Triton's interpreter, on CPU, and an H200 has run it (docs/gpu.md).

Legend: b batch, h heads, n rows, e head dim of values.
"""

import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Rows of a program: 16 x 128 elements keep four warps busy and in registers."""
LOWEST = tl.constexpr(-3e38)
"""Below any log-sum-exp that is not -inf. One that fp32 has, in which Triton passes numbers, for fp64 too."""


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _merge_rows(  # type: ignore[no-untyped-def]
    out, lse, block_out, block_lse, rows, heads, dim,
    out_n, out_b, out_h, out_e,
    lse_n, lse_b, lse_h,
    block_out_n, block_out_b, block_out_h, block_out_e,
    block_lse_n, block_lse_b, block_lse_h,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head of one batch entry; `x_n` is the stride of x along its rows, and so on."""
    # 64 bits: a long sequence has more than 2^31 elements
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    e = tl.arange(0, DIM)
    is_row = n < rows
    is_element = is_row[:, None] & (e < dim)[None, :]

    lse_at = lse + b * lse_b + h * lse_h + n * lse_n
    block_lse_at = block_lse + b * block_lse_b + h * block_lse_h + n * block_lse_n
    out_at = out + b * out_b + h * out_h + n[:, None] * out_n + e[None, :] * out_e
    block_out_at = block_out + b * block_out_b + h * block_out_h
    block_out_at += n[:, None] * block_out_n + e[None, :] * block_out_e
    old = tl.load(lse_at, mask=is_row, other=0.0)
    new = tl.load(block_lse_at, mask=is_row, other=0.0).to(old.dtype)
    before = tl.load(out_at, mask=is_element, other=0.0)
    came = tl.load(block_out_at, mask=is_element, other=0.0).to(before.dtype)
    # Every warp reads the log-sum-exp of all rows, and one of them overwrites it: not before all have read.
    tl.debug_barrier()

    # An empty row's -inf becomes a finite number, so that of two empty ones no NaN is made.
    weight = 1.0 / (1.0 + tl.exp(tl.maximum(old, LOWEST) - new))
    top = tl.maximum(tl.maximum(old, new), LOWEST)
    tl.store(lse_at, top + tl.log(tl.exp(old - top) + tl.exp(new - top)), mask=is_row)
    # From the nearer end, so that a weight of 0 or 1 gives one of the two exactly.
    step = came - before
    wide = weight[:, None]
    merged = tl.where(wide < 0.5, before + wide * step, came - (1.0 - wide) * step)
    tl.store(out_at, merged, mask=is_element)


def fused_merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block into the running pair, in place: the same as `merge_plain_`, in one launch.

    Args:
        out: (n, b, h, e) running output, fp32 or fp64, of any strides, as all four.
        lse: (b, h, n) running log-sum-exp, in the dtype of `out`.
        block_out: (n, b, h, e) output of the block, any float dtype.
        block_lse: (b, h, n) its log-sum-exp.
    """
    n, b, h, e = out.shape
    if out.numel() == 0:
        return
    lse_b, lse_h, lse_n = lse.stride()
    block_lse_b, block_lse_h, block_lse_n = block_lse.stride()
    _merge_rows[(triton.cdiv(n, ROWS), b * h)](
        out, lse, block_out, block_lse, n, h, e,
        *out.stride(),
        lse_n, lse_b, lse_h,
        *block_out.stride(),
        block_lse_n, block_lse_b, block_lse_h,
        ROWS=ROWS, DIM=triton.next_power_of_2(e),
    )  # fmt: skip
