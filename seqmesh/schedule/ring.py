"""The ring schedule of one rank: which K/V rows travel when, and which blocks they allow. Data, not code.

From a mask and two layouts (of queries and of keys) every rank derives its own list of *stages*. Stage 0
computes what needs only local rows. Each later stage receives exactly the K/V rows that some block needs from
a group of peers, and computes those blocks. Sender and receiver apply the same function to the same inputs,
so nothing is negotiated (docs/schedules.md).

Causal, zigzag, R = 2, 4 chunks A B C D: rank 0 stores A D, rank 1 stores B C. `\\` is a causal block, `#` a
full one:

             stage 0 (own rows)      stage 1 (received rows)
                A D                     B C
    rank 0   A  \\ .                  A  . .      rank 1 sends B C: two chunks, ONE full block for D
             D  # \\                  D  # #
                B C                     A
    rank 1   B  \\ .                  B  #        rank 0 sends A only: nobody here needs D,
             C  # \\                  C  #        so 3/4 of what a rotating ring moves

Stage 0 of each is ONE causal block over both chunks: blocks are coalesced whenever their union is a band.

Source: Ring-Attention (Liu et al. 2023), zigzag as in the USP paper; exactly-needed rows are ours.
"""

from dataclasses import dataclass
from typing import NamedTuple

from seqmesh.layouts import Layout
from seqmesh.masks import Band, Mask
from seqmesh.schedule.coalesce import coalesce
from seqmesh.schedule.hops import LATENCY_ROWS, Stages, exchanges
from seqmesh.schedule.peers import Peers, peers_of
from seqmesh.schedule.pieces import Runs


class Transfer(NamedTuple):
    """Rows that travel between this rank and `peer`: `runs` index the storage of the rank that sends them."""

    peer: int
    runs: Runs

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self.runs)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One exchange and the blocks that it allows.

    The receive buffer holds the received runs one after the other, peers in ascending order. In `blocks`,
    queries index this rank's storage and keys index that buffer (stage 0: this rank's own K/V storage).
    """

    hops: tuple[int, ...] = ()
    """Distances in ring ranks that rows travel, the same on every rank; none at stage 0."""
    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()
    blocks: tuple[Band, ...] = ()

    @property
    def rows_sent(self) -> int:
        """K/V rows this rank sends at this stage."""
        return sum(transfer.rows for transfer in self.sends)

    @property
    def rows_received(self) -> int:
        """K/V rows this rank receives at this stage."""
        return sum(transfer.rows for transfer in self.receives)


@dataclass(frozen=True, kw_only=True)
class RingSchedule:
    """Everything one ring rank sends, receives and computes, in order."""

    ring_rank: int
    ring: int
    q_rows: int
    kv_rows: int
    stages: tuple[Stage, ...]

    @property
    def rows_sent(self) -> int:
        """K/V rows this rank sends in one forward pass."""
        return sum(stage.rows_sent for stage in self.stages)

    @property
    def rows_received(self) -> int:
        """K/V rows this rank receives in one forward pass."""
        return sum(stage.rows_received for stage in self.stages)

    @property
    def area(self) -> int:
        """(query, key) pairs this rank computes."""
        return sum(block.area for stage in self.stages for block in stage.blocks)


def ring_schedule(
    mask: Mask,
    q_layout: Layout,
    kv_layout: Layout,
    ring_rank: int,
    stages: Stages = None,
    *,
    latency_rows: int = LATENCY_ROWS,
) -> RingSchedule:
    """What one ring rank sends, receives and computes for a mask.

    Args:
        mask: q_len queries x k_len keys.
        q_layout: layout of the q_len queries.
        kv_layout: layout of the k_len keys, for the same ring degree; the query layout itself in
            self-attention.
        ring_rank: whose schedule.
        stages: exchanges after stage 0. By default one for each of the R - 1 hops that any rank uses: a ring.
            A number n spreads these hops over at most n: 1 is an all-gather. More stages hide more traffic
            behind compute and hold fewer received rows; fewer save latency. "auto" merges what is small.
        latency_rows: rows of the largest transfer up to which "auto" merges exchanges.

    Raises:
        ValueError: a layout of another length or ring degree, a rank outside the ring, more stages than hops,
            or latency_rows < 0.
    """
    _check(mask, q_layout, kv_layout, ring_rank)
    hops_of_stages = exchanges(mask, q_layout, kv_layout, stages, latency_rows)
    peers = peers_of(mask, q_layout, kv_layout, ring_rank)
    own = Stage(blocks=tuple(peers.own()) if peers.apart else coalesce(peers.own()))
    later = (_stage(ring_rank, q_layout.ring, hops, peers) for hops in hops_of_stages)
    return RingSchedule(
        ring_rank=ring_rank,
        ring=q_layout.ring,
        q_rows=q_layout.counts[ring_rank],
        kv_rows=kv_layout.counts[ring_rank],
        stages=(own, *later),
    )


def _check(mask: Mask, q_layout: Layout, kv_layout: Layout, ring_rank: int) -> None:
    for what, layout, length in (("query", q_layout, mask.q_len), ("key", kv_layout, mask.k_len)):
        if layout.s != length:
            raise ValueError(
                f"the {what} layout holds {layout.s} tokens but the mask has {length};"
                f" build the layout for {length} tokens"
            )
    if q_layout.ring != kv_layout.ring:
        raise ValueError(
            f"a query layout for ring={q_layout.ring} with a key layout for ring={kv_layout.ring};"
            " use one ring degree"
        )
    if not 0 <= ring_rank < q_layout.ring:
        raise ValueError(
            f"ring_rank={ring_rank} of a layout for ring={q_layout.ring}; use 0 <= ring_rank < ring"
        )


def _stage(ring_rank: int, ring: int, hops: tuple[int, ...], peers: Peers) -> Stage:
    """One exchange: rows come from so many ranks before, which allow some blocks, and go as far behind."""
    receives: list[Transfer] = []
    blocks: list[Band] = []
    row = 0  # of the receive buffer
    for source in sorted((ring_rank - hop) % ring for hop in hops):
        runs, allowed = peers.received(source, row)
        if runs:
            receives.append(Transfer(source, runs))
            blocks += allowed
            row += receives[-1].rows
    targets = sorted((ring_rank + hop) % ring for hop in hops)
    sends = (Transfer(target, peers.sent(target)) for target in targets)
    return Stage(
        hops=hops,
        sends=tuple(transfer for transfer in sends if transfer.runs),
        receives=tuple(receives),
        blocks=tuple(blocks) if peers.apart and len(receives) == 1 else coalesce(blocks),
    )
