"""The recurrences, each with what passing its states takes.

A rule maps a piece's tensors and the state that enters to its outputs and the state that leaves, and is
affine in the state. It calls a function for that, the model's own or another (kernels.py). Beside that it
says, without a gradient:

    scout               F and M of a piece: what leaves if zero enters, and the transition
    reading_gradient    G = sum over tokens of (how it reads the entering state)^T (its output's gradient)

Legend: b batch, n tokens, h heads. Delta rules: k, v head dims of keys and values, state (h, k, v). Mamba-2:
p head dim, s state size, g groups, state (h, p, s).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmesh.engine.merge import accumulator_dtype
from seqmesh.engine.recurrent.kernels import (
    GATED_DELTA_RULE,
    KIMI_DELTA_ATTENTION,
    MAMBA2,
    Callee,
    Function,
    PieceCall,
    PieceResult,
    RecurrentKernel,
    RecurrentProblem,
    Tensors,
    function_at,
)


class Scouted(NamedTuple):
    """What is known of a piece before its entering state is."""

    left: Tensor | None
    """(b, h, ...) state that leaves if zero enters; None for a document's last piece."""
    transition: Tensor | None
    """(b, h, k, k), or (b, h); None for the last piece."""
    reads: Tensor
    """What `reading_gradient` needs."""


class Rule(Callee, Protocol):
    """A recurrence, with the function that the model computes it by."""

    by_token: ClassVar[tuple[str, ...]]
    """Names of the tensors (b, n, ...) that have rows; the others are of the whole layer."""
    kept: ClassVar[tuple[str, ...]]
    """Names of those that `reading_gradient` needs."""

    @property
    def path(self) -> str:
        """By which an operator finds the function: "module:name"; "" for one that has none."""
        ...

    @property
    def numbers(self) -> list[float]:
        """What it is beside its function, as `rule_of` takes it."""
        ...

    def scout(self, kernel: RecurrentKernel, pieces: Sequence[PieceCall]) -> list[Scouted]:
        """F and M of pieces that a state enters, not yet known; of those that one also leaves."""
        ...

    def reading_gradient(self, tensors: Tensors, reads: Tensor, grad_out: Tensor) -> Tensor:
        """The gradient of the entering state by the outputs, (b, h, ...). Of the tensors it needs `kept`."""
        ...

    def shapes(self, tensors: Tensors) -> "Shapes":
        """Of a head's state and so on."""
        ...


class Shapes(NamedTuple):
    """What a rule's tensors imply."""

    heads: int
    out: tuple[int, ...]
    """Of a token's output for one head."""
    state: tuple[int, ...]
    """Of one head."""
    transition: tuple[int, ...]
    """Of one head; () for one decay."""
    reads: tuple[int, ...]
    """Of a token's reads for one head."""
    reads_dtype: torch.dtype


@dataclass(frozen=True)
class DeltaRule:
    """The gated delta rule, or Kimi's with a gate a channel: S <- (I - beta k k^T) diag(e^g) S + beta k v^T.

    The transition rides through the function as k more columns of values: values 0, initial state the
    identity. Their outputs are then what each token reads of the entering state.
    """

    by_token: ClassVar[tuple[str, ...]] = ("query", "key", "value", "g", "beta")
    kept: ClassVar[tuple[str, ...]] = ()
    function: Function
    """(q, k (b, n, h', k), v (b, n, h, v), g=, beta=, initial_state=, ...) -> outputs, final state."""
    normalizes: bool = False
    """Whether the function divides queries and keys by their norms."""
    path: str = ""

    @property
    def numbers(self) -> list[float]:
        return [float(self.normalizes)]

    def problem(self, tensors: Tensors) -> RecurrentProblem:
        query, is_kimi = tensors["query"], tensors["g"].ndim == 4
        return RecurrentProblem(
            recurrence=KIMI_DELTA_ATTENTION if is_kimi else GATED_DELTA_RULE,
            device_type=query.device.type,
            dtype=query.dtype,
            head_dim=query.shape[3],
        )

    def call(self, function: Function, piece: PieceCall, **packing: Tensor) -> PieceResult:
        query, key, value, g, beta = (piece.tensors[name] for name in self.by_token)
        found = function(
            query,
            key,
            value,
            g=g,
            beta=beta,
            initial_state=piece.entering,
            output_final_state=True,
            use_qk_l2norm_in_kernel=self.normalizes,
            **packing,
        )
        return PieceResult(*found)

    def scout(self, kernel: RecurrentKernel, pieces: Sequence[PieceCall]) -> list[Scouted]:
        found: dict[int, Scouted] = {}
        for leaves in (True, False):  # of two widths, so two calls of a kernel that takes several pieces
            places = [i for i, piece in enumerate(pieces) if piece.leaves is leaves]
            ran = kernel.compute(self, [self._riding(pieces[i]) for i in places])
            found |= {i: self._scouted(pieces[i], done) for i, done in zip(places, ran, strict=True)}
        return [found[i] for i in range(len(pieces))]

    def _riding(self, piece: PieceCall) -> PieceCall:
        """The call that carries the transition along; with the state, if one leaves."""
        value, shapes = piece.tensors["value"], self.shapes(piece.tensors)
        (k, v), wide = shapes.state, accumulator_dtype(value.dtype)
        start = torch.eye(k, dtype=wide, device=value.device).expand(value.shape[0], shapes.heads, k, k)
        rows = value.new_zeros(()).expand(*value.shape[:3], k)
        if piece.leaves:
            start = torch.cat((start.new_zeros(()).expand(*start.shape[:3], v), start), -1)
            rows = torch.cat((value, rows), -1)
        return PieceCall({**piece.tensors, "value": rows}, start, piece.leaves)

    def _scouted(self, piece: PieceCall, done: PieceResult) -> Scouted:
        """What `_riding` found."""
        if not piece.leaves:
            return Scouted(None, None, done.out)
        assert done.left is not None
        v, wide = piece.tensors["value"].shape[3], accumulator_dtype(done.out.dtype)
        left, moves = done.left[..., :v].to(wide), done.left[..., v:].to(wide)
        return Scouted(left, moves, done.out[..., v:].contiguous())

    def reading_gradient(self, tensors: Tensors, reads: Tensor, grad_out: Tensor) -> Tensor:
        del tensors
        wide = accumulator_dtype(grad_out.dtype)
        return torch.einsum("bnhk,bnhv->bhkv", reads.to(wide), grad_out.to(wide))

    def shapes(self, tensors: Tensors) -> Shapes:
        h, v = tensors["value"].shape[2:]
        k = tensors["key"].shape[3]
        return Shapes(
            heads=h, out=(v,), state=(k, v), transition=(k, k), reads=(k,), reads_dtype=tensors["query"].dtype
        )


@dataclass(frozen=True)
class Mamba2:
    """Mamba-2's scan: S <- e^(dt A) S + dt x B^T, output S C + D x. Its transition is one decay a head."""

    by_token: ClassVar[tuple[str, ...]] = ("hidden_states", "dt", "B", "C")
    kept: ClassVar[tuple[str, ...]] = ("C",)
    function: Function
    """(x (b, n, h, p), dt (b, n, h), A (h,), B, C (b, n, g, s), ...) -> outputs, final states."""
    chunk_size: int
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    path: str = ""

    @property
    def numbers(self) -> list[float]:
        return [float(self.chunk_size), float(self.dt_softplus), *self.dt_limit]

    def problem(self, tensors: Tensors) -> RecurrentProblem:
        x = tensors["hidden_states"]
        return RecurrentProblem(
            recurrence=MAMBA2, device_type=x.device.type, dtype=x.dtype, head_dim=tensors["B"].shape[3]
        )

    def call(self, function: Function, piece: PieceCall, **packing: Tensor) -> PieceResult:
        tensors = piece.tensors
        found = function(
            *(tensors[name] for name in ("hidden_states", "dt", "A", "B", "C")),
            chunk_size=self.chunk_size,
            D=tensors.get("D"),
            dt_bias=tensors.get("dt_bias"),
            dt_softplus=self.dt_softplus,
            dt_limit=self.dt_limit,
            initial_states=piece.entering,
            return_final_states=True,
            **packing,
        )
        return PieceResult(*found)

    def scout(self, kernel: RecurrentKernel, pieces: Sequence[PieceCall]) -> list[Scouted]:
        del kernel  # a decay a head needs none
        return [self._scouted(piece.tensors, leaves=piece.leaves) for piece in pieces]

    def _scouted(self, tensors: Tensors, *, leaves: bool) -> Scouted:
        step = self._steps(tensors)
        total = (step * tensors["A"].to(step.dtype)).cumsum(1)
        reads = total.exp()
        if not leaves:
            return Scouted(None, None, reads)
        to_the_end = (total[:, -1:] - total).exp() * step
        x = tensors["hidden_states"].to(step.dtype) * to_the_end[..., None]
        b = tensors["B"].to(step.dtype)
        left = torch.einsum("bngqp,bngs->bgqps", _by_group(x, b), b)
        return Scouted(left.flatten(1, 2), reads[:, -1], reads)

    def _steps(self, tensors: Tensors) -> Tensor:
        """dt as the function uses it, (b, n, h)."""
        dt = tensors["dt"]
        if "dt_bias" in tensors:
            dt = dt + tensors["dt_bias"].to(dt.dtype)
        if self.dt_softplus:
            dt = F.softplus(dt)
        return dt.clamp(*self.dt_limit).to(accumulator_dtype(dt.dtype))

    def reading_gradient(self, tensors: Tensors, reads: Tensor, grad_out: Tensor) -> Tensor:
        c = tensors["C"].to(reads.dtype)
        decayed = _by_group(grad_out.to(reads.dtype) * reads[..., None], c)
        return torch.einsum("bngqp,bngs->bgqps", decayed, c).flatten(1, 2)

    def shapes(self, tensors: Tensors) -> Shapes:
        h, p = tensors["hidden_states"].shape[2:]
        wide = accumulator_dtype(tensors["hidden_states"].dtype)
        state = (p, tensors["B"].shape[3])
        return Shapes(heads=h, out=(p,), state=state, transition=(), reads=(), reads_dtype=wide)


def _by_group(x: Tensor, shared: Tensor) -> Tensor:
    """(b, n, h, p) -> (b, n, g, h / g, p), as h / g heads share each of (b, n, g, s)."""
    groups = shared.shape[2]
    return x.view(*x.shape[:2], groups, x.shape[2] // groups, x.shape[3])


def rule_of(name: str, path: str, numbers: list[float]) -> Rule:
    """A rule from its class's name, its path and its numbers."""
    if name == "DeltaRule":
        return DeltaRule(function_at(path), bool(numbers[0]), path)
    chunk_size, dt_softplus, *limit = numbers
    return Mamba2(function_at(path), int(chunk_size), bool(dt_softplus), (limit[0], limit[1]), path)
