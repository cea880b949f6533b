"""Bytes that one rank sends in one call of attention, exactly.

What is executed, counted, priced and shown is computed here, once.

    forward    q, k, v to the heads' owners    K/V rows round the ring                      out home
    backward   dout to the heads' owners       K/V rows again, dK/dV rows straight home     dq, dk, dv home

The backward exchanges q, k and v no second time: what arrived is kept. So Ulysses moves 4 (1 + κ) e (U - 1) /
U bytes in both passes, e bytes of the local q, κ = g / h.
Source: USP (Fang & Zhao 2024), Table 2, whose count for Ulysses this is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from seqmesh.schedule.heads import HeadShare


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one rank sends to others in one call of `attention`, by what they are."""

    heads_forward: int
    """To the ulysses group: q, k, v out, then the output home."""
    heads_backward: int
    """To the ulysses group: the output's gradient out, then dq, dk, dv home."""
    rows_forward: int
    """To the ring group: K/V rows."""
    rows_backward: int
    """To the ring group: K/V rows again, and partial dK/dV rows."""

    @property
    def forward_bytes(self) -> int:
        """Everything sent in the forward."""
        return self.heads_forward + self.rows_forward

    @property
    def backward_bytes(self) -> int:
        """Everything sent in the backward."""
        return self.heads_backward + self.rows_backward


def attention_traffic(
    *,
    rows_sent: int,
    rows_received: int,
    rows: Sequence[int],
    kv_rows: Sequence[int],
    shares: Sequence[HeadShare],
    ulysses_rank: int,
    row_head_bytes: int,
    value_row_head_bytes: int | None = None,
) -> Traffic:
    """What one rank sends.

    Args:
        rows_sent: K/V rows that its ring rank sends in a forward, all stages (RingSchedule has it).
        rows_received: K/V rows that its ring rank receives in a forward.
        rows: query tokens of every ulysses rank of this ring rank.
        kv_rows: key tokens of every ulysses rank of this ring rank; `rows` itself in self-attention.
        shares: heads of every ulysses rank.
        ulysses_rank: which of them is meant.
        row_head_bytes: bytes of one row of one head: batch x head dim x bytes of an element.
        value_row_head_bytes: the same of values and outputs, if their head dim is another.
    """
    heads = heads_traffic(rows=rows, kv_rows=kv_rows, shares=shares, ulysses_rank=ulysses_rank)
    ring = rows_traffic(rows_sent=rows_sent, rows_received=rows_received, kv_heads=shares[ulysses_rank].kv)
    of_keys = row_head_bytes
    of_values = row_head_bytes if value_row_head_bytes is None else value_row_head_bytes
    return Traffic(
        heads_forward=heads.forward.bytes(of_keys, of_values),
        heads_backward=heads.backward.bytes(of_keys, of_values),
        rows_forward=ring.forward.bytes(of_keys, of_values),
        rows_backward=ring.backward.bytes(of_keys, of_values),
    )


class RowHeads(NamedTuple):
    """Rows x heads: of q, k and their gradients; and of v, the output and their gradients."""

    keys: int
    values: int

    @property
    def total(self) -> int:
        """Both, where they have one head dim."""
        return self.keys + self.values

    def bytes(self, of_keys: int, of_values: int) -> int:
        """Bytes, given those of one row of one head."""
        return self.keys * of_keys + self.values * of_values


class Sent(NamedTuple):
    """What one rank sends."""

    forward: RowHeads
    backward: RowHeads


def heads_traffic(
    *, rows: Sequence[int], kv_rows: Sequence[int], shares: Sequence[HeadShare], ulysses_rank: int
) -> Sent:
    """What one rank sends to its ulysses group; arguments as of `attention_traffic`."""
    me = ulysses_rank
    mine = shares[me]
    others = [u for u in range(len(shares)) if u != me]
    # Rows of mine for the heads of others ...
    q = sum(rows[me] * shares[u].q for u in others)
    kv = sum(kv_rows[me] * shares[u].kv for u in others)
    # ... and heads of mine for the rows of others, on the way back.
    out = sum(rows[u] * mine.q for u in others)
    kv_back = sum(kv_rows[u] * mine.kv for u in others)
    # Forward: q, k, v to their heads, out home. Backward: dout to its heads, dq, dk, dv home.
    return Sent(forward=RowHeads(q + kv, kv + out), backward=RowHeads(out + kv_back, q + kv_back))


def rows_traffic(*, rows_sent: int, rows_received: int, kv_heads: int) -> Sent:
    """What one rank of so many K/V heads sends to its ring group."""
    fetch = rows_sent * kv_heads
    bring_home = rows_received * kv_heads
    return Sent(forward=RowHeads(fetch, fetch), backward=RowHeads(fetch + bring_home, fetch + bring_home))
