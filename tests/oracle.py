"""The oracle: dense attention in fp64 under autograd, on one device, straight from the definition."""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqmesh import Schedule, SequenceMesh, attention, layouts
from seqmesh.engine.kernels import Kernel
from seqmesh.layouts import Layout
from seqmesh.masks import Mask
from seqmesh.schedule import Stages


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention problem on a mesh."""

    mask: Mask
    ulysses: int = 1
    ring: int = 1
    layout: str | Layout = "auto"
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    value_head_dim: int | None = None
    batch: int = 1
    dtype: torch.dtype = torch.float64
    kernel: str | Kernel = "auto"
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    stages: Stages = None
    head_chunks: int | None = None
    strided: bool = False
    seed: int = 0
    logit_scale: float = 1.0
    own_keys: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """Global output and gradients."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor | None


class Inputs(NamedTuple):
    """What a case is computed from: global tensors."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    """Of the outputs in the loss."""
    sinks: Tensor | None


def inputs(case: Case) -> Inputs:
    """Global q, k, v, weights of the loss, and sinks: fp64, but exactly representable in the case's dtype."""
    make = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64).to(case.dtype).double()

    b, d = case.batch, case.head_dim
    q = normal(b, case.mask.q_len, case.heads, d) * case.logit_scale
    k = normal(b, case.mask.k_len, case.kv_heads, d)
    e = case.value_head_dim or d
    v = normal(b, case.mask.k_len, case.kv_heads, e)
    weights = normal(b, case.mask.q_len, case.heads, e)
    sinks = normal(case.heads) if case.sinks else None
    return Inputs(q, k, v, weights, sinks)


def dense(case: Case) -> Result:
    """The answer, in fp64, from the definition of masked softmax attention."""
    q, k, v, weights, sinks = inputs(case)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks) if x is not None]
    repeat = case.heads // case.kv_heads
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(repeat, 2)) * scale
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    allowed = torch.from_numpy(case.mask.dense())
    logits = logits.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks[None, :, None, None].expand(*logits.shape[:3], 1)), -1)
    empty = ~allowed.any(1)
    if sinks is None:  # softmax of a row of -inf is NaN: such a row is 0 by definition
        logits = logits.masked_fill(empty[:, None], 0.0)
    weights_of_keys = logits.softmax(-1)[..., : case.mask.k_len].masked_fill(empty[:, None], 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights_of_keys, v.repeat_interleave(repeat, 2))
    grads = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
    return Result(
        out=out.detach(),
        dq=grads[0],
        dk=grads[1],
        dv=grads[2],
        dsinks=grads[3] if sinks is not None else None,
    )


def local_inputs(case: Case, schedule: Schedule) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """This rank's q, k, v (leaves), weights and sinks (leaf)."""
    q, k, v, weights, sinks = inputs(case)
    local = [schedule.shard(q, 1), schedule.shard(k, 1, keys=True), schedule.shard(v, 1, keys=True)]
    if case.strided:  # the same values in a transposed, gappy memory layout
        local = [torch.stack((x, x), -1).transpose(0, 1).contiguous()[..., 0].transpose(0, 1) for x in local]
    local = [x.to(case.dtype).detach().requires_grad_() for x in local]
    return (
        local,
        schedule.shard(weights, 1).to(case.dtype),
        None if sinks is None else sinks.to(case.dtype).requires_grad_(),
    )


@cache
def mesh_of(ulysses: int, ring: int) -> SequenceMesh:
    """One mesh per shape and process: making process groups is slow, and they are never freed."""
    return SequenceMesh.build(ulysses=ulysses, ring=ring)


def build(case: Case) -> Schedule:
    """The schedule of a case on the default process group."""
    mesh = mesh_of(case.ulysses, case.ring)
    own_keys = case.mask.q_len != case.mask.k_len or case.own_keys
    kv_layout = layouts.contiguous(case.mask.k_len, case.ring) if own_keys else None
    return Schedule.build(case.mask, mesh, case.layout, kv_layout=kv_layout, stages=case.stages)


def attend(cases: list[Case]) -> list[dict[str, Any]]:
    """On one rank: the local output and gradients of each case, with the positions they belong to."""
    return [_attend_one(case) for case in cases]


def _attend_one(case: Case) -> dict[str, Any]:
    schedule = build(case)
    (q, k, v), weights, sinks = local_inputs(case, schedule)
    out = attention(
        q, k, v, schedule, case.scale, case.softcap, sinks, case.kernel, head_chunks=case.head_chunks
    )
    (out * weights).sum().backward()
    assert out.dtype == q.grad.dtype == k.grad.dtype == v.grad.dtype == case.dtype
    tensors = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    parts: dict[str, Any] = {name: x.double().numpy() for name, x in tensors.items()}
    parts["q_at"] = schedule.positions().numpy()
    parts["k_at"] = schedule.positions(keys=True).numpy()
    parts["dsinks"] = None if sinks is None else sinks.grad.double().numpy()
    return parts


def assemble(case: Case, parts: list[dict[str, Any]]) -> Result:
    """The global result from every rank's local one."""

    def gather(name: str, where: str, like: tuple[int, ...]) -> Tensor:
        whole = torch.full(like, torch.nan, dtype=torch.float64)
        for part in parts:
            whole[:, torch.from_numpy(part[where])] = torch.from_numpy(part[name])
        return whole

    e = case.value_head_dim or case.head_dim
    q_shape = (case.batch, case.mask.q_len, case.heads, case.head_dim)
    k_shape = (case.batch, case.mask.k_len, case.kv_heads, case.head_dim)
    return Result(
        out=gather("out", "q_at", (*q_shape[:3], e)),
        dq=gather("dq", "q_at", q_shape),
        dk=gather("dk", "k_at", k_shape),
        dv=gather("dv", "k_at", (*k_shape[:3], e)),
        dsinks=sum(torch.from_numpy(part["dsinks"]) for part in parts) if case.sinks else None,
    )


# Largest error allowed, relative to the largest entry of the oracle's tensor.
# fp64 and fp32: rounding of sums of a few hundred terms. Half precisions: one rounding of the result
# (2^-9, 2^-12) and those of partial results; inputs are exact.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def errors(got: Result, want: Result) -> dict[str, float]:
    """Largest error of output and of each gradient, relative to the largest entry of the oracle's."""
    found = {}
    for name in ("out", "dq", "dk", "dv", "dsinks"):
        a, b = getattr(got, name), getattr(want, name)
        if b is None:
            assert a is None
        elif b.numel():
            # Terms are of order 1: where they cancel, their rounding stays.
            scale = max(b.abs().max().item(), 1.0)
            found[name] = (a - b).abs().max().item() / scale
    return found


def compare(case: Case, got: Result, want: Result) -> None:
    """Fail unless output and every gradient agree."""
    for name, error in errors(got, want).items():
        assert error <= TOLERANCE[case.dtype], f"{name} is off by {error:.2e} of its largest entry in {case}"
