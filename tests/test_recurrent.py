"""Recurrences over sharded sequences: outputs, gradients and bytes against one rank, token by token, fp64."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import mesh_of
from ranks import Ranks
from recurrences import convolution, problem
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from seqmesh import Schedule, masks
from seqmesh.engine.exchange import CountBytes
from seqmesh.engine.recurrent.convolution import convolve
from seqmesh.engine.recurrent.kernels import PieceCall
from seqmesh.engine.recurrent.layers import recur
from seqmesh.engine.recurrent.rules import Rule

KINDS = ["delta", "kimi", "mamba2", "bare mamba2"]
DOCUMENTS = [[97], [40, 3, 1, 30, 2, 21], [5, 60, 32]]
MESHES = [("zigzag", 1, 4), ("balanced", 1, 4), ("contiguous", 1, 4), ("zigzag", 2, 2), ("auto", 4, 1)]


def alone(
    kind: str, lengths: list[int], heads: int, dim: int = 4
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Output, its gradient, and the inputs with theirs, of each document by itself."""
    rule, tensors = problem(kind, sum(lengths), heads, dim=dim)
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    ends = [0, *itertools.accumulate(lengths)]
    outs = []
    for start, stop in itertools.pairwise(ends):
        piece = {name: x[:, start:stop] if name in rule.by_token else x for name, x in tensors.items()}
        outs.append(rule.call(rule.function, PieceCall(piece, None, leaves=False)).out)
    out = torch.cat(outs, 1)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    out.backward(up)
    return out.detach(), up, tensors


def errors(
    kind: str,
    lengths: list[int],
    layout: str,
    ulysses: int,
    ring: int,
    heads: int = 6,
    way: Callable[..., torch.Tensor] = recur,
) -> float:
    """The largest error on any rank; and bytes are as predicted."""
    mesh = mesh_of(ulysses, ring)
    schedule = Schedule.build(masks.documents(lengths), mesh, layout=layout)
    out, up, whole = alone(kind, lengths, heads)
    rule, tensors = problem(kind, sum(lengths), heads)
    own = {
        name: (schedule.shard(x, 1) if name in rule.by_token else x).clone().requires_grad_()
        for name, x in tensors.items()
    }
    with CountBytes() as forward:
        found = way(rule, own, schedule)
    with CountBytes() as backward:
        found.backward(schedule.shard(up, 1))
    worst = [(found - schedule.shard(out, 1)).detach()]
    for name, x in own.items():
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        if name in rule.by_token:
            worst.append(grad - schedule.shard(whole[name].grad, 1))
        else:
            dist.all_reduce(grad)
            worst.append(grad - whole[name].grad)
    shapes = rule.shapes(tensors)
    numbers = (torch.Size(shapes.state).numel(), torch.Size(shapes.transition).numel())
    predicted = schedule.chains.state_traffic(mesh.rank, shapes.heads, *numbers)
    assert (forward.bytes_sent, backward.bytes_sent) == tuple(8 * 2 * count for count in predicted)
    most = torch.stack([x.abs().max() if x.numel() else x.new_zeros(()) for x in worst]).max()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh[0]}-u{mesh[1]}r{mesh[2]}")
@pytest.mark.parametrize("kind", KINDS)
def test_a_recurrence_equals_one_rank_forward_and_backward(
    ranks: Ranks, kind: str, mesh: tuple[str, int, int]
) -> None:
    for lengths in DOCUMENTS:
        assert max(ranks.run(4, errors, kind, lengths, *mesh)) < 1e-10, lengths


EIGHT = [("zigzag", 1, 8), ("balanced", 2, 4), ("contiguous", 4, 2), ("contiguous", 8, 1)]


@pytest.mark.parametrize("mesh", EIGHT, ids=lambda mesh: f"{mesh[0]}-u{mesh[1]}r{mesh[2]}")
@pytest.mark.parametrize("kind", KINDS)
def test_eight_ranks_equal_one_with_fewer_heads_than_ranks(
    ranks: Ranks, kind: str, mesh: tuple[str, int, int]
) -> None:
    for lengths in ([97], [40, 3, 1, 30, 2, 21], [1] * 11, [5]):
        assert max(ranks.run(8, errors, kind, lengths, *mesh)) < 1e-10, lengths


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_without_tokens_and_heads_fewer_than_ranks(ranks: Ranks, kind: str) -> None:
    assert max(ranks.run(4, errors, kind, [3], "zigzag", 1, 4)) < 1e-10
    assert max(ranks.run(4, errors, kind, [50, 9], "zigzag", 2, 2, 2)) < 1e-10


def selectively(rule: Rule, tensors: dict[str, torch.Tensor], schedule: Schedule) -> torch.Tensor:
    """In a checkpoint that keeps the recurrence's results: nothing is exchanged again."""
    kept = torch.ops.seqmesh.recurrence.default

    def policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is kept else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(*given: torch.Tensor) -> torch.Tensor:
        return recur(rule, dict(zip(tensors, given, strict=True)), schedule) * 1.0

    contexts = partial(create_selective_checkpoint_contexts, policy)
    out: torch.Tensor = checkpoint(layer, *tensors.values(), use_reentrant=False, context_fn=contexts)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_keeps_a_recurrence_exchanges_nothing_again(ranks: Ranks, kind: str) -> None:
    for lengths in DOCUMENTS:
        assert max(ranks.run(4, errors, kind, lengths, "zigzag", 2, 2, 6, selectively)) < 1e-10, lengths
    assert max(ranks.run(4, errors, kind, [3], "zigzag", 1, 4, 6, selectively)) < 1e-10


def convolution_errors(lengths: list[int], layout: str, ulysses: int, ring: int, width: int = 3) -> float:
    """The largest error of a convolution on any rank; and bytes are as predicted."""
    s, b, c = sum(lengths), 2, 7
    mesh = mesh_of(ulysses, ring)
    schedule = Schedule.build(masks.documents(lengths), mesh, layout=layout)
    made = torch.Generator().manual_seed(s)
    shapes = {"x": (b, c, s), "weight": (c, width + 1), "bias": (c,), "up": (b, c, s)}
    whole = {name: torch.randn(shape, generator=made, dtype=torch.float64) for name, shape in shapes.items()}
    up = whole.pop("up")
    own = {name: (schedule.shard(x, 2) if name == "x" else x).clone() for name, x in whole.items()}
    for x in (*whole.values(), *own.values()):
        x.requires_grad_()
    parts = [convolution(x, whole["weight"], whole["bias"], "silu") for x in whole["x"].split(lengths, 2)]
    out = torch.cat(parts, 2)
    out.backward(up)
    with CountBytes() as forward:
        found = convolve(convolution, own["x"], own["weight"], own["bias"], "silu", schedule)
    with CountBytes() as backward:
        found.backward(schedule.shard(up, 2))
    worst = [(found - schedule.shard(out, 2)).detach(), own["x"].grad - schedule.shard(whole["x"].grad, 2)]
    for name in ("weight", "bias"):
        dist.all_reduce(own[name].grad)
        worst.append(own[name].grad - whole[name].grad)
    predicted = schedule.chains.halo_traffic(mesh.rank, width)
    assert (forward.bytes_sent, backward.bytes_sent) == tuple(8 * b * c * rows for rows in predicted)
    return max(x.abs().max().item() for x in worst if x.numel())


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh[0]}-u{mesh[1]}r{mesh[2]}")
def test_a_short_convolution_equals_one_rank_forward_and_backward(
    ranks: Ranks, mesh: tuple[str, int, int]
) -> None:
    for lengths in DOCUMENTS:
        assert max(ranks.run(4, convolution_errors, lengths, *mesh)) < 1e-12, lengths


@pytest.mark.parametrize("mesh", EIGHT, ids=lambda mesh: f"{mesh[0]}-u{mesh[1]}r{mesh[2]}")
def test_a_short_convolution_on_eight_ranks_equals_one(ranks: Ranks, mesh: tuple[str, int, int]) -> None:
    for lengths in ([97], [40, 3, 1, 30, 2, 21], [1] * 11):
        assert max(ranks.run(8, convolution_errors, lengths, *mesh)) < 1e-12, lengths


def test_a_halo_may_come_from_several_ranks_and_be_cut_short(ranks: Ranks) -> None:
    assert max(ranks.run(4, convolution_errors, [6], "zigzag", 1, 4)) < 1e-12
    assert max(ranks.run(4, convolution_errors, [3, 4, 2], "contiguous", 2, 2, 5)) < 1e-12
    assert max(ranks.run(4, convolution_errors, [9], "contiguous", 1, 4, 0)) < 1e-12
