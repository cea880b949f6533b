"""The verdict on one case: its errors in units of what one device gets wrong, and the limit they must keep.

    error       over rows of d numbers, the largest |got - oracle| / the largest |oracle|
    ratio       error / max(error of one device, rounding floor)            at most LIMIT

LIMIT is 4 because a mesh may round four times where one device rounds once: a block's gradient when the
kernel returns it, their sum when it travels along the ring, again when ulysses ranks that share a K/V head
send it home, and the sum of all when it is returned. All in the inputs' dtype; what adds them up is fp32.

The floor is what one device gets wrong at least, should it be lucky in this case: one rounding of the result
in half precisions, whose sums are fp32. In fp32 and fp64 it is four for the output (product, exponential,
sum, division) and eight for gradients, which go through two more products, a difference and a sum; a softcap
doubles both (division, tanh, product, slope).

An error of rows, not of single numbers, since the worst of thousands of numbers is a matter of luck; and the
worst row, not the mean of all, since one row off by one key must not drown in the others.
"""

from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from seqmesh.verify.cases import AttentionCase
from seqmesh.verify.oracle import DTYPES, Results

LIMIT = 4.0
LUCK = 16.0
"""One device further off than this many floors is no yardstick: then the case fails."""


@dataclass(frozen=True, kw_only=True)
class TensorError:
    """Output or a gradient, relative to its largest row."""

    ours: float
    one_device: float
    floor: float

    @property
    def ratio(self) -> float:
        """Ours in units of one device's; infinite if ours is no number."""
        ratio = self.ours / max(self.one_device, self.floor)
        return ratio if ratio == ratio else inf


@dataclass(frozen=True, kw_only=True)
class CaseOutcome:
    """What became of a case."""

    case: AttentionCase
    errors: dict[str, TensorError]
    """By tensor; empty if the case came to no end."""
    failure: str | None = None
    """An error that was raised, or a rule that was broken, in one line."""

    @property
    def worst(self) -> str | None:
        """The tensor with the largest ratio."""
        return max(self.errors, key=lambda name: self.errors[name].ratio, default=None)

    @property
    def ratio(self) -> float:
        """The largest ratio; infinite if the case came to no end."""
        return inf if self.worst is None else self.errors[self.worst].ratio

    @property
    def ok(self) -> bool:
        """Whether the case passes."""
        return self.failure is None and self.ratio <= LIMIT


def floor_of(case: AttentionCase, name: str) -> float:
    """The rounding floor of a tensor."""
    dtype = DTYPES[case.dtype]
    rounding = torch.finfo(dtype).eps / 2
    if dtype.itemsize == 2:
        return rounding
    roundings = 4 if name == "out" else 8
    return rounding * roundings * (1 if case.softcap is None else 2)


def judge(case: AttentionCase, got: Results, one: Results, oracle: Results) -> CaseOutcome:
    """Compare every tensor."""
    errors: dict[str, TensorError] = {}
    for name, right in oracle.items():
        if got[name].shape != right.shape:
            return CaseOutcome(case=case, errors={}, failure=f"{name} has shape {tuple(got[name].shape)}")
        if right.numel():
            # Where terms cancel, their rounding stays. Those of dq and dk grow with the head dim of v.
            least = sqrt(right.shape[-1] if name == "dsinks" else oracle["out"].shape[-1])
            ours = row_error(got[name], right, least)
            theirs = row_error(one[name], right, least)
            errors[name] = TensorError(ours=ours, one_device=theirs, floor=floor_of(case, name))
    return CaseOutcome(case=case, errors=errors, failure=_misfit(case, got, one) or _no_yardstick(errors))


def row_error(got: Tensor, right: Tensor, least: float) -> float:
    """Of the worst row, relative to the largest, or to a row of `least`; rows lie along the last dim."""
    largest = max(float(right.norm(dim=-1).max()), least)
    return float((got.double() - right).norm(dim=-1).max()) / largest


def _misfit(case: AttentionCase, got: Results, one: Results) -> str | None:
    """Dtypes other than one device's: inputs' for gradients; the output's, which an autocast changes."""
    for name, x in got.items():
        if x.dtype != one[name].dtype:
            return f"{name} is {x.dtype}, of one device {one[name].dtype} ({case.mode})"
    return None


def _no_yardstick(errors: dict[str, TensorError]) -> str | None:
    for name, error in errors.items():
        if not error.one_device <= LUCK * error.floor:
            return f"one device is off by {error.one_device:.1e} in {name}, which is no yardstick"
    return None
