"""Which kernel computes a recurrence, and how many pieces it takes in a call.

    auto    fla (delta rules, CUDA)  ->  mamba_ssm (Mamba-2, CUDA)  ->  model

`model` is the function that the model calls itself, a call for each piece. The others are of packages that
are used where they are installed: their variable-length forms take all pieces of a phase in one call. As for
attention (engine/kernels) the first that refuses nothing is taken, and one that is asked for by name says why
it refuses. The calls of packages are tested with stand-ins of the same form; on a GPU `fla` has run, of which
docs/gpu.md tells, and `mamba_ssm` has not.

Legend: b batch, n tokens of a piece, m of all pieces, P pieces, h heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from seqmesh.engine.kernels import choose

Tensors = Mapping[str, Tensor]
"""Of one piece, or of all rows: by the names of the function's arguments."""

Function = Callable[..., tuple[Tensor, Tensor]]
"""A recurrence on one rank: outputs (b, n, h, ...) and the final state (b, h, ...)."""


@dataclass(frozen=True, kw_only=True)
class RecurrentProblem:
    """What a kernel is asked to support."""

    recurrence: str
    """GATED_DELTA_RULE, KIMI_DELTA_ATTENTION or MAMBA2."""
    device_type: str
    dtype: torch.dtype
    head_dim: int
    """Of keys, or the state size of Mamba-2."""


GATED_DELTA_RULE = "gated delta rule"
KIMI_DELTA_ATTENTION = "Kimi delta attention"
MAMBA2 = "Mamba-2"


class PieceCall(NamedTuple):
    """A piece to compute."""

    tensors: Tensors
    entering: Tensor | None
    """(b, h, ...) the state that enters; None for zero."""
    leaves: bool
    """Whether the state that leaves is used."""


class PieceResult(NamedTuple):
    """What comes of it."""

    out: Tensor
    """(b, n, h, ...)"""
    left: Tensor | None
    """(b, h, ...); None, or anything, if the call said that it is not used."""


class Callee(Protocol):
    """A rule, as a kernel needs it."""

    by_token: ClassVar[tuple[str, ...]]

    @property
    def function(self) -> Function:
        """The model's own."""
        ...

    def problem(self, tensors: Tensors) -> RecurrentProblem:
        """What a kernel must support."""
        ...

    def call(self, function: Function, piece: PieceCall, **packing: Tensor) -> PieceResult:
        """Call a function with a piece's tensors and the rule's options."""
        ...


class RecurrentKernel(Protocol):
    """What computes pieces. Stateless."""

    name: str
    """How users ask for it."""

    def refusal(self, problem: RecurrentProblem) -> str | None:
        """Why it cannot compute a problem, or None if it can."""
        ...

    def compute(self, rule: Callee, calls: Sequence[PieceCall]) -> list[PieceResult]:
        """Outputs and final states, differentiable but for the entering states."""
        ...


class ModelKernel:
    """The model's own function, once for each piece."""

    name = "model"

    def refusal(self, problem: RecurrentProblem) -> str | None:
        """It is the last resort."""
        del problem
        return None

    def compute(self, rule: Callee, calls: Sequence[PieceCall]) -> list[PieceResult]:
        """As the protocol says."""
        return [rule.call(rule.function, call) for call in calls]


class FlaKernel:
    """flash-linear-attention: pieces as sequences of one call, each with its entering and its leaving state.

    Source: fla.ops, version 0.6.0; `cu_seqlens` wants a batch of one, so batches are laid out one after the
    other.
    """

    name = "fla"
    _paths: ClassVar[dict[str, str]] = {
        GATED_DELTA_RULE: "fla.ops.gated_delta_rule:chunk_gated_delta_rule",
        KIMI_DELTA_ATTENTION: "fla.ops.kda:chunk_kda",
    }

    def refusal(self, problem: RecurrentProblem) -> str | None:
        """It knows delta rules, of head dims up to 256."""
        if problem.recurrence not in self._paths:
            return f"it computes delta rules, not {problem.recurrence}"
        if problem.head_dim > 256:
            return f"head dim {problem.head_dim} is more than 256"
        return _refusal_of_gpu_kernels(problem, "fla", "flash-linear-attention")

    def compute(self, rule: Callee, calls: Sequence[PieceCall]) -> list[PieceResult]:
        """As the protocol says."""
        if not calls:
            return []
        function = function_at(self._paths[rule.problem(calls[0].tensors).recurrence])
        pieces = PackedPieces.of(rule.by_token, calls)
        out, left = rule.call(function, pieces.call, cu_seqlens=pieces.cu_seqlens())
        assert left is not None
        return [PieceResult(*pair) for pair in zip(pieces.rows_of(out), pieces.states_of(left), strict=True)]


class MambaKernel:
    """mamba_ssm: whole documents in one call, told apart by `seq_idx`; other pieces one by one.

    Its form with a state for each sequence has no backward.

    Source: mamba_ssm.ops.triton.ssd_combined.
    """

    name = "mamba_ssm"
    _path = "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined"

    def refusal(self, problem: RecurrentProblem) -> str | None:
        """It knows Mamba-2's scan, of state sizes up to 256."""
        if problem.recurrence != MAMBA2:
            return f"it computes Mamba-2, not a {problem.recurrence}"
        if problem.head_dim > 256:
            return f"state size {problem.head_dim} is more than 256"
        return _refusal_of_gpu_kernels(problem, "mamba_ssm", "mamba-ssm")

    def compute(self, rule: Callee, calls: Sequence[PieceCall]) -> list[PieceResult]:
        """As the protocol says."""
        function = function_at(self._path)
        done, whole = {}, {}
        for i, call in enumerate(calls):
            if call.entering is None and not call.leaves:
                whole[i] = call
            else:
                done[i] = rule.call(function, call)
        if whole:
            pieces = PackedPieces.of(rule.by_token, list(whole.values()))
            outs = rule.call(function, pieces.in_batch(), seq_idx=pieces.numbers()).out
            parts = zip(whole, outs.split(pieces.lengths, 1), strict=True)
            done |= {i: PieceResult(out, None) for i, out in parts}
        return [done[i] for i in range(len(calls))]


@dataclass(frozen=True)
class PackedPieces:
    """Pieces one after the other, of every sequence of the batch."""

    joined: Tensors
    """(b, m, ...) of what has rows."""
    by_token: tuple[str, ...]
    states: Tensor | None
    """(b, P, h, ...) that enter; None if all are zero."""
    lengths: tuple[int, ...]

    @staticmethod
    def of(by_token: tuple[str, ...], calls: Sequence[PieceCall]) -> "PackedPieces":
        """Of at least one call."""
        first = calls[0].tensors
        joined = {
            name: torch.cat([call.tensors[name] for call in calls], 1) if name in by_token else x
            for name, x in first.items()
        }
        known = next((call.entering for call in calls if call.entering is not None), None)
        states = None
        if known is not None:
            zero = torch.zeros_like(known)
            found = [zero if call.entering is None else call.entering for call in calls]
            states = torch.stack(found, 1)
        lengths = tuple(call.tensors[by_token[0]].shape[1] for call in calls)
        return PackedPieces(joined, by_token, states, lengths)

    @property
    def _like(self) -> Tensor:
        """(b, m, ...)"""
        return self.joined[self.by_token[0]]

    @property
    def call(self) -> PieceCall:
        """As one sequence, (1, b m, ...), with states (b P, h, ...)."""
        tensors = {
            name: x.flatten(0, 1)[None] if name in self.by_token else x for name, x in self.joined.items()
        }
        return PieceCall(tensors, None if self.states is None else self.states.flatten(0, 1), leaves=True)

    def in_batch(self) -> PieceCall:
        """As the sequences of the batch, (b, m, ...), with no states."""
        return PieceCall(self.joined, None, leaves=False)

    def cu_seqlens(self) -> Tensor:
        """(b P + 1,) where the pieces of `call` end."""
        return _ends(self.lengths * self._like.shape[0], self._like.device)

    def numbers(self) -> Tensor:
        """(b, m) the piece of each token of `in_batch`."""
        return _numbers(self.lengths, self._like.shape[0], self._like.device)

    def rows_of(self, out: Tensor) -> Sequence[Tensor]:
        """(1, b m, h, ...) -> (b, n, h, ...) of each piece."""
        found: tuple[Tensor, ...] = out.view(self._like.shape[0], -1, *out.shape[2:]).split(self.lengths, 1)
        return found

    def states_of(self, left: Tensor) -> Sequence[Tensor]:
        """(b P, h, ...) -> (b, h, ...) of each piece."""
        return left.view(self._like.shape[0], len(self.lengths), *left.shape[1:]).unbind(1)


@lru_cache(maxsize=64)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, as all layers have the same: fla looks once at what a tensor holds, for which a GPU waits."""
    with torch.inference_mode(False):  # or no backward could use it
        return torch.tensor(list(accumulate(lengths, initial=0)), device=device)


@lru_cache(maxsize=16)
def _numbers(lengths: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        found = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
        return found.to(device).expand(batch, -1).contiguous()


def _refusal_of_gpu_kernels(problem: RecurrentProblem, module: str, distribution: str) -> str | None:
    """What the kernels of both packages refuse."""
    if problem.device_type != "cuda":
        return f"it runs on cuda, not on {problem.device_type}"
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {problem.dtype} is not float32, float16 or bfloat16"
    return None if _is_installed(module) else f"{distribution} is not installed"


@lru_cache(maxsize=8)
def _is_installed(module: str) -> bool:
    return find_spec(module) is not None


@lru_cache(maxsize=64)
def function_at(path: str) -> Callable[..., Any]:
    """The function of "module:name"."""
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


KERNELS: tuple[RecurrentKernel, ...] = (FlaKernel(), MambaKernel(), ModelKernel())
"""Those that "auto" tries, in this order."""


def chosen(kernel: str | RecurrentKernel, problem: RecurrentProblem) -> RecurrentKernel:
    """The kernel to use.

    Args:
        kernel: "auto", a name of `KERNELS`, or a kernel of your own.
        problem: what it must support.

    Raises:
        ValueError: as `choose`.
    """
    return choose(kernel, problem, automatic=KERNELS, known=KERNELS)
