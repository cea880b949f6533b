"""Recurrences on the heads of a rank of tp: outputs, gradients and what travels, fp64."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from meshes import mesh_of
from ranks import Ranks
from recurrences import problem
from test_recurrent import alone
from torch import Tensor

from seqmesh import Schedule, masks
from seqmesh.engine.exchange import CountBytes
from seqmesh.engine.recurrent.rules import Mamba2, Rule
from seqmesh.integrations.mixers import MixerFunction
from seqmesh.parallel import ParallelDims
from seqmesh.parallel.recurrent_heads import OwnHeads, _delta_rule, _scan

LENGTHS = [80, 3, 14]


def called(share: OwnHeads, rule: Rule, tensors: dict[str, Tensor], schedule: Schedule) -> Tensor:
    """As a mixer calls it."""
    kernel = MixerFunction(rule.function, rule.path)
    if not isinstance(rule, Mamba2):
        options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True, "schedule": schedule}
        return _delta_rule(share, kernel, **tensors, **options)[0]
    options = {"chunk_size": 16, "dt_softplus": rule.dt_softplus, "dt_limit": rule.dt_limit}
    return _scan(share, kernel, **tensors, **options, schedule=schedule)


def found(kind: str, heads: int, tp: int) -> tuple[float, int]:
    """The largest error of a rank, and the heads whose states it sent."""
    mesh = mesh_of(ParallelDims(tp=tp, ring=4 // tp))
    schedule = Schedule.build(masks.documents(LENGTHS), mesh.sequence, layout="zigzag")
    out, up, whole = alone(kind, LENGTHS, heads)
    rule, tensors = problem(kind, sum(LENGTHS), heads)
    own = {
        name: (schedule.shard(x, 1) if name in rule.by_token else x).clone().requires_grad_()
        for name, x in tensors.items()
    }
    share = OwnHeads.of(mesh.tp)
    with CountBytes() as sent:
        result = called(share, rule, own, schedule)
    result.backward(schedule.shard(up, 1))
    errors = [result - schedule.shard(out, 1)]
    for name, x in own.items():
        assert x.grad is not None
        if name in rule.by_token:
            errors.append(x.grad - schedule.shard(whole[name].grad, 1))
        else:
            dist.all_reduce(x.grad)  # parts over the ring, whole on each rank of tp
            errors.append(x.grad / tp - whole[name].grad)
    shapes = rule.shapes(tensors)
    numbers = (torch.Size(shapes.state).numel(), torch.Size(shapes.transition).numel())
    by_heads = {
        8 * 2 * schedule.chains.state_traffic(mesh.sequence.rank, h, *numbers).forward: h
        for h in (heads, heads // tp)
    }
    worst = max(x.detach().abs().max().item() for x in errors)
    return worst, by_heads[sent.bytes_sent]


@pytest.mark.parametrize("kind", ["delta", "kimi", "mamba2", "bare mamba2"])
@pytest.mark.parametrize(
    ("heads", "tp", "computed"),
    [
        (4, 2, 2),  # 2 groups of delta's and Mamba-2's heads: one a rank
        (12, 2, 6),  # 6 groups: three a rank
        (6, 2, None),  # 3 groups, which 2 ranks do not divide; Kimi's heads have no groups
        (3, 2, 3),
    ],
)
def test_a_rank_of_tp_computes_and_passes_its_own_heads(
    ranks: Ranks, kind: str, heads: int, tp: int, computed: int | None
) -> None:
    if heads == 3 and kind != "kimi":
        pytest.skip("3 heads in groups of 2")
    if computed is None:
        computed = 3 if kind == "kimi" else 6
    for error, sent in ranks.run(4, found, kind, heads, tp):
        assert error < 1e-10
        assert sent == computed


@pytest.mark.parametrize("kind", ["delta", "mamba2"])
def test_ranks_that_share_a_group_sum_its_gradients(ranks: Ranks, kind: str) -> None:
    # 2 groups of 2 heads, on 4 ranks of one head each
    for error, _ in ranks.run(4, found, kind, 4, 4):
        assert error < 1e-10
