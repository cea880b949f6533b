"""What no backward needs is neither kept, nor computed, nor sent."""

from dataclasses import replace

import pytest
import torch
from oracle import Case, build, local_inputs
from ranks import Ranks
from torch import Tensor

from seqmesh import Schedule, SequenceMesh, attention, masks
from seqmesh.bench.memory import peak_bytes
from seqmesh.engine.call import Needs, Options, checked_call
from seqmesh.engine.exchange import CountBytes
from seqmesh.engine.ulysses import attend, attend_backward

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]


def gradients_of(case: Case, names: str) -> tuple[dict[str, Tensor], int]:
    """On one rank: gradients of some of q, k, v and s(inks), and the bytes that the backward sends."""
    schedule = build(case)
    (q, k, v), weights, sinks = local_inputs(case, schedule)
    tensors = dict(zip("qkvs", (q, k, v, sinks), strict=True))
    for name, x in tensors.items():
        x.requires_grad_(name in names)
    out = attention(q, k, v, schedule, sinks=sinks, head_chunks=case.head_chunks)
    with CountBytes() as counted:
        (out * weights).sum().backward()
    assert all((x.grad is not None) == (name in names) for name, x in tensors.items())
    return {name: x.grad for name, x in tensors.items() if name in names}, counted.bytes_sent


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("cross", [False, True], ids=["same rows", "keys on rows of their own"])
def test_the_gradients_that_are_wanted_are_the_same_whatever_is_frozen(
    ranks: Ranks, mesh: tuple[int, int], cross: bool
) -> None:
    mask = masks.cross(21, 34) if cross else masks.causal(37)
    case = Case(mask=mask, ulysses=mesh[0], ring=mesh[1], heads=5, kv_heads=5, sinks=True)
    case = replace(case, layout="contiguous" if cross else "zigzag", head_chunks=2)
    # With six chunks of heads those of one travel while another is computed.
    overlapped = replace(case, heads=6 * mesh[0], kv_heads=6 * mesh[0], head_chunks=6)
    for one in (case, overlapped):
        check_frozen(ranks, one)


def check_frozen(ranks: Ranks, case: Case) -> None:
    world = case.ulysses * case.ring
    everything = ranks.run(world, gradients_of, case, "qkvs")
    for names in ("q", "k", "v", "kv", "qs", "s", "qv"):
        for (want, most), (got, sent) in zip(
            everything, ranks.run(world, gradients_of, case, names), strict=True
        ):
            assert all(torch.equal(got[name], want[name]) for name in names)
            if names in ("q", "qs", "s") and most:
                assert sent < most


@pytest.mark.parametrize("mesh", [(1, 2), (1, 4), (2, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_without_a_gradient_of_keys_no_row_of_it_travels(ranks: Ranks, mesh: tuple[int, int]) -> None:
    """The backward then fetches K/V as the forward does, and sends home dq alone."""
    case = Case(mask=masks.causal(40), ulysses=mesh[0], ring=mesh[1], layout="zigzag", sinks=True)
    for rank in range(mesh[0] * mesh[1]):
        (_, sent) = ranks.run(mesh[0] * mesh[1], gradients_of, case, "q")[rank]
        heads, rows = ranks.run(mesh[0] * mesh[1], scheduled, case)[rank]
        assert sent == rows + heads


def scheduled(case: Case) -> tuple[int, int]:
    """Bytes of dout to the heads' owners and dq home, and of a forward's K/V rows."""
    schedule = build(case)
    traffic = schedule.traffic(
        batch=case.batch,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
    )
    # h = g: q, k, v and out (and dout, dq, dk, dv) are of one size.
    return traffic.heads_backward // 2, traffic.rows_forward


def memory_without_grad(case: Case) -> tuple[float, float]:
    """On one rank: extra memory of a forward that keeps nothing and of one that does, in q + k + v + out."""
    schedule = build(case)
    (q, k, v), _, _ = local_inputs(case, schedule)
    attention(q, k, v, schedule)  # once, so that caches and contexts are not counted
    box: list[Tensor] = []

    def without() -> None:
        with torch.no_grad():
            box.append(attention(q, k, v, schedule))

    unit = 4 * q.nbytes
    lean = min(peak_bytes(without) for _ in range(3))
    kept = min(peak_bytes(lambda: box.append(attention(q, k, v, schedule))) for _ in range(3))
    return (lean - q.nbytes) / unit, (kept - q.nbytes) / unit


@pytest.mark.parametrize("mesh", [(2, 1), (4, 1), (2, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_without_grad_nothing_is_kept(ranks: Ranks, mesh: tuple[int, int]) -> None:
    """Of eight chunks of heads one or two are there at a time, and nothing of those that are done."""
    u, r = mesh
    case = Case(mask=masks.full(128 * u * r), ulysses=u, ring=r, layout="contiguous", heads=32, kv_heads=32)
    case = replace(case, head_dim=256, dtype=torch.float32)
    for lean, kept in ranks.run(u * r, memory_without_grad, case):
        assert lean <= 0.6
        assert kept >= 1.0


def test_a_gradient_of_sinks_that_nobody_wants_is_not_computed() -> None:
    schedule = Schedule.build(masks.causal(16), SequenceMesh.build())
    q, k, v, grad = torch.randn(4, 1, 16, 2, 8)
    sinks = torch.randn(2)
    call = checked_call(q, k, v, sinks, schedule, Options(None, None, "cpu", None))
    saved = attend(q, k, v, sinks, call, keep=True).saved
    assert saved is not None
    wanted = attend_backward(grad, sinks, saved, call, Needs(q=True, kv=True, sinks=True))
    assert wanted[3] is not None
    assert attend_backward(grad, sinks, saved, call, Needs(q=True, kv=True, sinks=False))[3] is None


def test_frozen_inputs_keep_nothing_either() -> None:
    schedule = Schedule.build(masks.causal(16), SequenceMesh.build())
    q, k, v = torch.randn(3, 1, 16, 2, 8)
    out = attention(q, k, v, schedule)
    assert out.grad_fn is None
    assert not out.requires_grad
