"""shard_local: what each rank holds by one layout comes to the ranks that want it by another, and back."""

import pytest
import torch
from oracle import Case, build
from ranks import Ranks

from seqmesh import Schedule, SequenceMesh, layouts, masks
from seqmesh.engine.reshard import positions_of

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (2, 4)]
LAYOUTS = ["contiguous", "zigzag", "striped", "balanced"]


def resharded(case: Case, held: str) -> list[bool]:
    """On one rank: its tokens are those of `shard`, and gradients come back where tokens came from."""
    schedule = build(case)
    mesh = schedule.mesh
    layout = layouts.named(held, case.mask, case.mask.q_len, case.ring)
    mine = positions_of(layout, mesh.ulysses, mesh.ring_rank, mesh.ulysses_rank)
    make = torch.Generator().manual_seed(0)
    x, weights = torch.randn(2, 3, case.mask.q_len, 2, generator=make, dtype=torch.float64)
    checks = []
    for dim in (0, 1, -1):
        whole, loss_weights = x.movedim(1, dim), weights.movedim(1, dim)
        local = whole.index_select(dim, mine).requires_grad_()
        got = schedule.shard_local(local, dim, held)
        checks.append(torch.equal(got, schedule.shard(whole, dim)))
        (got * schedule.shard(loss_weights, dim)).sum().backward()
        checks.append(torch.equal(local.grad, loss_weights.index_select(dim, mine)))
    checks.append(torch.equal(schedule.shard_local(mine, 0, layout), schedule.positions()))
    return checks


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("held", LAYOUTS)
def test_tokens_held_by_any_layout_come_to_any_other(ranks: Ranks, held: str, mesh: tuple[int, int]) -> None:
    u, r = mesh
    for s in (0, 3, 41):
        for layout in LAYOUTS:
            case = Case(mask=masks.causal(s), ulysses=u, ring=r, layout=layout)
            assert all(all(checks) for checks in ranks.run(u * r, resharded, case, held))


def test_what_is_held_otherwise_than_said_is_refused() -> None:
    schedule = Schedule.build(masks.causal(8), SequenceMesh.build())
    with pytest.raises(ValueError, match="must hold the 8 tokens that the layout 'contiguous' gives rank 0"):
        schedule.shard_local(torch.zeros(1, 7), 1)
    with pytest.raises(ValueError, match=r"held by a layout of 9 tokens for ring=1, the schedule is of 8"):
        schedule.shard_local(torch.zeros(1, 9), 1, layouts.contiguous(9, 1))
