"""Head shares: exhaustively, every query head once, with exactly the K/V heads it uses, in every chunking."""

import pytest

from seqmesh.schedule.heads import (
    CHUNK_ELEMENTS,
    HeadGroup,
    HeadShare,
    default_chunks,
    overlaps_exchange,
    split_heads,
)

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("ulysses", range(1, 9))
@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
def test_every_query_head_meets_its_kv_head_exactly_once(ulysses: int, chunks: int) -> None:
    for heads in range(ulysses, 17):
        for kv_heads in range(1, heads + 1):
            if heads % kv_heads == 0:
                check_heads(heads, kv_heads, ulysses, chunks)


def check_heads(heads: int, kv_heads: int, ulysses: int, chunks: int) -> None:
    met: list[tuple[int, int]] = []
    received: dict[int, list[int]] = {rank: [] for rank in range(ulysses)}
    for shares in split_heads(heads, kv_heads, ulysses, chunks):
        assert len(shares) == ulysses
        for rank, share in enumerate(shares):
            met += pairs_of(share)
            received[rank] += range(share.kv_start, share.kv_stop)
    assert sorted(met) == [(q, q // (heads // kv_heads)) for q in range(heads)]
    for kv in received.values():
        assert len(kv) == len(set(kv)), "a K/V head must not travel twice to the same rank"


def pairs_of(share: HeadShare) -> list[tuple[int, int]]:
    """(query head, K/V head) in global numbers, as the groups of a share let them meet."""
    pairs = []
    for group in share.groups:
        ratio, rest = divmod(group.q_stop - group.q_start, group.kv_stop - group.kv_start)
        assert not rest
        for q in range(group.q_start, group.q_stop):
            kv = group.kv_start + (q - group.q_start) // ratio
            pairs.append((share.q_start + q, share.kv_start + kv))
    return pairs


def test_shares_are_near_equal() -> None:
    sizes = [share.q for share in split_heads(13, 13, 4)[0]]
    assert sizes == [4, 3, 3, 3]


def test_kv_heads_that_serve_equally_many_queries_are_one_group() -> None:
    """A group is a kernel call: one where heads divide evenly, two where a rank begins inside a K/V head."""
    for share in split_heads(12, 6, 3)[0]:
        assert share.groups == (HeadGroup(0, 4, 0, 2),)
    # Query heads 6 to 11, of which 6 and 7 use a K/V head that the first rank uses too.
    _, second = split_heads(12, 3, 2)[0]
    assert second.groups == (HeadGroup(0, 2, 0, 1), HeadGroup(2, 6, 1, 2))


@pytest.mark.parametrize(
    ("ulysses", "ring", "chunks_worth", "element_bytes", "expected"),
    [
        (1, 1, 9, 4, 1),
        (1, 2, 1.5, 4, 1),
        (1, 2, 9, 4, 2),
        (1, 2, 9, 8, 2),
        (1, 2, 3, 2, 3),
        (1, 2, 9, 2, 4),
        (2, 1, 9, 4, 8),
        (2, 2, 5, 2, 5),
        (2, 2, 0.99, 4, 1),
    ],
)
def test_heads_are_cut_in_as_many_chunks_as_are_worth_it(
    ulysses: int, ring: int, chunks_worth: float, element_bytes: int, expected: int
) -> None:
    """A rank's q, k, v and out in units of the smallest chunk.

    Up to 2 on a ring alone, 4 in half precision, and 8 where heads are exchanged.
    """
    elements = int(chunks_worth * CHUNK_ELEMENTS * ulysses * ring)
    assert default_chunks(ulysses, ring, elements, element_bytes) == expected


def test_the_exchange_overlaps_where_chunks_are_many_and_heads_are_exchanged() -> None:
    overlapped = {(u, c) for u in (1, 2, 8) for c in range(1, 9) if overlaps_exchange(u, c)}
    assert overlapped == {(u, c) for u in (2, 8) for c in (6, 7, 8)}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (6, 6, 8),
            "ulysses=8 with 6 query heads leaves 2 ranks without a head;"
            " use ulysses <= 6 and put the rest on ring",
        ),
        ((6, 4, 2), "6 query heads with 4 K/V heads"),
        ((4, 8, 1), "4 query heads with 8 K/V heads"),
        ((4, 4, 2, 0), "head_chunks=0"),
    ],
)
def test_heads_that_cannot_be_shared_are_refused(args: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_heads(*args)
