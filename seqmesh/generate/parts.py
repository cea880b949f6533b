"""Attention of queries that every rank has to the keys that each rank holds: parts, one exchange, a merge.

    q (b, n, h, d)  -- own K/V rows -->  part (out, lse)  -- exchange -->  P parts  -- merge -->  (b, n, h, e)

A rank that holds no key has a part too: 0, and a log-sum-exp of -inf. Parts are merged in the order of ranks,
so the result has the same bits wherever it is merged.

Legend: b batch, n queries, h query heads, e head dim of values, P ranks.
Source: flash-decoding's merge; Helix (2025) for the exchange.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from seqmesh.engine.attention import attention, autocasted
from seqmesh.engine.exchange import all_gather, start_exchange
from seqmesh.engine.merge import accumulator_dtype, merge_, sink_weights
from seqmesh.engine.sharding import Schedule


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionPart:
    """One rank's part of attention's result."""

    out: Tensor
    """(n, b, h, e) in q's dtype."""
    lse: Tensor
    """(b, h, n) natural log, fp32 (fp64 for fp64); -inf where it holds nothing that a query may see."""

    def packed(self) -> Tensor:
        """Outputs and log-sum-exps side by side, bit by bit: (n, b, h, e + numbers of a log-sum-exp)."""
        lse = self.lse.permute(2, 0, 1).unsqueeze(-1).contiguous()
        return torch.cat([self.out, lse.view(self.out.dtype)], -1)

    @staticmethod
    def unpacked(packed: Tensor, value_dim: int) -> "AttentionPart":
        """The way back."""
        lse = packed[..., value_dim:].contiguous().view(accumulator_dtype(packed.dtype))
        return AttentionPart(out=packed[..., :value_dim], lse=lse[..., 0].permute(1, 2, 0))


def own_part(
    q: Tensor, k: Tensor, v: Tensor, schedule: Schedule | None, scale: float | None, softcap: float | None
) -> AttentionPart:
    """The part of the keys that this rank holds.

    Args:
        q: (b, n, h, d).
        k: (b, m, g, d) this rank's rows.
        v: (b, m, g, e).
        schedule: of one rank, by the mask as the rows lie; None if there are no pairs.
        scale: of `attention`.
        softcap: of `attention`.
    """
    q, k, v = autocasted(q, k, v)  # also where there are no pairs: parts of all ranks have one dtype
    b, n, h, _ = q.shape
    if schedule is None:
        lse = q.new_full((b, h, n), -torch.inf, dtype=accumulator_dtype(q.dtype))
        return AttentionPart(out=q.new_zeros((n, b, h, v.shape[-1])), lse=lse)
    out, lse = attention(q, k, v, schedule, scale, softcap, return_lse=True)
    return AttentionPart(out=out.transpose(0, 1), lse=lse)


def from_everyone(part: AttentionPart, ranks: int, group: str | None) -> list[AttentionPart]:
    """Every rank's part of all queries: each rank gets all of them."""
    if group is None:
        return [part]
    packed = part.packed()
    received = all_gather(packed.view(-1), [packed.numel()] * ranks, group)
    return [AttentionPart.unpacked(one, part.out.shape[-1]) for one in received.view(ranks, *packed.shape)]


def to_owners(part: AttentionPart, counts: Sequence[int], rank: int, group: str) -> list[AttentionPart]:
    """Every rank's part of this rank's queries. Rank p owns `counts[p]` queries, one rank after the other."""
    packed = part.packed()
    row = prod(packed.shape[1:])
    own = counts[rank]
    received = start_exchange(
        packed.view(-1), [count * row for count in counts], [own * row] * len(counts), group, is_ours=True
    ).wait()
    shape = (len(counts), own, *packed.shape[1:])
    return [AttentionPart.unpacked(one, part.out.shape[-1]) for one in received.view(shape)]


def rows_of_all(x: Tensor, counts: Sequence[int], group: str) -> Tensor:
    """(b, n, ...) of every rank, one after the other along dim 1; rank p has `counts[p]` rows."""
    rows = x.transpose(0, 1).contiguous()
    row = prod(rows.shape[1:])
    received = all_gather(rows.view(-1), [count * row for count in counts], group)
    return received.view(-1, *rows.shape[1:]).transpose(0, 1)


def merged(parts: Sequence[AttentionPart], sinks: Tensor | None) -> Tensor:
    """(b, n, h, e) in the parts' dtype: 0 for a query that may see nothing."""
    first = parts[0]
    out = torch.zeros_like(first.out, dtype=first.lse.dtype, memory_format=torch.contiguous_format)
    lse = torch.full_like(first.lse, -torch.inf, memory_format=torch.contiguous_format)
    for part in parts:
        merge_(out, lse, part.out, part.lse)
    if sinks is not None:
        out *= sink_weights(lse, sinks)[0]
    return out.to(first.out.dtype).transpose(0, 1)
