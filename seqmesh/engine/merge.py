"""Online softmax: merge the attention of one more block into what came before.

    lse = log(e^lse_a + e^lse_b)        w = e^(lse_b - lse) = sigmoid(lse_b - lse_a)
    out = out_a + w (out_b - out_a)

The two weights add up to 1, so one interpolation merges: a single pass over the outputs. An empty row is (0,
-inf) and stays so: no NaN from inf - inf. The running pair is fp32 (fp64 for fp64 inputs).

Legend: b batch, h heads, n rows, e head dim of values. out (n, b, h, e), lse (b, h, n) natural log.
Source: Milakov & Gimelshein 2018; Ring-Attention.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

PIECE_ELEMENTS = 1 << 18
"""Half-precision outputs are widened so many elements at a time: the copy stays small."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial results add up: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


Merge = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""The arguments of `merge_`."""


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block into the running pair, in place. One launch on CUDA, where Triton is there.

    Args:
        out: (n, b, h, e) running output, fp32 or fp64.
        lse: (b, h, n) running log-sum-exp; -inf where nothing came yet.
        block_out: (n, b, h, e) output of the block, any float dtype.
        block_lse: (b, h, n) its log-sum-exp.
    """
    # Fake tensors, which have no memory, are of another type.
    if out.is_cuda and type(out) is Tensor:
        with torch.cuda.device(out.device):
            _merge_of(out.device)(out, lse, block_out, block_lse)
    else:
        merge_plain_(out, lse, block_out, block_lse)


def merges_in_one_launch(device: torch.device) -> bool:
    """Whether `merge_` is one launch on a device, and not plain operations."""
    return device.type == "cuda" and _merge_of(device) is not merge_plain_


@lru_cache
def _merge_of(device: torch.device) -> Merge:
    """The fused merge, if Triton is there and it does on this device what the plain one does."""
    try:
        from seqmesh.engine.fused_merge import fused_merge_
    except ImportError:
        return merge_plain_
    return proven(fused_merge_, device)


def proven(merge: Merge, device: torch.device) -> Merge:
    """`merge` if it does what `merge_plain_` does to some rows of every dtype; else that, with a warning."""
    for dtype in (torch.float32, torch.float64):
        for block_dtype in (torch.float16, torch.bfloat16, dtype):
            found, expected = (_sample(dtype, block_dtype, device) for _ in range(2))
            merge(*found)
            merge_plain_(*expected)
            tolerance = 64 * torch.finfo(dtype).eps
            if not all(
                torch.allclose(x, y, rtol=tolerance, atol=tolerance)
                for x, y in zip(found, expected, strict=True)
            ):
                warnings.warn(
                    f"the fused merge is wrong on {device} for {block_dtype} blocks: merging in plain"
                    " operations, which is slower; please report it with the versions of torch and triton",
                    stacklevel=2,
                )
                return merge_plain_
    return merge


def _sample(
    dtype: torch.dtype, block_dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of a merge, the same at every call: rows seen by both sides, by either, by none."""
    # On a GPU so many that its programs crowd each other out: one that races is right while they are few.
    n, b, h, e = 40 if device.type == "cpu" else 8192, 2, 3, 24
    numbers = torch.arange(2 * n * b * h * e, dtype=dtype, device=device).mul_(1.7).sin_()
    out, block_out = (x.view(n, b, h, e).clone() for x in numbers.chunk(2))
    lse, block_lse = (6 * x[..., 0].permute(1, 2, 0) for x in (out, block_out))
    for x, x_lse, period in ((out, lse, 3), (block_out, block_lse, 5)):
        x[::period] = 0.0
        x_lse[:, :, ::period] = -torch.inf
    return out, lse, block_out.to(block_dtype), block_lse


def merge_plain_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """`merge_` in plain operations, on any device: the oracle of the fused one."""
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
