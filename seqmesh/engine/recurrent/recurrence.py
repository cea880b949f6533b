"""A recurrence on the pieces of one rank: forward, replayed, and what its backward passes on.

    1  pieces that begin documents which go on elsewhere run: F, their final states           with a graph
    2  pieces that a state enters are scouted: F and M                                        without one
    3  F and M travel; documents that lie whole on the rank run meanwhile                     with a graph
    4  the entering states come, and the pieces that they enter run                           with a graph

Legend: b batch, n tokens of the rank, h heads; L / E leaving, entering pieces of the rank.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from seqmesh.engine.merge import accumulator_dtype
from seqmesh.engine.recurrent.kernels import PieceCall, PieceResult, RecurrentKernel, Tensors, chosen
from seqmesh.engine.recurrent.passing import Passing
from seqmesh.engine.recurrent.rank_pieces import RankPieces
from seqmesh.engine.recurrent.rules import Rule, Scouted, Shapes
from seqmesh.engine.sharding import Schedule
from seqmesh.engine.watching import with_graph


class Known(NamedTuple):
    """What a forward finds for its backward."""

    entering: Tensor
    """(E, b, h, ...) states that enter this rank's pieces."""
    transitions: Tensor
    """(P of all ranks, b, w, ...) of the heads whose chains this rank walks."""
    reads: Tensor
    """(b, tokens of entered pieces, h, ...)"""


class Recurred(NamedTuple):
    """What a forward gives."""

    out: Tensor
    """(b, n, h, ...)"""
    left: Tensor
    """(L, b, h, ...) the states that leave this rank's pieces."""
    known: Known


@dataclass(frozen=True, kw_only=True, eq=False)
class Recurrence:
    """A rule on this rank's pieces of a schedule's documents."""

    rule: Rule
    kernel: RecurrentKernel
    shapes: Shapes
    batch: int
    here: RankPieces
    passing: Passing
    like: Tensor
    """Empty, of the device and dtype of what has rows."""

    @staticmethod
    def of(rule: Rule, tensors: Tensors, schedule: Schedule, kernel: str | RecurrentKernel) -> "Recurrence":
        """A call of `recur`, checked."""
        rows = schedule.rows[schedule.mesh.ulysses_rank]
        for name in rule.by_token:
            if tensors[name].shape[1] != rows:
                raise ValueError(
                    f"{name} has shape {tuple(tensors[name].shape)}, but this rank holds {rows} tokens of the"
                    " schedule; pass (b, n, ...) of the tokens that schedule.shard gives"
                )
        return Recurrence.at(RankPieces.of(schedule), rule, tensors, kernel)

    @staticmethod
    def at(here: RankPieces, rule: Rule, tensors: Tensors, kernel: str | RecurrentKernel) -> "Recurrence":
        """The same at a rank's place."""
        shapes, first = rule.shapes(tensors), tensors[rule.by_token[0]]
        return Recurrence(
            rule=rule,
            kernel=chosen(kernel, rule.problem(tensors)),
            shapes=shapes,
            batch=first.shape[0],
            here=here,
            passing=Passing(here, shapes.heads),
            like=first.new_empty(0),
        )

    def forward(self, tensors: Tensors, *, keeps: bool) -> Recurred:
        """Everything but the way back, for which it `keeps` the reads. Grad mode says what has a graph."""
        here, entered, leaving = self.here, self.here.entered, self.here.leaving
        ran = self._run(tensors, {i: None for i in leaving if i not in entered})
        with _aside(self.like):
            scouts = self._scouts(tensors, keeps)
            left = self._stacked(
                [ran[i].left if i in ran else scouts[i].left for i in leaving], self.shapes.state
            )
            moves = self._stacked([scouts[i].transition for i in here.passed], self.shapes.transition)
            pending = self.passing.start(left, moves)
        whole = [i for i, piece in enumerate(here.pieces) if piece.is_first and piece.is_last]
        ran |= self._run(tensors, dict.fromkeys(whole))
        with _aside(self.like):
            states, transitions = self.passing.entering(pending, left, moves)
        ran |= self._run(tensors, dict(zip(entered, states, strict=True)))
        reads = self._joined([scouts[i].reads for i in entered if keeps], self.shapes.reads)
        return Recurred(
            out=self._joined([ran[i].out for i in range(len(ran))], self.shapes.out),
            left=self._stacked([ran[i].left for i in leaving], self.shapes.state),
            known=Known(states, transitions, reads),
        )

    def _scouts(self, tensors: Tensors, keeps: bool) -> dict[int, Scouted]:
        """What is needed of pieces that a state enters; of those that none leaves, for a backward only."""
        wanted = self.here.entered if keeps else self.here.passed
        found = self.rule.scout(self.kernel, self._calls(tensors, dict.fromkeys(wanted)))
        return dict(zip(wanted, found, strict=True))

    def replay(self, tensors: Tensors, states: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (b, n, h, ...) and leaving states (L, b, h, ...), when the entering ones are known."""
        known = dict(zip(self.here.entered, states, strict=True))
        ran = self._run(tensors, {i: known.get(i) for i in range(len(self.here.pieces))})
        out = self._joined([ran[i].out for i in range(len(ran))], self.shapes.out)
        return out, self._stacked([ran[i].left for i in self.here.leaving], self.shapes.state)

    def leaving_gradients(self, kept: Tensors, grad_out: Tensor, known: Known) -> Tensor:
        """Gradients of the states that leave this rank's pieces, (L, b, h, ...).

        Args:
            kept: the tensors that the rule keeps.
            grad_out: (b, n, h, ...) of the outputs.
            known: what the forward found.
        """
        found, stop = [], 0
        for i in self.here.entered:
            piece = self.here.pieces[i]
            start, stop = stop, stop + piece.tokens
            rows = grad_out[:, piece.start : piece.stop]
            found.append(self.rule.reading_gradient(self._piece(kept, i), known.reads[:, start:stop], rows))
        return self.passing.leaving_gradients(self._stacked(found, self.shapes.state), known.transitions)

    def gradients(
        self, tensors: Tensors, needed: Collection[str], grad_out: Tensor, known: Known
    ) -> list[Tensor]:
        """Gradients of the needed tensors, by running every piece again.

        Args:
            tensors: of the forward.
            needed: names of those that get a gradient, in this order.
            grad_out: (b, n, h, ...) of the outputs.
            known: what the forward found.
        """
        kept = {name: tensors[name] for name in self.rule.kept}
        left = self.leaving_gradients(kept, grad_out, known)
        with with_graph():
            leaves = {name: x.detach().requires_grad_(name in needed) for name, x in tensors.items()}
            ran = self.replay(leaves, known.entering)
        pairs = [
            (x, grad.to(x.dtype)) for x, grad in zip(ran, (grad_out, left), strict=True) if x.requires_grad
        ]
        wanted = [leaves[name] for name in needed]
        if not pairs:  # no tokens
            return [torch.zeros_like(x) for x in wanted]
        outputs, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
        return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, found, strict=True)]

    def _run(self, tensors: Tensors, entering: Mapping[int, Tensor | None]) -> dict[int, PieceResult]:
        """The pieces at some places, from the states that enter them."""
        ran = self.kernel.compute(self.rule, self._calls(tensors, entering))
        return dict(zip(entering, ran, strict=True))

    def _calls(self, tensors: Tensors, entering: Mapping[int, Tensor | None]) -> list[PieceCall]:
        leaving = self.here.leaving
        return [
            PieceCall(self._piece(tensors, place), state, place in leaving)
            for place, state in entering.items()
        ]

    def _piece(self, tensors: Tensors, place: int) -> Tensors:
        """The tensors of a piece."""
        piece = self.here.pieces[place]
        rows, by_token = slice(piece.start, piece.stop), self.rule.by_token
        return {name: x[:, rows] if name in by_token else x for name, x in tensors.items()}

    def _joined(self, parts: Sequence[Tensor], of_head: tuple[int, ...]) -> Tensor:
        """Tokens of pieces, (b, n, h, ...) each, one after the other."""
        if not parts:
            return self.like.new_empty((self.batch, 0, self.shapes.heads, *of_head))
        return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]

    def _stacked(self, parts: Sequence[Tensor | None], of_head: tuple[int, ...]) -> Tensor:
        """(pieces, b, h, ...) in fp32, or fp64."""
        wide = accumulator_dtype(self.like.dtype)
        found = [part.to(wide) for part in parts if part is not None]
        if not found:
            return self.like.new_empty((0, self.batch, self.shapes.heads, *of_head), dtype=wide)
        return torch.stack(found)


@contextmanager
def _aside(like: Tensor) -> Iterator[None]:
    """No graph, and no autocast: states are fp32."""
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        yield
