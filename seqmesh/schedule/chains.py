"""Chains: documents cut over ranks, for layers that carry a state along the sequence.

    one document, zigzag, ring 2       a piece: consecutive tokens of one document on one rank
      ring 0:  0 1           6 7         rank 0 [0 1]  ->  rank 1 [2 3 4 5]  ->  rank 0 [6 7]
      ring 1:      2 3 4 5               a chain: its pieces in order; a state leaves each for the next

A recurrence needs the state that enters a piece, a short convolution the few rows before it (its halo); both
come from the pieces before it in its chain. A document that lies whole on one rank is in no chain, and needs
nothing. Like a schedule this is data, the same on every rank: executed by the engine, counted by the tests,
priced by the planner and drawn.

Ranks are numbered ring_rank * ulysses + ulysses_rank, and rows index a rank's own tokens in storage order.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from seqmesh.layouts import Layout, Span, split_evenly
from seqmesh.masks import Mask


class DocumentPiece(NamedTuple):
    """Rows [start, stop) of a rank: consecutive tokens of one document."""

    rank: int
    start: int
    stop: int
    position: int
    """Of its first token, in the whole sequence."""
    document: int
    is_first: bool
    """The document begins here: no state enters."""
    is_last: bool
    """The document ends here: no state leaves."""

    @property
    def tokens(self) -> int:
        """How many."""
        return self.stop - self.start


class Link(NamedTuple):
    """A piece by its rank and its place among the rank's pieces."""

    rank: int
    place: int


class HaloRun(NamedTuple):
    """Rows of an owner that go, in order, right before a piece: they end `back` tokens before its first."""

    piece: Link
    back: int
    owner: int
    start: int
    """First of the rows, of the owner's."""
    rows: int


@dataclass(frozen=True, eq=False)
class Chains:
    """The pieces of every rank, and which follows which. Made by `chains_of`."""

    pieces: tuple[tuple[DocumentPiece, ...], ...]
    """Of every rank, in storage order."""

    @property
    def size(self) -> int:
        """Ranks."""
        return len(self.pieces)

    @cached_property
    def chains(self) -> tuple[tuple[Link, ...], ...]:
        """For each document that is cut, its pieces in order."""
        held = defaultdict(list)
        for rank, own in enumerate(self.pieces):
            for place, piece in enumerate(own):
                if not (piece.is_first and piece.is_last):
                    held[piece.document].append((piece.position, Link(rank, place)))
        return tuple(tuple(link for _, link in sorted(held[document])) for document in sorted(held))

    def at(self, link: Link) -> DocumentPiece:
        """The piece of a link."""
        return self.pieces[link.rank][link.place]

    @cached_property
    def leaving(self) -> tuple[tuple[int, ...], ...]:
        """Of every rank, the places of pieces that a state leaves."""
        return tuple(tuple(i for i, piece in enumerate(own) if not piece.is_last) for own in self.pieces)

    @cached_property
    def entering(self) -> tuple[tuple[int, ...], ...]:
        """Of every rank, the places of pieces that a state enters."""
        return tuple(tuple(i for i, piece in enumerate(own) if not piece.is_first) for own in self.pieces)

    @cached_property
    def passing(self) -> tuple[tuple[int, ...], ...]:
        """Of every rank, the places of pieces that a state enters and leaves: their transition travels."""
        both = zip(self.entering, self.leaving, strict=True)
        return tuple(tuple(sorted(set(entering) & set(leaving))) for entering, leaving in both)

    @cached_property
    def _totals(self) -> "_Totals":
        return _Totals(*(sum(map(len, places)) for places in (self.leaving, self.entering, self.passing)))

    def sizes(self, rank: int) -> "PassedSizes":
        """Of what the engine keeps of them on a rank."""
        entered = [self.pieces[rank][place] for place in self.entering[rank]]
        return PassedSizes(
            pieces=len(self.pieces[rank]),
            entered=len(entered),
            tokens=sum(piece.tokens for piece in entered),
            passed=self._totals.passing,
            rank=rank,
            ranks=self.size,
        )

    def halo(self, width: int) -> tuple[HaloRun, ...]:
        """The up to `width` tokens of the same document before each piece, and who holds them.

        In the order of the chains and of their pieces, from the nearest to the furthest.
        """
        return tuple(
            run for chain in self.chains for i in range(len(chain)) for run in self._before(chain, i, width)
        )

    def _before(self, chain: tuple[Link, ...], place: int, width: int) -> Iterator[HaloRun]:
        """The halo of a piece of a chain."""
        back = 0
        for link in reversed(chain[:place]):
            if back >= width:
                return
            owner = self.at(link)
            count = min(width - back, owner.tokens)
            yield HaloRun(chain[place], back, owner.rank, owner.stop - count, count)
            back += count

    def state_traffic(self, rank: int, heads: int, state: int, transition: int) -> "PassedNumbers":
        """Numbers that a rank hands to others when states are passed along the chains, for one sequence.

        Each rank walks the chains for its share of the heads. To it go the states that leave pieces, and the
        transitions of those that are passed through; the entering states go back. In the backward, gradients
        of entering states go there, and those of leaving states go back.

        Args:
            rank: the sender.
            heads: of the layer.
            state: numbers of a head's state.
            transition: numbers of a head's transition.
        """
        cut = _cut(heads, self.size)
        mine = cut[rank + 1] - cut[rank]
        leaving, entering, passing = map(len, (self.leaving[rank], self.entering[rank], self.passing[rank]))
        others_leaving = self._totals.leaving - leaving
        others_entering = self._totals.entering - entering
        return PassedNumbers(
            forward=(leaving * state + passing * transition) * (heads - mine)
            + others_entering * state * mine,
            backward=entering * state * (heads - mine) + others_leaving * state * mine,
        )

    def halo_traffic(self, rank: int, width: int) -> "PassedNumbers":
        """Rows that a rank hands to others for a convolution over `width` earlier tokens."""
        return _halo_traffic(self, width)[rank]


@lru_cache(maxsize=64)
def _cut(heads: int, ranks: int) -> tuple[int, ...]:
    """Where the heads of each rank begin; asked for each of many ranks."""
    return tuple(split_evenly(heads, ranks))


@lru_cache(maxsize=8)
def _halo_traffic(chains: Chains, width: int) -> tuple["PassedNumbers", ...]:
    """Of every rank, in one pass over all halos."""
    there, back = [0] * chains.size, [0] * chains.size
    for run in chains.halo(width):
        if run.owner != run.piece.rank:
            there[run.owner] += run.rows
            back[run.piece.rank] += run.rows
    return tuple(map(PassedNumbers, there, back))


class _Totals(NamedTuple):
    """Pieces of all ranks."""

    leaving: int
    entering: int
    passing: int


class PassedSizes(NamedTuple):
    """How much a rank has of chains."""

    pieces: int
    """Its pieces."""
    entered: int
    """Its pieces that a state enters."""
    tokens: int
    """Of those pieces."""
    passed: int
    """Pieces of all ranks that a state enters and leaves."""
    rank: int
    ranks: int


class PassedNumbers(NamedTuple):
    """What a rank hands to other ranks."""

    forward: int
    backward: int


@lru_cache(maxsize=8)
def chains_of(mask: Mask, layout: Layout, ulysses: int) -> Chains:
    """The pieces of every rank of a layout of a mask's documents.

    Args:
        mask: causal within each document.
        layout: of the ring ranks, whose storage is cut for `ulysses` ranks each.
        ulysses: ulysses degree.

    Raises:
        ValueError: another mask, or a layout with strided spans.
    """
    starts = tuple(accumulate(documents_of(mask), initial=0))
    pieces: list[tuple[DocumentPiece, ...]] = []
    for spans in layout.ranks:
        _check_consecutive(layout, spans)
        cuts = split_evenly(sum(span.count for span in spans), ulysses)
        for start, stop in pairwise(cuts):
            pieces.append(tuple(_pieces_of_rank(len(pieces), spans, start, stop, starts)))
    return Chains(tuple(pieces))


def _check_consecutive(layout: Layout, spans: tuple[Span, ...]) -> None:
    if any(span.stride != 1 and span.count > 1 for span in spans):
        raise ValueError(
            f"the layout {layout.name!r} has strided spans, along which a recurrent layer would pass a state"
            " for every token; use layout='balanced', 'zigzag' or 'contiguous'"
        )


def _pieces_of_rank(
    rank: int, spans: tuple[Span, ...], start: int, stop: int, starts: tuple[int, ...]
) -> Iterator[DocumentPiece]:
    """The pieces in rows [start, stop) of a ring rank's storage, as rows of a rank that holds those alone."""
    for first, last, position in _runs(spans, start, stop):
        row = first
        while row < last:
            here = position + row - first
            document = bisect_right(starts, here) - 1
            until = min(last, row + starts[document + 1] - here)
            yield DocumentPiece(
                rank=rank,
                start=row - start,
                stop=until - start,
                position=here,
                document=document,
                is_first=here == starts[document],
                is_last=here + until - row == starts[document + 1],
            )
            row = until


def _runs(spans: tuple[Span, ...], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Rows [first, last) of consecutive tokens, and the first one's position. Spans that touch are one."""
    offset, run = 0, None
    for span in spans:
        first, last = max(offset, start), min(offset + span.count, stop)
        position = span.start + first - offset
        offset += span.count
        if first >= last:
            continue
        if run is not None and position == run[2] + run[1] - run[0]:
            run = (run[0], last, run[2])
            continue
        if run is not None:
            yield run
        run = (first, last, position)
    if run is not None:
        yield run


def documents_of(mask: Mask) -> tuple[int, ...]:
    """Lengths of the documents of a mask that is causal within each: masks.causal, masks.documents.

    Raises:
        ValueError: any other mask.
    """
    bands = sorted(mask.bands)
    lengths = [band.q_stop - band.q_start for band in bands]
    starts = list(accumulate(lengths, initial=0))
    is_whole = mask.q_len == mask.k_len == starts[-1]
    for band, start, length in zip(bands, starts, lengths, strict=False):
        # Of a trimmed band: one token needs no diagonal.
        lo = 0 if length > 1 else None
        is_whole &= band == (start, start + length, start, start + length, lo, None)
    if not is_whole:
        raise ValueError(
            "the schedule's mask is not one of whole causal documents, along which recurrent layers and short"
            " convolutions run; build it from masks.causal(s) or masks.documents(lengths), and give"
            " layers that see less a schedule of their own (sliding_schedule=, chunked_schedule=)"
        )
    return tuple(lengths)
