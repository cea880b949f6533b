"""Online softmax: merge the attention of one more block into what came before.

    lse = log(e^lse_a + e^lse_b)        w = e^(lse_b - lse) = sigmoid(lse_b - lse_a)
    out = out_a + w (out_b - out_a)

The two weights add up to 1, so one interpolation merges: a single pass over the outputs. An empty row is (0,
-inf) and stays so: no NaN from inf - inf. The running pair is fp32 (fp64 for fp64 inputs).

Legend: b batch, h heads, n rows, e head dim of values. out (n, b, h, e), lse (b, h, n) natural log.
Source: Milakov & Gimelshein 2018; Ring-Attention.
"""

import torch
from torch import Tensor

PIECE_ELEMENTS = 1 << 18
"""Half-precision outputs are widened so many elements at a time: the copy stays small."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial results add up: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block into the running pair, in place.

    Args:
        out: (n, b, h, e) running output, fp32 or fp64.
        lse: (b, h, n) running log-sum-exp; -inf where nothing came yet.
        block_out: (n, b, h, e) output of the block, any float dtype.
        block_lse: (b, h, n) its log-sum-exp.
    """
    # An empty row's -inf becomes a finite number, so that of two empty ones no NaN is made.
    before = lse.clamp_min(torch.finfo(lse.dtype).min)
    weight = torch.sub(block_lse, before).sigmoid_().permute(2, 0, 1).unsqueeze(-1)  # (n, b, h, 1)
    torch.logaddexp(lse, block_lse, out=lse)
    if block_out.dtype == out.dtype:
        out.lerp_(block_out, weight)
        return
    for rows in _pieces(out):
        out[rows].lerp_(block_out[rows].to(out.dtype), weight[rows])


def _pieces(x: Tensor) -> list[slice]:
    """Rows of x in pieces of about PIECE_ELEMENTS."""
    rows = max(1, PIECE_ELEMENTS // max(1, x[:1].numel()))
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]


def sink_weights(lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """What one learned logit per head, which joins the softmax's denominator, does to the final pair.

    Args:
        lse: (b, h, n) log-sum-exp of all keys.
        sinks: (h,) logits.

    Returns:
        The factors (n, b, h, 1) of the output's rows, and the log-sum-exp with the sink, which is what the
        backward needs.
    """
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    # Where lse is -inf the row sees nothing: its output is 0 and must stay so, also if the sink is -inf too.
    weight = torch.where(lse == -torch.inf, 0.0, (lse - total).exp())
    return weight.permute(2, 0, 1).unsqueeze(-1), total


def check_mergeable(out: Tensor, lse: Tensor, what: object) -> None:
    """Raise unless a kernel's output can be merged: what `torch.autograd.detect_anomaly` asks for.

    Raises:
        FloatingPointError: a log-sum-exp of +inf or NaN, or an output that is not finite.
    """
    bad_lse = int((lse.isnan() | (lse == torch.inf)).sum())
    bad_out = int((~out.isfinite()).sum())
    if bad_lse or bad_out:
        raise FloatingPointError(
            f"a kernel returned {bad_lse} log-sum-exps that are +inf or NaN and {bad_out} outputs that are"
            f" not finite for {what}; merged, they would spoil whole rows: look at q, k and v first, and try"
            " kernel='reference'"
        )
