"""Pieces of documents on ranks, the chains that they form, and halos: against a look at every token."""

import random
from itertools import pairwise

import pytest

from seqmesh import layouts, masks
from seqmesh.layouts import Layout, Span, split_evenly
from seqmesh.schedule.chains import Chains, DocumentPiece, Link, chains_of, documents_of

pytestmark = pytest.mark.fast


def tokens_of(layout: Layout, ulysses: int) -> list[list[int]]:
    """Every rank's positions, in storage order."""
    ranks = []
    for ring_rank in range(layout.ring):
        held = list(layout.positions(ring_rank))
        ranks += [held[start:stop] for start, stop in pairwise(split_evenly(len(held), ulysses))]
    return ranks


def shuffled(s: int, ring: int, rng: random.Random) -> Layout:
    """A layout of spans of random lengths, in a random order, on random ranks."""
    cuts = sorted({0, s, *(rng.randrange(s + 1) for _ in range(3 * ring))})
    spans = [Span(start, stop - start) for start, stop in pairwise(cuts)]
    rng.shuffle(spans)
    return Layout(s, tuple(tuple(spans[rank::ring]) for rank in range(ring)))


def random_cases() -> list[tuple[tuple[int, ...], Layout, int]]:
    cases = []
    for seed in range(40):
        rng = random.Random(seed)
        lengths = tuple(rng.choice([1, 1, 2, 5, 30, 70]) for _ in range(rng.randint(1, 9)))
        ring, ulysses = rng.choice([(1, 1), (1, 3), (2, 2), (4, 1), (5, 2), (3, 1)])
        s, mask = sum(lengths), masks.documents(lengths)
        made = [layouts.contiguous(s, ring), layouts.zigzag(s, ring), layouts.balanced(mask, ring)]
        cases.append((lengths, rng.choice([*made, shuffled(s, ring, rng)]), ulysses))
    return cases


CASES = random_cases()


@pytest.mark.parametrize(("lengths", "layout", "ulysses"), CASES)
def test_pieces_cover_the_rows_of_every_rank(lengths: tuple[int, ...], layout: Layout, ulysses: int) -> None:
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    chains = chains_of(masks.documents(lengths), layout, ulysses)
    held = tokens_of(layout, ulysses)
    assert chains.size == len(held)
    for rank, (own, tokens) in enumerate(zip(chains.pieces, held, strict=True)):
        assert [row for piece in own for row in range(piece.start, piece.stop)] == list(range(len(tokens)))
        for before, piece in zip((None, *own), own, strict=False):
            last = piece.position + piece.tokens
            assert piece.rank == rank
            assert tokens[piece.start : piece.stop] == list(range(piece.position, last))
            assert starts[piece.document] <= piece.position < last <= starts[piece.document + 1]
            assert piece.is_first == (piece.position == starts[piece.document])
            assert piece.is_last == (last == starts[piece.document + 1])
            # No piece goes on where the one before it ends: they would be one.
            assert before is None or piece.is_first or before.position + before.tokens != piece.position


@pytest.mark.parametrize(("lengths", "layout", "ulysses"), CASES)
def test_chains_follow_each_cut_document(lengths: tuple[int, ...], layout: Layout, ulysses: int) -> None:
    chains = chains_of(masks.documents(lengths), layout, ulysses)
    uncut = [piece for own in chains.pieces for piece in own if piece.is_first and piece.is_last]
    followed = [[chains.at(link) for link in chain] for chain in chains.chains]
    for pieces in followed:
        assert len(pieces) > 1
        assert pieces[0].is_first
        assert pieces[-1].is_last
        assert all(a.position + a.tokens == b.position for a, b in pairwise(pieces))
    documents = sorted(piece.document for piece in (*uncut, *(pieces[0] for pieces in followed)))
    assert documents == list(range(len(lengths)))
    for rank, own in enumerate(chains.pieces):
        assert chains.entering[rank] == tuple(i for i, piece in enumerate(own) if not piece.is_first)
        assert chains.leaving[rank] == tuple(i for i, piece in enumerate(own) if not piece.is_last)
        middle = [i for i, piece in enumerate(own) if not piece.is_first and not piece.is_last]
        assert chains.passing[rank] == tuple(middle)


@pytest.mark.parametrize("width", [0, 1, 3, 6])
@pytest.mark.parametrize(("lengths", "layout", "ulysses"), CASES)
def test_halos_are_the_tokens_before_a_piece_in_its_document(
    lengths: tuple[int, ...], layout: Layout, ulysses: int, width: int
) -> None:
    chains = chains_of(masks.documents(lengths), layout, ulysses)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    held = tokens_of(layout, ulysses)
    found: dict[tuple[int, int], set[int]] = {}
    for run in chains.halo(width):
        piece = chains.at(run.piece)
        tokens = held[run.owner][run.start : run.start + run.rows]
        last = piece.position - run.back
        assert tokens == list(range(last - run.rows, last))
        assert tokens, "an empty run"
        found.setdefault(run.piece, set()).update(tokens)
    for rank, own in enumerate(chains.pieces):
        for place, piece in enumerate(own):
            first = max(starts[piece.document], piece.position - width)
            assert found.get((rank, place), set()) == set(range(first, piece.position))


@pytest.mark.parametrize(("lengths", "layout", "ulysses"), CASES)
def test_traffic_counts_what_crosses_between_ranks(
    lengths: tuple[int, ...], layout: Layout, ulysses: int
) -> None:
    heads, state, transition, width = 5, 12, 9, 3
    chains = chains_of(masks.documents(lengths), layout, ulysses)
    cut = split_evenly(heads, chains.size)
    walker = [rank for rank in range(chains.size) for _ in range(cut[rank], cut[rank + 1])]
    there, back = [0] * chains.size, [0] * chains.size
    for piece in (piece for own in chains.pieces for piece in own):
        for walking in walker:
            if walking == piece.rank:
                continue
            if not piece.is_last:
                there[piece.rank] += state + (0 if piece.is_first else transition)
                back[walking] += state
            if not piece.is_first:
                there[walking] += state
                back[piece.rank] += state
    assert [chains.state_traffic(rank, heads, state, transition) for rank in range(chains.size)] == list(
        zip(there, back, strict=True)
    )
    runs = [run for run in chains.halo(width) if run.owner != run.piece.rank]
    for rank in range(chains.size):
        given = sum(run.rows for run in runs if run.owner == rank)
        taken = sum(run.rows for run in runs if run.piece.rank == rank)
        assert chains.halo_traffic(rank, width) == (given, taken)


def test_a_document_that_is_whole_on_a_rank_sends_nothing() -> None:
    chains = chains_of(masks.documents([4, 4]), layouts.contiguous(8, 2), 1)
    assert chains.chains == ()
    assert chains.halo(3) == ()
    assert chains.state_traffic(0, 4, 16, 16) == (0, 0)


def test_the_picture_of_the_module() -> None:
    chains = chains_of(masks.causal(8), layouts.zigzag(8, 2), 1)
    assert chains.pieces == (
        (DocumentPiece(0, 0, 2, 0, 0, True, False), DocumentPiece(0, 2, 4, 6, 0, False, True)),
        (DocumentPiece(1, 0, 4, 2, 0, False, False),),
    )
    assert chains.chains == ((Link(0, 0), Link(1, 0), Link(0, 1)),)


@pytest.mark.parametrize(
    "mask",
    [
        masks.full(6),
        masks.sliding_window(6, 3),
        masks.documents([2, 4], causal=False),
        masks.prefix_lm(6, 2),
        masks.Mask(6, 6, (masks.Band(0, 6, 0, 6, hi=0),)),
        masks.Mask(6, 6, (masks.Band(0, 3, 0, 3, lo=0),)),
        masks.Mask(6, 6, (masks.Band(0, 3, 0, 3, lo=0), masks.Band(4, 6, 4, 6, lo=0))),
        masks.Mask(3, 6, (masks.Band(0, 3, 0, 3, lo=0),)),
    ],
)
def test_masks_that_are_not_whole_causal_documents_are_refused(mask: masks.Mask) -> None:
    with pytest.raises(ValueError, match=r"not one of whole causal documents.*masks\.documents"):
        documents_of(mask)


def test_documents_are_read_off_the_mask() -> None:
    assert documents_of(masks.documents([3, 0, 1, 1, 5])) == (3, 1, 1, 5)
    assert documents_of(masks.causal(7)) == (7,)
    assert documents_of(masks.chunked(7, 3)) == (3, 3, 1)
    assert documents_of(masks.documents([3, 4]) & masks.sliding_window(7, 4)) == (3, 4)
    assert documents_of(masks.documents([])) == ()


def test_strided_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'striped' has strided spans.*use layout="):
        chains_of(masks.causal(8), layouts.striped(8, 2), 1)
    one_each: Chains = chains_of(masks.causal(2), layouts.striped(2, 2), 1)
    assert len(one_each.chains[0]) == 2
