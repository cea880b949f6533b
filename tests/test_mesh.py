"""Meshes: a view of any DeviceMesh, several in one process, each with groups and right answers of its own."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import Case, assemble, compare, dense, local_inputs
from ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh

from seqmesh import Schedule, SequenceMesh, attention, masks
from seqmesh.engine.kernels import LogitRule, Problem, select
from seqmesh.masks import Band


def run_on(mesh: SequenceMesh, case: Case) -> dict[str, Any]:
    """Output and gradients of a case on a mesh, in the form `assemble` takes."""
    schedule = Schedule.build(case.mask, mesh, case.layout)
    (q, k, v), weights, _ = local_inputs(case, schedule)
    out = attention(q, k, v, schedule)
    (out * weights).sum().backward()
    parts = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    parts |= {"q_at": schedule.positions(), "k_at": schedule.positions()}
    return {name: x.numpy() for name, x in parts.items()}


def data_parallel_sequences() -> tuple[int, dict[str, Any]]:
    """On one of 8 ranks: dp 2 x ring 2 x ulysses 2, each replica with a problem of its own."""
    device_mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "ring", "ulysses"))
    mesh = SequenceMesh.from_device_mesh(device_mesh)
    assert (mesh.ulysses, mesh.ring, mesh.size) == (2, 2, 4)
    replica = device_mesh.get_local_rank("dp")
    return replica, run_on(mesh, Case(mask=masks.causal(30 + replica), seed=replica))


def test_replicas_of_a_larger_mesh_attend_to_their_own_sequence(ranks: Ranks) -> None:
    results = ranks.run(8, data_parallel_sequences)
    for replica in (0, 1):
        case = Case(mask=masks.causal(30 + replica), seed=replica)
        compare(case, assemble(case, [parts for which, parts in results if which == replica]), dense(case))


def two_meshes() -> list[dict[str, Any]]:
    """On one of 4 ranks: two meshes used in turn; one axis named by the user; one axis left out."""
    shapes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    first = SequenceMesh.from_device_mesh(shapes, ulysses="inner", ring="outer")
    second = SequenceMesh.build(ulysses=4)
    third = SequenceMesh.from_device_mesh(shapes["inner"], ulysses=None, ring="inner")
    assert (third.ring, third.ulysses, third.size) == (2, 1, 2)
    case = Case(mask=masks.documents([12, 21]))
    return [run_on(mesh, case) for mesh in (first, second, first, third)]


def test_several_meshes_live_in_one_process(ranks: Ranks) -> None:
    results = ranks.run(4, two_meshes)
    case = Case(mask=masks.documents([12, 21]))
    for n in range(4):
        compare(case, assemble(case, [rank[n] for rank in results]), dense(case))


def bad_axes() -> bool:
    device_mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ulysses", "ring"))
    with pytest.raises(ValueError, match="none is called 'cp'; name an axis of the mesh"):
        SequenceMesh.from_device_mesh(device_mesh, ring="cp")
    with pytest.raises(ValueError, match="cannot be ulysses and ring at once"):
        SequenceMesh.from_device_mesh(device_mesh, ring="ulysses")
    with pytest.raises(ValueError, match="'ring' must come before 'ulysses'"):
        SequenceMesh.from_device_mesh(device_mesh)
    return True


def test_axes_that_do_not_fit_are_refused(ranks: Ranks) -> None:
    assert all(ranks.run(2, bad_axes))


def test_a_process_without_a_group_is_the_one_by_one_mesh() -> None:
    mesh = SequenceMesh.build()
    assert (mesh.size, mesh.rank, mesh.device_mesh) == (1, 0, None)
    assert not torch.distributed.is_initialized()


def lse_dtype_of_bf16() -> torch.dtype:
    """The dtype of the log-sum-exp that the CPU kernel returns for bf16 inputs."""
    x = torch.randn(1, 2, 8, 16, dtype=torch.bfloat16)
    kernel = select("auto", Problem(device_type="cpu", dtype=x.dtype, head_dim=16, softcap=None))
    (tile,) = kernel.tiles(Band(0, 8, 0, 8))
    _, lse = kernel.forward(x, x, x, tile, LogitRule(scale=0.25))
    return lse.dtype


def kv_gradients(ring: int) -> list[torch.Tensor]:
    """On one rank: dK and dV, each of `ring` partial sums, of bf16 inputs."""
    case = replace(BF16, ring=ring)
    schedule = Schedule.build(case.mask, SequenceMesh.build(ring=ring), case.layout)
    (q, k, v), weights, _ = local_inputs(case, schedule)
    (attention(q, k, v, schedule) * weights).sum().backward()
    return [k.grad.double(), v.grad.double()]


BF16 = Case(mask=masks.full(256), dtype=torch.bfloat16, layout="contiguous", heads=2, kv_heads=1, head_dim=16)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference over that of the exact one."""
    return ((got - exact).square().mean() / exact.square().mean()).sqrt().item()


def test_bf16_gradients_lose_nothing_as_the_ring_grows(ranks: Ranks) -> None:
    """Partial dK/dV add up in fp32: with 8 of them the error is that of rounding, not of 8 bf16 additions."""
    assert lse_dtype_of_bf16() == torch.float32
    want = dense(BF16)
    errors: dict[int, list[float]] = {}
    for ring in (1, 8):
        found = ranks.run(ring, kv_gradients, ring)
        dk = torch.cat([one for one, _ in found], 1)
        dv = torch.cat([one for _, one in found], 1)
        errors[ring] = [relative_error(dk, want.dk), relative_error(dv, want.dv)]
    for one, eight in zip(errors[1], errors[8], strict=True):
        assert eight <= 1.5 * one
