"""The reference kernel: plain maths in fp32 or fp64, for every band, softcap and device.

The oracle, and the last resort.

    S = scale q k^T, softcapped;  lse = log sum e^S;  P = e^(S - lse);  out = P v
    dS = P (dout v^T - rowsum(dout out)), through the softcap
    dq = scale dS k;  dk = scale dS^T q;  dv = P^T dout

Queries are taken a few rows at a time, so memory stays bounded however long the block is. Half-precision
inputs are computed in fp32 and stay fp32, for the merge.

Legend: b batch, h query heads, g K/V heads, r query heads of a K/V head (h = g r), q and k rows of a step, d
head dim, e that of values.
Trade-off: several times slower than a flash kernel, and exact in fp64.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from seqmesh.engine.kernels.kernel import LogitRule, Problem
from seqmesh.engine.kernels.tiles import Tile, TileShape
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

    def tiles(self, block: Band) -> Sequence[Tile]:
        """Every band is native."""
        return (Tile(block, TileShape.BAND),)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, rule: LogitRule) -> tuple[Tensor, Tensor]:
        """See Kernel.forward."""
        dtype = accumulator_dtype(q.dtype)
        out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=dtype)
        lse = q.new_empty(q.shape[:3], dtype=dtype)
        with torch.autocast(q.device.type, enabled=False):
            kv_heads = k.shape[1]
            k = k.to(dtype)
            v = v.to(dtype)
            for rows in _steps(q, k):
                step_q = _group(q[:, :, rows].to(dtype), kv_heads)
                scores, _ = _scores(step_q, k, tile.band, rows.start, rule)
                step_lse = scores.logsumexp(-1)
                weights = _softmax(scores, step_lse)
                out[:, :, rows] = torch.einsum("bgrqk,bgke->bgrqe", weights, v).flatten(1, 2)
                lse[:, :, rows] = step_lse.flatten(1, 2)
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: Tile,
        rule: LogitRule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel.backward."""
        dtype = accumulator_dtype(q.dtype)
        with torch.autocast(q.device.type, enabled=False):
            kv_heads = k.shape[1]
            k = k.to(dtype)
            v = v.to(dtype)
            dq = torch.empty_like(q, dtype=dtype)
            dk = torch.zeros_like(k)
            dv = torch.zeros_like(v)
            for rows in _steps(q, k):
                step_q, step_grad, step_out = (
                    _group(x[:, :, rows].to(dtype), kv_heads) for x in (q, grad_out, out)
                )
                scores, slope = _scores(step_q, k, tile.band, rows.start, rule)
                weights = _softmax(scores, _group(lse[:, :, rows], kv_heads))
                delta = (step_grad * step_out).sum(-1, keepdim=True)
                grad_weights = torch.einsum("bgrqe,bgke->bgrqk", step_grad, v)
                grad_scores = weights * (grad_weights - delta) * slope * rule.scale
                dq[:, :, rows] = torch.einsum("bgrqk,bgkd->bgrqd", grad_scores, k).flatten(1, 2)
                dk += torch.einsum("bgrqk,bgrqd->bgkd", grad_scores, step_q)
                dv += torch.einsum("bgrqk,bgrqe->bgke", weights, step_grad)
        return dq, dk, dv


def _steps(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Ranges of query rows with SCORES_PER_STEP logits, or one row each."""
    b, h, n, _ = q.shape
    rows = max(1, SCORES_PER_STEP // max(1, b * h * k.shape[2]))
    for start in range(0, n, rows):
        yield slice(start, min(n, start + rows))


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """(b, h, n, ...) -> (b, g, r, n, ...)"""
    grouped: Tensor = x.unflatten(1, (kv_heads, -1))
    return grouped


def _scores(q: Tensor, k: Tensor, band: Band, start: int, rule: LogitRule) -> tuple[Tensor, Tensor | float]:
    """Masked logits (b, g, r, q, k) of query rows from `start`, and the slope of the softcap at each."""
    scores = torch.einsum("bgrqd,bgkd->bgrqk", q, k) * rule.scale
    slope: Tensor | float = 1.0
    if rule.softcap is not None:
        bent = (scores / rule.softcap).tanh()
        scores = bent * rule.softcap
        slope = 1 - bent.square()
    allowed = _allowed(band, start, q.shape[3], k.shape[2], q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores, slope


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


def _softmax(scores: Tensor, lse: Tensor) -> Tensor:
    """e^(scores - lse), and 0 in a row without keys, whose lse is -inf: there the scores are -inf too."""
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    return (scores - finite.unsqueeze(-1)).exp()
