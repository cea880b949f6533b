"""What moves: counted at the collective, equal to the schedule to the byte.

Buffers stay bounded whatever the mesh; unshard inverts shard.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from oracle import Case, build, local_inputs, mesh_of
from ranks import Ranks

from seqmesh import attention, masks
from seqmesh.bench.memory import peak_bytes
from seqmesh.engine.exchange import CountBytes, start_exchange
from seqmesh.masks import Band, Mask

MESHES = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (4, 2), (2, 4), (1, 8)]


class Counted(NamedTuple):
    """Bytes that one rank sends, at the collective and by the schedule."""

    forward: int
    forward_scheduled: int
    backward: int
    backward_scheduled: int


def count(cases: list[Case]) -> list[Counted]:
    """On one rank: bytes counted and scheduled, of each case."""
    return [_count_one(case) for case in cases]


def _count_one(case: Case) -> Counted:
    schedule = build(case)
    (q, k, v), weights, _ = local_inputs(case, schedule)
    with CountBytes() as forward:
        out = attention(q, k, v, schedule, head_chunks=case.head_chunks)
    with CountBytes() as backward:
        (out * weights).sum().backward()
    traffic = schedule.traffic(
        batch=case.batch,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        value_head_dim=case.value_head_dim,
    )
    return Counted(forward.bytes_sent, traffic.forward_bytes, backward.bytes_sent, traffic.backward_bytes)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
def test_bytes_counted_at_the_collective_are_the_schedules_bytes(ranks: Ranks, mesh: tuple[int, int]) -> None:
    u, r = mesh
    cross = Mask(30, 50, (Band(0, 30, 0, 50, lo=-20),))
    cases = []
    for mask, layout in (
        (masks.causal(64), "zigzag"),
        (masks.documents([9, 40, 4]), "auto"),
        (cross, "contiguous"),
    ):
        case = Case(mask=mask, ulysses=u, ring=r, layout=layout, batch=2)
        cases.append(replace(case, heads=8, kv_heads=8, dtype=torch.float32))
        cases.append(replace(case, heads=8, kv_heads=2, head_chunks=2, dtype=torch.bfloat16))
        cases.append(replace(case, heads=9, kv_heads=3, dtype=torch.float32, value_head_dim=5))
    total = 0
    for rank in ranks.run(u * r, count, cases):
        for counted in rank:
            assert counted.forward == counted.forward_scheduled
            assert counted.backward == counted.backward_scheduled
            total += counted.forward
    assert (total > 0) == (u * r > 1)


def test_pure_ulysses_moves_what_the_paper_says(ranks: Ranks) -> None:
    """Per rank and layer: e (2 + 2 g/h) (U - 1) / U each way, e = bytes of the local q."""
    case = Case(mask=masks.causal(64), ulysses=4, heads=8, kv_heads=4, dtype=torch.float32)
    e = 16 * 8 * case.head_dim * 4
    for (counted,) in ranks.run(4, count, [case]):
        assert counted.forward == counted.backward == e * (2 + 2 * 0.5) * 3 / 4


def test_causal_zigzag_moves_three_quarters_of_a_rotating_ring_forward(ranks: Ranks) -> None:
    """A rotating ring sends 2 (g/h) e (R - 1) per rank; here the ranks together send 3/4 of that."""
    case = Case(mask=masks.causal(64), ring=4, heads=4, kv_heads=2, layout="zigzag", dtype=torch.float32)
    e = 16 * 4 * case.head_dim * 4
    sent = [counted.forward for (counted,) in ranks.run(4, count, [case])]
    assert sum(sent) == 0.75 * 4 * (2 * 0.5 * e * 3)


def memory(case: Case) -> tuple[float, float]:
    """On one rank: peak extra memory of forward and of both passes, in units of its q + k + v + out."""
    schedule = build(case)
    (q, k, v), weights, _ = local_inputs(case, schedule)
    attention(q, k, v, schedule).backward(weights)  # once, so that caches and contexts are not counted
    inputs = q.nbytes + k.nbytes + v.nbytes
    found = []
    for _ in range(2):  # the lesser: gloo's thread may let go of a message a moment late
        q.grad = k.grad = v.grad = None
        outputs: list[torch.Tensor] = []
        forward = peak_bytes(partial(_run_into, outputs, lambda: attention(q, k, v, schedule)))
        out = outputs.pop().nbytes
        both = peak_bytes(lambda: attention(q, k, v, schedule).backward(weights))
        found.append(((forward - out) / (inputs + out), (both - out - inputs) / (inputs + out)))
    return min(forward for forward, _ in found), min(both for _, both in found)


def _run_into(results: list[torch.Tensor], run: Callable[[], torch.Tensor]) -> None:
    results.append(run())


FULL, CAUSAL = "full contiguous", "causal zigzag"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"),
    [(32, 32, torch.float32), (64, 64, torch.bfloat16), (256, 32, torch.bfloat16), (64, 16, torch.float32)],
    ids=["fp32", "bf16", "bf16, 8 queries a key", "fp32, 4 queries a key"],
)
@pytest.mark.parametrize(
    ("mask", "mesh"),
    [(FULL, (1, 1)), (FULL, (2, 1)), (FULL, (4, 1)), (FULL, (1, 4)), (CAUSAL, (2, 2)), (CAUSAL, (2, 4))],
    ids=lambda x: x if isinstance(x, str) else f"u{x[0]}r{x[1]}",
)
def test_buffers_stay_small_whatever_the_mesh_the_dtype_and_the_heads(
    ranks: Ranks, mesh: tuple[int, int], mask: str, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    """At most 1.5x q + k + v + out of the rank in the forward and 3x in both passes.

    Beyond inputs, output and gradients, and with what the forward leaves to the backward.
    """
    u, r = mesh
    rows = 64  # 2 MiB of K per rank where h = g: enough for every default chunk, and quick
    case = Case(
        mask=masks.causal(rows * u * r) if mask == CAUSAL else masks.full(rows * u * r),
        layout="zigzag" if mask == CAUSAL else "contiguous",
        ulysses=u,
        ring=r,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=256,
        dtype=dtype,
    )
    for forward, both in ranks.run(u * r, memory, case):
        assert 0 <= forward <= 1.5
        assert 0 <= both <= 3


def sent_bytes_after_wait(keep: bool) -> int:
    """On one of two ranks: bytes of the sent buffer that are left once the answer is there."""
    group = mesh_of(2, 1).ulysses_group
    assert group is not None
    pending = start_exchange(torch.ones(6), [3, 3], [3, 3], group, is_ours=not keep)
    assert pending.wait().tolist() == [1.0] * 6
    return pending.sent.untyped_storage().nbytes()


@pytest.mark.parametrize(("keep", "left"), [(False, 0), (True, 24)])
def test_a_sent_buffer_is_freed_when_the_answer_is_there(ranks: Ranks, keep: bool, left: int) -> None:
    """By hand: gloo's thread would hold it for a while, and memory would depend on when that lets go."""
    assert ranks.run(2, sent_bytes_after_wait, keep) == [left, left]


def unshard(case: Case) -> list[bool]:
    """On one rank: unshard inverts shard along any dim; its gradient is our part, or the sum over ranks."""
    schedule = build(case)
    s = case.mask.q_len
    checks = []
    x = torch.randn(3, s, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for dim in (0, 1, 2, -2):
        y = x.movedim(1, dim)
        checks.append(torch.equal(schedule.unshard(schedule.shard(y, dim), dim), y))
    checks.append(torch.equal(schedule.shard(torch.arange(s), 0), schedule.positions()))
    local = schedule.shard(x, 1).requires_grad_()
    weights = torch.randn_like(x)
    torch.distributed.broadcast(weights, 0)
    (schedule.unshard(local, 1) * weights).sum().backward()
    checks.append(torch.equal(local.grad, schedule.shard(weights, 1)))
    local.grad = None
    mine = float(schedule.mesh.rank + 1)
    (schedule.unshard(local, 1, reduce_grad=True) * weights * mine).sum().backward()
    total = sum(range(1, schedule.mesh.size + 1))
    checks.append(torch.allclose(local.grad, total * schedule.shard(weights, 1)))
    return checks


@pytest.mark.parametrize("mesh", MESHES[1:], ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "auto"])
def test_unshard_inverts_shard_and_has_the_gradient_it_promises(
    ranks: Ranks, mesh: tuple[int, int], layout: str
) -> None:
    for s in (0, 3, 29):
        case = Case(mask=masks.causal(s), ulysses=mesh[0], ring=mesh[1], layout=layout)
        assert all(all(checks) for checks in ranks.run(mesh[0] * mesh[1], unshard, case))
