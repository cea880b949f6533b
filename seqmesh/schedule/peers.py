"""What one rank exchanges with every other and computes for it: found by search, or in stripes by arithmetic.

own()               blocks of the rank's own rows
received(peer)      rows of the peer that some query here needs, and the blocks on them
sent(peer)          rows of this rank that some query there needs
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Protocol

from seqmesh.layouts import Layout
from seqmesh.masks import Band, Mask
from seqmesh.schedule import stripes
from seqmesh.schedule.pieces import Blocks, Runs, by_rank, keys_of, pieces_of_keys, pieces_of_queries


class Peers(Protocol):
    """One rank's view of all ranks."""

    @property
    def apart(self) -> bool:
        """Whether it is known that no two blocks of one peer can be coalesced."""

    def own(self) -> Blocks:
        """The blocks of this rank's own rows."""

    def received(self, peer: int, row: int) -> tuple[Runs, Blocks]:
        """Rows of a peer's storage that are needed here, and the blocks on them.

        In the receive buffer the rows lie one after the other from `row` on.
        """

    def sent(self, peer: int) -> Runs:
        """Rows of this rank's storage that a peer needs."""


def peers_of(mask: Mask, q_layout: Layout, kv_layout: Layout, ring_rank: int) -> Peers:
    """The peers of a ring rank."""
    if stripes.applies(mask, q_layout, kv_layout):
        return stripes.StripedPeers(mask, q_layout.ring, ring_rank)
    return SearchedPeers(mask, q_layout, kv_layout, ring_rank)


class SearchedPeers:
    """Any mask and layouts: bands and spans that meet this rank's are searched for."""

    apart = False

    def __init__(self, mask: Mask, q_layout: Layout, kv_layout: Layout, ring_rank: int) -> None:
        self._me = ring_rank
        self._wanted = by_rank(pieces_of_queries(mask, q_layout, kv_layout, ring_rank))
        self._asked = by_rank(pieces_of_keys(mask, q_layout, kv_layout, ring_rank))

    def own(self) -> Blocks:
        """The blocks of this rank's own rows."""
        return self._wanted.get(self._me, [])

    def received(self, peer: int, row: int) -> tuple[Runs, Blocks]:
        """Rows of a peer's storage that are needed here, and the blocks on them."""
        pieces = self._wanted.get(peer, [])
        runs = keys_of(pieces)
        return runs, list(_into_buffer(pieces, runs, row))

    def sent(self, peer: int) -> Runs:
        """Rows of this rank's storage that a peer needs."""
        return keys_of(self._asked.get(peer, []))


def _into_buffer(pieces: Iterable[Band], runs: Runs, base: int) -> Iterator[Band]:
    """Move the keys of bands from the sender's storage to its place in the receive buffer, from `base` on."""
    starts = [start for start, _ in runs]
    places = list(accumulate((stop - start for start, stop in runs), initial=base))
    for piece in pieces:
        run = bisect_right(starts, piece.k_start) - 1
        yield piece.shift(0, places[run] - starts[run])
