"""The reference kernel: plain maths in fp32 or fp64, for every band, softcap and device.

The oracle, and the last resort.

    S = scale q k^T, softcapped;  lse = log sum e^S;  P = e^(S - lse);  out = P v
    dS = P (dout v^T - rowsum(dout out)), through the softcap;  dq = scale dS k;  dk = scale dS^T q;  dv = P^T dout

Queries are taken a few rows at a time, so memory stays bounded however long the block is. Half-precision
inputs are computed in fp32 and stay fp32, for the merge.

Trade-off: several times slower than a flash kernel, and exact in fp64.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from seqmesh.engine.kernels import Problem
from seqmesh.engine.merge import accumulator_dtype
from seqmesh.masks import Band

SCORES_PER_STEP = 1 << 22
"""Logits held at a time, at most (or one row's)."""


class Reference:
    """Dense attention, a few query rows at a time. Supports fp64, fp32, bf16 and fp16 on every device."""

    name = "reference"

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot compute a problem, or None."""
        if problem.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"dtype {problem.dtype} is not a float64, float32, bfloat16 or float16"
        return None

    def tiles(self, block: Band) -> Sequence[Band]:
        """Every band is native."""
        return (block,)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """See Kernel.forward."""
        dtype = accumulator_dtype(q.dtype)
        out, lse = torch.empty_like(q, dtype=dtype), q.new_empty(q.shape[:3], dtype=dtype)
        with torch.autocast(q.device.type, enabled=False):
            heads_of_kv, k, v = k.shape[1], k.to(dtype), v.to(dtype)
            for start, stop in _steps(q, k):
                logits, _ = _logits(
                    _group(q[:, :, start:stop].to(dtype), heads_of_kv), k, band, start, scale, softcap
                )
                step_lse = logits.logsumexp(-1)
                weights = _softmax(logits, step_lse)
                out[:, :, start:stop] = torch.einsum("bgrqk,bgkd->bgrqd", weights, v).flatten(1, 2)
                lse[:, :, start:stop] = step_lse.flatten(1, 2)
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        band: Band,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel.backward."""
        dtype = accumulator_dtype(q.dtype)
        with torch.autocast(q.device.type, enabled=False):
            g, k, v = k.shape[1], k.to(dtype), v.to(dtype)
            dq, dk, dv = torch.empty_like(q, dtype=dtype), torch.zeros_like(k), torch.zeros_like(v)
            for start, stop in _steps(q, k):
                rows = slice(start, stop)
                step_q, step_grad = (
                    _group(q[:, :, rows].to(dtype), g),
                    _group(grad_out[:, :, rows].to(dtype), g),
                )
                logits, slope = _logits(step_q, k, band, start, scale, softcap)
                weights = _softmax(logits, _group(lse[:, :, rows], g))
                delta = (step_grad * _group(out[:, :, rows].to(dtype), g)).sum(-1, keepdim=True)
                grad_logits = (
                    weights * (torch.einsum("bgrqd,bgkd->bgrqk", step_grad, v) - delta) * slope * scale
                )
                dq[:, :, rows] = torch.einsum("bgrqk,bgkd->bgrqd", grad_logits, k).flatten(1, 2)
                dk += torch.einsum("bgrqk,bgrqd->bgkd", grad_logits, step_q)
                dv += torch.einsum("bgrqk,bgrqd->bgkd", weights, step_grad)
        return dq, dk, dv


def _steps(q: Tensor, k: Tensor) -> Iterator[tuple[int, int]]:
    b, h, n, _ = q.shape
    rows = max(1, SCORES_PER_STEP // max(1, b * h * k.shape[2]))
    for start in range(0, n, rows):
        yield start, min(n, start + rows)


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """(b, h, n, ...) -> (b, g, h/g, n, ...)"""
    grouped: Tensor = x.unflatten(1, (kv_heads, -1))
    return grouped


def _logits(
    q: Tensor, k: Tensor, band: Band, start: int, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | float]:
    """Masked logits (b, g, r, q, k) of query rows from `start`, and the slope of the softcap at each."""
    logits, slope = torch.einsum("bgrqd,bgkd->bgrqk", q, k) * scale, 1.0
    if softcap is not None:
        bent = (logits / softcap).tanh()
        logits, slope = bent * softcap, 1 - bent.square()  # type: ignore[assignment]
    allowed = _allowed(band, start, q.shape[3], k.shape[2], q.device)
    return (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)), slope


def _allowed(band: Band, start: int, rows: int, keys: int, device: torch.device) -> Tensor | None:
    """(rows, keys) bool of the band's pairs, for its query rows from `start`; None if all are allowed."""
    if band.lo is None and band.hi is None:
        return None
    i = torch.arange(band.q_start + start, band.q_start + start + rows, device=device)[:, None]
    difference = i - torch.arange(band.k_start, band.k_start + keys, device=device)
    allowed = torch.ones_like(difference, dtype=torch.bool)
    if band.lo is not None:
        allowed &= difference >= band.lo
    if band.hi is not None:
        allowed &= difference <= band.hi
    return allowed


def _softmax(logits: Tensor, lse: Tensor) -> Tensor:
    """e^(logits - lse), and 0 in a row without keys (lse = -inf)."""
    return (logits - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)).exp()
