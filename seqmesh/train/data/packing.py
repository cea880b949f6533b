"""Documents -> packed sequences -> one row of tokens with labels, positions and mask.

The order is shuffled twice, by seed and epoch: documents before they are cut, and sequences after it, so that
the parts of a very long document do not follow each other. The last tokens of an epoch that do not fill a
sequence are left out; another epoch's order leaves out others.

Every sequence knows its document lengths, so its mask is `masks.documents(lengths)`: documents never attend
to each other. Labels are shifted here, inside each document and before any sharding: a rank's last token has
its label on the next rank, and shifting after sharding would lose it. Position ids restart at each document.

An epoch takes 24 bytes of memory a document, whatever the documents' lengths.
"""

from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, count
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray

from seqmesh import masks
from seqmesh.parallel.packing import IGNORED_LABEL, PackedTokens
from seqmesh.train.data.corpus import Corpus, Piece

PackedSequence = tuple[Piece, ...]
"""Pieces with `seq_len` tokens together. A piece is a document of its own."""


class Epoch:
    """The sequences of one epoch, any of which can be asked for."""

    def __init__(self, lengths: NDArray[np.int64], seq_len: int, seed: int, epoch: int) -> None:
        """Shuffle: the order depends on nothing but the arguments.

        Args:
            lengths: (documents,) tokens of each document.
            seq_len: tokens of each sequence.
            seed: shuffles, together with `epoch`.
            epoch: 0, 1, ...
        """
        order = array("q", range(len(lengths)))  # 8 bytes each, where a list has 40
        Random(f"{seed}/{epoch}").shuffle(order)
        self._seq_len = seq_len
        self._order: NDArray[np.int64] = np.frombuffer(order, np.int64)
        self._stops: NDArray[np.int64] = np.cumsum(lengths[self._order])
        places = array("q", range(int(self._stops[-1]) // seq_len))
        Random(f"{seed}/{epoch}/sequences").shuffle(places)
        self._places = places

    def __len__(self) -> int:
        """Sequences."""
        return len(self._places)

    def sequence(self, number: int) -> PackedSequence:
        """The sequence that comes at place `number` of the epoch."""
        return self.cut(self._places[number])

    def cut(self, number: int) -> PackedSequence:
        """The `number`-th sequence in the order of the documents."""
        first = number * self._seq_len
        last = first + self._seq_len
        pieces: list[Piece] = []
        place = int(np.searchsorted(self._stops, first, side="right"))
        while first < last:
            document = int(self._order[place])
            stop = int(self._stops[place])
            start = int(self._stops[place - 1]) if place else 0
            pieces.append(Piece(document, first - start, min(stop, last) - start))
            first = stop
            place += 1
        return tuple(pieces)


def check_enough(corpus: Corpus, seq_len: int) -> None:
    """Refuse a text that does not fill a sequence, or sequences without a label.

    Raises:
        ValueError: one of these.
    """
    if seq_len < 3:
        raise ValueError(f"seq_len={seq_len}: shorter sequences may have no label; use seq_len >= 3")
    if corpus.tokens < seq_len:
        raise ValueError(
            f"{corpus.source!r} has {corpus.tokens} tokens, too few for one sequence of {seq_len};"
            f" use more text or data.seq_len <= {corpus.tokens}"
        )


def sequences(corpus: Corpus, *, seq_len: int, seed: int, skip: int = 0) -> Iterator[PackedSequence]:
    """Sequences without end, epoch after epoch: the same on every rank.

    `assemble` makes tokens of those that a rank computes.

    Args:
        corpus: the documents.
        seq_len: tokens of each sequence, at least 3 (so that every sequence has a label).
        seed: shuffles the documents.
        skip: sequences at the beginning that are left out: those that a run has consumed already. They cost
            nothing.

    Raises:
        ValueError: see `check_enough`.
    """
    check_enough(corpus, seq_len)
    return _endless(corpus.lengths, seq_len, seed, skip)


def _endless(lengths: NDArray[np.int64], seq_len: int, seed: int, skip: int) -> Iterator[PackedSequence]:
    skipped_epochs, first = divmod(skip, int(lengths.sum()) // seq_len)  # every epoch has as many sequences
    for number in count(skipped_epochs):
        epoch = Epoch(lengths, seq_len, seed, number)
        for place in range(first, len(epoch)):
            yield epoch.sequence(place)
        first = 0


def lengths_of(pieces: Sequence[Piece]) -> list[int]:
    """Tokens of each piece."""
    return [piece.stop - piece.start for piece in pieces]


def area_of(pieces: Sequence[Piece]) -> int:
    """Allowed (query, key) pairs of pieces, each of which is a document of its own."""
    return sum(length * (length + 1) // 2 for length in lengths_of(pieces))


def assemble(corpus: Corpus, pieces: Sequence[Piece]) -> PackedTokens:
    """The tokens of a micro-batch in one row, the same on every rank that shares it.

    Several sequences lie end to end: documents keep them apart just as they keep themselves apart.
    """
    lengths = lengths_of(pieces)
    ids = torch.cat([corpus.ids(piece) for piece in pieces])
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[:-1] = ids[1:]
    # The last token of each document: shifting gave it the first token of the next one.
    labels[torch.tensor(list(accumulate(lengths))) - 1] = IGNORED_LABEL
    positions = torch.cat([torch.arange(length) for length in lengths])
    return PackedTokens(
        input_ids=ids[None],
        shift_labels=labels[None],
        position_ids=positions[None],
        mask=masks.documents(lengths),
    )
