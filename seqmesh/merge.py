"""Online softmax: merge the attention of one more block into a running (out, lse).

    lse = log(e^lse_a + e^lse_b)        out = out_a e^(lse_a - lse) + out_b e^(lse_b - lse)

An empty row is (0, -inf) and stays so: no NaN from inf - inf. The running pair is fp32 (fp64 for fp64 inputs).
Legend: b batch, h heads, n rows, d head dim. out (n, b, h, d), lse (b, h, n) natural log.

Where it sits: the torch layer, used by attention.py after each block. Source: Milakov & Gimelshein 2018; Ring-Attention.
"""

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial results add up: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weight(part: Tensor, total: Tensor) -> Tensor:
    """e^(part - total), and 0 where the part is empty (there total may be -inf too): (b, h, n) -> (n, b, h, 1)."""
    return torch.where(part == -torch.inf, 0.0, (part - total).exp()).permute(2, 0, 1).unsqueeze(-1)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block into the running pair, in place.

    Args:
        out: (n, b, h, d) running output, fp32 or fp64.
        lse: (b, h, n) running log-sum-exp; -inf where nothing came yet.
        block_out: (n, b, h, d) output of the block, any float dtype.
        block_lse: (b, h, n) its log-sum-exp.
    """
    total = torch.logaddexp(lse, block_lse)
    out.mul_(_weight(lse, total)).addcmul_(block_out.to(out.dtype), _weight(block_lse, total))
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
