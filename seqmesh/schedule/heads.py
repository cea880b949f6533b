"""Which heads each ulysses rank computes: any number of query heads, any number of K/V heads, in one pass or
in chunks.

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

MOST_HEAD_CHUNKS = 4
"""Default limit of head chunks on a ring alone: enough for its buffers to stay below 3x the local K + V
forward, 6x backward.
"""
MOST_HEAD_CHUNKS_EXCHANGED = 8
"""The same where heads are exchanged: what is kept for the backward takes 2x, so the rest must be smaller."""
CHUNK_ELEMENTS = 1 << 17
"""By default a chunk holds at least this many elements of K per rank: below, latency costs more than memory
is worth.
"""


class HeadGroup(NamedTuple):
    """Local query heads [q_start, q_stop) that share local K/V heads [kv_start, kv_stop), each serving
    equally many.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int


@dataclass(frozen=True, kw_only=True)
class HeadShare:
    """The global heads that one ulysses rank computes, as half-open ranges, and how its queries map to its
    K/V heads.
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
    if q_start == q_stop:
        return HeadShare(
            q_start=q_start, q_stop=q_stop, kv_start=q_start // per_kv, kv_stop=q_start // per_kv, groups=()
        )
    kv_start, kv_stop = q_start // per_kv, (q_stop - 1) // per_kv + 1
    groups: list[HeadGroup] = []
    for kv in range(kv_start, kv_stop):
        first, last = max(q_start, kv * per_kv) - q_start, min(q_stop, (kv + 1) * per_kv) - q_start
        previous = groups[-1] if groups else None
        if previous and (previous.q_stop - previous.q_start) == (last - first) * (
            previous.kv_stop - previous.kv_start
        ):
            groups[-1] = previous._replace(q_stop=last, kv_stop=kv + 1 - kv_start)
        else:
            groups.append(HeadGroup(first, last, kv - kv_start, kv + 1 - kv_start))
    return HeadShare(q_start=q_start, q_stop=q_stop, kv_start=kv_start, kv_stop=kv_stop, groups=tuple(groups))


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
            f"{heads} query heads with {kv_heads} K/V heads: each K/V head must serve equally many query heads; use a divisor of {heads}"
        )
    if ulysses > heads:
        raise ValueError(
            f"ulysses={ulysses} with {heads} query heads leaves {ulysses - heads} ranks without a head;"
            f" use ulysses <= {heads} and put the rest on ring"
        )
    if chunks < 1:
        raise ValueError(f"head_chunks={chunks}: use at least 1")
    per_kv = heads // kv_heads
    cut = split_evenly(heads, ulysses)
    whole = [_share(start, stop, per_kv) for start, stop in pairwise(cut)]
    chunks = min(chunks, max(share.kv for share in whole))
    return tuple(tuple(_part(share, chunk, chunks, per_kv) for share in whole) for chunk in range(chunks))


def _part(share: HeadShare, chunk: int, chunks: int, per_kv: int) -> HeadShare:
    """One of `chunks` parts of a share, cut between its K/V heads; it may be empty."""
    cut = split_evenly(share.kv, chunks)
    first, last = share.kv_start + cut[chunk], share.kv_start + cut[chunk + 1]
    q_start, q_stop = max(share.q_start, first * per_kv), min(share.q_stop, last * per_kv)
    return _share(
        min(q_start, share.q_stop),
        max(q_start, q_stop) if first < last else min(q_start, share.q_stop),
        per_kv,
    )


def default_chunks(ulysses: int, ring: int, k_len: int, elements_per_token: int) -> int:
    """Head chunks when the caller names none.

    From global sizes only: every rank must come to the same number.
    """
    most = MOST_HEAD_CHUNKS_EXCHANGED if ulysses > 1 else MOST_HEAD_CHUNKS
    return (
        1
        if ulysses * ring == 1
        else max(1, min(most, k_len * elements_per_token // (ulysses * ring) // CHUNK_ELEMENTS))
    )
