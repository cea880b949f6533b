"""The rows right before each piece, for a short convolution that reaches a few tokens back.

    piece      . . | 4 5 6 7          a rank's pieces, each after its halo, one after the other:
    halo         2 3                    [2 3 | 4 5 6 7 | 0 0 | 8 9]     zeros before a document's first token

One all-to-all brings the rows of other ranks, one brings their gradients back. Then a single call of the
convolution serves all pieces: what it says of halos is thrown away.

Legend: b batch, c channels, n tokens of the rank, m = n + width x pieces.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from seqmesh.engine.exchange import start_exchange
from seqmesh.engine.recurrent.rank_pieces import RankPieces
from seqmesh.schedule.chains import HaloRun


@dataclass(frozen=True, eq=False)
class Halo:
    """The halos of one rank's pieces, and the rows that it gives to others'."""

    here: RankPieces
    width: int
    """Tokens that the convolution reaches back."""

    @staticmethod
    @lru_cache(maxsize=64)
    def of(here: RankPieces, width: int) -> "Halo":
        """Made once for all layers."""
        return Halo(here, width)

    @cached_property
    def _runs(self) -> tuple[HaloRun, ...]:
        return self.here.chains.halo(self.width)

    @cached_property
    def _given(self) -> list[list[HaloRun]]:
        """By peer, the runs that this rank owns and the peer's pieces need."""
        found: list[list[HaloRun]] = [[] for _ in range(self.here.chains.size)]
        for run in self._runs:
            if run.owner == self.here.rank:
                found[run.piece.rank].append(run)
        return found

    @cached_property
    def _taken(self) -> list[list[HaloRun]]:
        """By peer, the runs that the peer owns and this rank's pieces need."""
        found: list[list[HaloRun]] = [[] for _ in range(self.here.chains.size)]
        for run in self._runs:
            if run.piece.rank == self.here.rank:
                found[run.owner].append(run)
        return found

    @cached_property
    def is_exchanged(self) -> bool:
        """Whether any rank's pieces need rows of another's: the same on every rank."""
        return self.here.group is not None and any(run.owner != run.piece.rank for run in self._runs)

    def fetch(self, x: Tensor) -> Tensor:
        """Of x (b, c, n), the rows before each piece, (pieces, b, c, width): 0 before its document."""
        halos = x.new_zeros((len(self.here.pieces), *x.shape[:2], self.width))
        given = [[x[:, :, run.start : run.start + run.rows] for run in runs] for runs in self._given]
        for run, rows in self._exchanged(given, self._taken, x):
            halos[run.piece.place][:, :, self._at(run)] = rows
        return halos

    def give_back(self, halos: Tensor, grad: Tensor) -> None:
        """Add the gradients of all ranks' halos to that of this rank's rows, (b, c, n), in place."""
        taken = [[halos[run.piece.place][:, :, self._at(run)] for run in runs] for runs in self._taken]
        for run, rows in self._exchanged(taken, self._given, grad):
            grad[:, :, run.start : run.start + run.rows] += rows

    def _at(self, run: HaloRun) -> slice:
        """Of a run in its piece's halo."""
        return slice(self.width - run.back - run.rows, self.width - run.back)

    def _exchanged(
        self, sent: Sequence[Sequence[Tensor]], runs: Sequence[Sequence[HaloRun]], like: Tensor
    ) -> Iterator[tuple[HaloRun, Tensor]]:
        """Rows (b, c, count) to each peer, and those that come from each, of these runs."""
        rows = like.shape[:2]
        send = [[part.reshape(-1) for part in parts] for parts in sent]
        send_sizes = [sum(part.numel() for part in parts) for parts in send]
        counts = [[rows.numel() * run.rows for run in own] for own in runs]
        flat = torch.cat([like.new_empty(0), *(part for parts in send for part in parts)])
        if self.is_exchanged:
            assert self.here.group is not None
            flat = start_exchange(
                flat, send_sizes, [sum(own) for own in counts], self.here.group, is_ours=True
            ).wait()
        blocks = flat.split([count for own in counts for count in own])
        every = [run for own in runs for run in own]
        return ((run, block.view(*rows, run.rows)) for run, block in zip(every, blocks, strict=True))

    def extended(self, x: Tensor, halos: Tensor) -> Tensor:
        """(b, c, n) with its halos -> (b, c, m)."""
        pieces = self.here.pieces
        parts = [
            part for halo, p in zip(halos, pieces, strict=True) for part in (halo, x[:, :, p.start : p.stop])
        ]
        return torch.cat([x[:, :, :0], *parts], 2)

    def own(self, y: Tensor) -> Tensor:
        """(b, c, m) -> (b, c, n): without what stands at halos."""
        pieces, width = self.here.pieces, self.width
        parts = [y[:, :, p.start + i * width : p.stop + i * width] for i, p in enumerate(pieces, 1)]
        return torch.cat([y[:, :, :0], *parts], 2)

    def split(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The transpose of `extended`: a gradient (b, c, m) as that of the rows and that of the halos."""
        pieces, width = self.here.pieces, self.width
        starts = [p.start + i * width for i, p in enumerate(pieces)]
        halos = [grad[:, :, start : start + width] for start in starts]
        return self.own(grad), torch.stack(halos) if halos else grad.new_empty((0, *grad.shape[:2], width))
