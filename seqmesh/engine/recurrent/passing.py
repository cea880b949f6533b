"""Pass states along the chains of documents that are cut over ranks, sharded by head.

    forward    E[next piece] = F[piece] + M[piece] E[piece]          from a document's first piece to its last
    backward   A[piece before] = G[piece] + M[piece]^T A[piece]      from its last to its first

F is the state that a piece leaves when zero enters it, M its transition, E what truly enters; G is the
gradient of E by the piece's own outputs, A that of the state which leaves. A recurrence is affine in its
state, so this is exact. Two all-to-alls each way: all travelling pieces' heads [cut_p, cut_p+1) go to rank p,
which walks every chain for them, and what it finds goes back. So bytes per rank do not grow with the ranks,
and no rank waits for the ranks before it.

Legend: b batch, h heads, w a rank's heads of the walk, L / E / P leaving, entering, passed-through pieces.
State (h, k, v) or (h, p, n). A transition is a matrix (k, k) a head, or one decay a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from seqmesh.engine.exchange import Pending, start_exchange
from seqmesh.engine.recurrent.rank_pieces import RankPieces
from seqmesh.layouts import split_evenly
from seqmesh.schedule.chains import Chains


class _WalkStep(NamedTuple):
    """The pieces at one place of all chains that are long enough, longest first, numbered over all ranks."""

    entering: list[int]
    leaving: list[int]
    passing: list[int]
    """Those that both enter and leave: the first of `entering`, as the longest chains come first."""


@dataclass(frozen=True, eq=False)
class Walk:
    """The way along all chains at once, step by step. The same on every rank."""

    steps: tuple[_WalkStep, ...]

    @staticmethod
    @lru_cache(maxsize=8)
    def of(chains: Chains) -> "Walk":
        """All chains side by side; made once for all layers."""
        numbers = [_numbered(places) for places in (chains.entering, chains.leaving, chains.passing)]
        longest = sorted(chains.chains, key=len, reverse=True)
        steps = []
        for place in range(len(longest[0]) if longest else 0):
            links = [chain[place] for chain in longest if len(chain) > place]
            steps.append(
                _WalkStep(*([number[link] for link in links if link in number] for number in numbers))
            )
        return Walk(tuple(steps))

    def forward(self, left: Sequence[Tensor], transitions: Sequence[Tensor]) -> list[Tensor]:
        """States (b, w, ...) that leave with zero entering, and transitions -> those that enter."""
        found: dict[int, Tensor] = {}
        carried = torch.stack([left[i] for i in self.steps[0].leaving])
        for step in self.steps[1:]:
            found.update(zip(step.entering, carried, strict=True))
            if step.leaving:
                passed = torch.stack([transitions[i] for i in step.passing])
                onward = _applied(passed, carried[: len(step.passing)])
                carried = onward + torch.stack([left[i] for i in step.leaving])
        return [found[i] for i in range(len(found))]

    def backward(self, entered: Sequence[Tensor], transitions: Sequence[Tensor]) -> list[Tensor]:
        """Gradients (b, w, ...) of entering states by the outputs -> those of leaving states, by all."""
        found: dict[int, Tensor] = {}
        carried = None
        for before, step in reversed(list(pairwise(self.steps))):
            back = torch.stack([entered[i] for i in step.entering])
            if carried is not None:
                passed = torch.stack([transitions[i] for i in step.passing])
                back[: len(step.passing)] += _applied(_transposed(passed, carried), carried)
            found.update(zip(before.leaving, back, strict=True))
            carried = back
        return [found[i] for i in range(len(found))]


def _numbered(places: Sequence[Sequence[int]]) -> dict[tuple[int, int], int]:
    """Numbers of pieces in the order of the ranks and of their places."""
    links = [(rank, place) for rank, own in enumerate(places) for place in own]
    return {link: number for number, link in enumerate(links)}


def _applied(transition: Tensor, state: Tensor) -> Tensor:
    """A matrix for each head times its state, or a decay for each head."""
    if transition.ndim == state.ndim:
        return transition @ state
    return transition[..., None, None] * state


def _transposed(transition: Tensor, state: Tensor) -> Tensor:
    return transition.mT if transition.ndim == state.ndim else transition


@dataclass(frozen=True, eq=False)
class Passing:
    """One layer's states on their way, as one rank sees it."""

    here: RankPieces
    heads: int

    @property
    def walk(self) -> Walk:
        """Along all chains."""
        return Walk.of(self.here.chains)

    @cached_property
    def _cut(self) -> list[int]:
        return split_evenly(self.heads, self.here.chains.size)

    @property
    def _own(self) -> int:
        """Heads whose chains this rank walks."""
        return self._cut[self.here.rank + 1] - self._cut[self.here.rank]

    def start(self, left: Tensor, transitions: Tensor) -> Pending | None:
        """Send this rank's states that leave with zero entering, and its transitions.

        Args:
            left: (L, b, h, ...) of its leaving pieces.
            transitions: (P, b, h, ...) of those that a state enters and leaves.
        """
        chains, unit = self.here.chains, (_unit(left), _unit(transitions))
        counts = zip(chains.leaving, chains.passing, strict=True)
        sizes = [self._own * (len(leaving) * unit[0] + len(passing) * unit[1]) for leaving, passing in counts]
        return self._to_walkers((left, transitions), sizes)

    def entering(self, pending: Pending | None, left: Tensor, transitions: Tensor) -> tuple[Tensor, Tensor]:
        """What `start` has begun: the states that enter this rank's pieces, (E, b, h, ...).

        Also the transitions (P of all ranks, b, w, ...) of the heads that it walks: the backward needs them.
        """
        received = self._received(
            (left, transitions), pending, (self.here.chains.leaving, self.here.chains.passing)
        )
        states = self.walk.forward(*received) if self.walk.steps else []
        own = torch.stack(received[1]) if received[1] else self._empty(transitions, self._own)
        return self._from_walkers(states, self.here.chains.entering, left), own

    def leaving_gradients(self, entered: Tensor, transitions: Tensor) -> Tensor:
        """Gradients of entering states by the outputs (E, b, h, ...) -> of leaving states (L, b, h, ...).

        `transitions` is what `entering` gave.
        """
        sizes = [self._own * len(places) * _unit(entered) for places in self.here.chains.entering]
        pending = self._to_walkers((entered,), sizes)
        (received,) = self._received((entered,), pending, (self.here.chains.entering,))
        gradients = self.walk.backward(received, transitions.unbind())
        return self._from_walkers(gradients, self.here.chains.leaving, entered)

    def _to_walkers(self, parts: Sequence[Tensor], receive_sizes: list[int]) -> Pending | None:
        """Start to send each rank its heads of the parts (pieces, b, h, ...)."""
        if self.here.group is None or not self.here.is_cut:
            return None
        messages = [
            [part[:, :, start:stop].reshape(-1) for part in parts] for start, stop in pairwise(self._cut)
        ]
        send = torch.cat([part for message in messages for part in message])
        send_sizes = [sum(part.numel() for part in message) for message in messages]
        return start_exchange(send, send_sizes, receive_sizes, self.here.group, is_ours=True)

    def _received(
        self, parts: Sequence[Tensor], pending: Pending | None, places: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Tensor]]:
        """Of every part, the pieces of all ranks with this rank's heads, (b, w, ...) each."""
        if pending is None:
            return [list(part) for part in parts]
        counts = [[len(own[rank]) for own in places] for rank in range(self.here.chains.size)]
        shapes = [(part.shape[1], self._own, *part.shape[3:]) for part in parts]
        sizes = [
            count * self._own * _unit(part) for row in counts for count, part in zip(row, parts, strict=True)
        ]
        blocks = iter(pending.wait().split(sizes))
        found: list[list[Tensor]] = [[] for _ in parts]
        for row in counts:
            for pieces, count, shape in zip(found, row, shapes, strict=True):
                pieces += next(blocks).view(count, *shape)
        return found

    def _from_walkers(self, found: list[Tensor], places: Sequence[Sequence[int]], like: Tensor) -> Tensor:
        """What was found for all ranks' pieces, to those ranks; of this rank's (pieces, b, h, ...)."""
        count = len(places[self.here.rank])
        if self.here.group is None:
            return torch.stack(found) if found else like.new_empty((0, *like.shape[1:]))
        ends = list(accumulate(map(len, places), initial=0))
        send = torch.cat([like.new_empty(0), *(state.reshape(-1) for state in found)])
        unit = _unit(like)
        send_sizes = [(stop - start) * self._own * unit for start, stop in pairwise(ends)]
        widths = [stop - start for start, stop in pairwise(self._cut)]
        receive_sizes = [count * width * unit for width in widths]
        received = start_exchange(send, send_sizes, receive_sizes, self.here.group, is_ours=True).wait()
        blocks = zip(received.split(receive_sizes), widths, strict=True)
        b, tail = like.shape[1], like.shape[3:]
        return torch.cat([block.view(count, b, width, *tail) for block, width in blocks], 2)

    def _empty(self, like: Tensor, heads: int) -> Tensor:
        return like.new_empty((0, like.shape[1], heads, *like.shape[3:]))


def _unit(x: Tensor) -> int:
    """Numbers of a head of one piece of (pieces, b, h, ...), of all sequences."""
    return x.shape[1] * x.shape[3:].numel()
