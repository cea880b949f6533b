"""Which heads each ulysses rank computes: any number of query heads, any number of K/V heads.

In one pass, or in chunks.

Query heads are cut in U near-equal consecutive shares. A rank receives exactly the K/V heads that its query
heads use, so a K/V head that several ranks need is routed to each of them, and its gradients are summed where
it came from. Nothing is repeated globally and nothing is padded.

    6 query heads, 2 K/V heads, U = 4        rank 0     rank 1     rank 2   rank 3
                        query heads          0 1        2 3        4        5
                        K/V heads            a          a b        b        b

Source: DeepSpeed-Ulysses (Jacobs et al. 2023); the uneven and grouped-query cases are ours.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from seqmesh.layouts import split_evenly

MOST_HEAD_CHUNKS = 2
"""Default limit of head chunks on a ring alone: enough to keep its buffers small (docs/architecture.md)."""
MOST_HEAD_CHUNKS_HALF = 4
"""The same in half precision, whose sums take twice the bytes of what is summed."""
MOST_HEAD_CHUNKS_EXCHANGED = 8
"""The same where heads are exchanged: what is kept for the backward takes as much as q, k, v and the output,
so the rest must be smaller."""
CHUNK_ELEMENTS = 1 << 19
"""By default a chunk holds at least this many elements of q, k, v and the output per rank.

Below, latency costs more than memory is worth.
"""
OVERLAPPED_CHUNKS = 6
"""With fewer chunks than this, what is in flight beside the chunk that is computed takes too much memory."""


class HeadGroup(NamedTuple):
    """Local query heads [q_start, q_stop), and the local K/V heads that serve equally many of them each."""

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int


@dataclass(frozen=True, kw_only=True)
class HeadShare:
    """The global heads that one ulysses rank computes, and how its queries map to its K/V heads.

    Ranges are half open.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    groups: tuple[HeadGroup, ...]

    @property
    def q(self) -> int:
        """Number of query heads."""
        return self.q_stop - self.q_start

    @property
    def kv(self) -> int:
        """Number of K/V heads."""
        return self.kv_stop - self.kv_start


def _share(q_start: int, q_stop: int, per_kv: int) -> HeadShare:
    """The share of query heads [q_start, q_stop), where `per_kv` consecutive query heads use one K/V head."""
    kv_start = q_start // per_kv
    kv_stop = kv_start if q_start == q_stop else (q_stop - 1) // per_kv + 1
    groups: list[HeadGroup] = []
    for kv in range(kv_start, kv_stop):
        first = max(q_start, kv * per_kv) - q_start
        last = min(q_stop, (kv + 1) * per_kv) - q_start
        if groups and _serves_equally_many(groups[-1], last - first):
            groups[-1] = groups[-1]._replace(q_stop=last, kv_stop=kv + 1 - kv_start)
        else:
            groups.append(HeadGroup(first, last, kv - kv_start, kv + 1 - kv_start))
    return HeadShare(q_start=q_start, q_stop=q_stop, kv_start=kv_start, kv_stop=kv_stop, groups=tuple(groups))


def _serves_equally_many(group: HeadGroup, queries: int) -> bool:
    """Whether each K/V head of a group serves so many query heads."""
    return group.q_stop - group.q_start == queries * (group.kv_stop - group.kv_start)


@lru_cache(maxsize=64)
def split_heads(
    heads: int, kv_heads: int, ulysses: int, chunks: int = 1
) -> tuple[tuple[HeadShare, ...], ...]:
    """The heads of every ulysses rank, per chunk: `result[chunk][ulysses_rank]`.

    Chunks are cut between K/V heads, never inside the queries of one, so chunking moves no K/V head twice.

    Args:
        heads: query heads h.
        kv_heads: K/V heads g, a divisor of h.
        ulysses: ulysses degree U.
        chunks: parts to compute one after the other; at most as many as the K/V heads of the rank with most
            are used.

    Raises:
        ValueError: g does not divide h; U > h (a rank would have no head); a number below 1.
    """
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{heads} query heads with {kv_heads} K/V heads:"
            f" each K/V head must serve equally many query heads; use a divisor of {heads}"
        )
    if ulysses > heads:
        raise ValueError(
            f"ulysses={ulysses} with {heads} query heads leaves {ulysses - heads} ranks without a head;"
            f" use ulysses <= {heads} and put the rest on ring"
        )
    if chunks < 1:
        raise ValueError(f"head_chunks={chunks}: use at least 1")
    per_kv = heads // kv_heads
    whole = [_share(start, stop, per_kv) for start, stop in pairwise(split_evenly(heads, ulysses))]
    chunks = min(chunks, max(share.kv for share in whole))
    return tuple(tuple(_part(share, chunk, chunks, per_kv) for share in whole) for chunk in range(chunks))


def _part(share: HeadShare, chunk: int, chunks: int, per_kv: int) -> HeadShare:
    """One of `chunks` parts of a share, cut between its K/V heads; it may be empty."""
    cut = split_evenly(share.kv, chunks)
    first_kv = share.kv_start + cut[chunk]
    last_kv = share.kv_start + cut[chunk + 1]
    # The outermost K/V heads may serve queries of a neighbouring rank as well: those are not of this share.
    q_start = min(max(share.q_start, first_kv * per_kv), share.q_stop)
    q_stop = min(share.q_stop, last_kv * per_kv)
    if first_kv == last_kv:
        return _share(q_start, q_start, per_kv)
    return _share(q_start, q_stop, per_kv)


def default_chunks(ulysses: int, ring: int, elements: int, element_bytes: int) -> int:
    """Head chunks when the caller names none.

    From global sizes only: every rank must come to the same number.

    Args:
        ulysses: ulysses degree.
        ring: ring degree.
        elements: of q, k, v and the output of the whole sequence together.
        element_bytes: of one of them.
    """
    if ulysses * ring == 1:
        return 1
    most = MOST_HEAD_CHUNKS if element_bytes >= 4 else MOST_HEAD_CHUNKS_HALF
    if ulysses > 1:
        most = MOST_HEAD_CHUNKS_EXCHANGED
    return max(1, min(most, elements // (ulysses * ring) // CHUNK_ELEMENTS))


def overlaps_exchange(ulysses: int, chunks: int) -> bool:
    """Whether the heads of the next chunk travel while one is computed, and those of the last one land late.

    It hides the exchange behind the attention, and holds the buffers of three chunks at a time in place of
    one's: it is done where chunks are many enough for that to be little.
    """
    return ulysses > 1 and chunks >= OVERLAPPED_CHUNKS
