"""Unusual inputs: meta tensors, DTensors, process groups without a name; and what is looked up once."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from oracle import Case, build, local_inputs
from ranks import Ranks
from torch.distributed.tensor import DTensor, Replicate, Shard

from seqmesh import Schedule, SequenceMesh, attention, masks
from seqmesh.engine.merge import check_mergeable


@pytest.mark.parametrize("needs_grad", [False, True])
def test_meta_tensors_give_shapes_without_numbers(needs_grad: bool) -> None:
    schedule = Schedule.build(masks.causal(9), SequenceMesh.build())
    q = torch.empty(1, 9, 4, 8, device="meta", requires_grad=needs_grad)
    k, v = (torch.empty(1, 9, 2, dim, device="meta", requires_grad=needs_grad) for dim in (8, 6))
    out = attention(q, k, v, schedule)
    assert (out.device.type, out.shape, out.dtype) == ("meta", (1, 9, 4, 6), torch.float32)
    if needs_grad:
        out.sum().backward()
        assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]
    with pytest.raises(ValueError, match="7 tokens but rank 0 of the mesh holds 9"):
        attention(q[:, :7], k, v, schedule)


def meta_on_a_mesh() -> tuple[int, ...]:
    schedule = Schedule.build(masks.causal(9), SequenceMesh.build(ulysses=2))
    n = schedule.rows[schedule.mesh.ulysses_rank]
    q, k, v = (torch.empty(1, n, 4, 8, device="meta", requires_grad=True) for _ in range(3))
    out = attention(q, k, v, schedule)
    out.sum().backward()
    assert q.grad.shape == q.shape
    return tuple(out.shape)


def test_meta_tensors_work_on_a_mesh_too(ranks: Ranks) -> None:
    assert ranks.run(2, meta_on_a_mesh) == [(1, 5, 4, 8), (1, 4, 4, 8)]


def with_dtensors() -> list[str]:
    """Refusals of each argument as a DTensor, on every rank alike."""
    mesh = SequenceMesh.build(ulysses=2)
    schedule = Schedule.build(masks.causal(8), mesh)
    axis = mesh.device_mesh["ulysses"]
    plain = {name: torch.randn(1, 4, 2, 8) for name in "qkv"} | {"sinks": torch.randn(2)}
    messages = []
    for name in plain:
        placement = Replicate() if name == "sinks" else Shard(1)
        wrong = plain | {name: DTensor.from_local(plain[name], axis, [placement])}
        with pytest.raises(ValueError, match=f"{name} is a DTensor with placements") as caught:
            attention(wrong["q"], wrong["k"], wrong["v"], schedule, sinks=wrong["sinks"])
        messages.append(str(caught.value))
    return messages


def test_dtensors_are_refused_with_the_remedy(ranks: Ranks) -> None:
    for messages in ranks.run(2, with_dtensors):
        assert all(".to_local()" in message for message in messages)


def group_without_a_name() -> tuple[str, str, frozenset[str]]:
    """A mesh over a default group that was made as `init_process_group()` makes it."""
    backend = dist.distributed_c10d._world.pg_map[dist.group.WORLD]
    unnamed = dist.new_group(backend=None)
    mesh = SequenceMesh.build(ring=2)
    assert backend[0] == "gloo"
    del unnamed
    return mesh.device_mesh.device_type, str(dist.get_backend()), mesh.device_types


def test_a_mesh_exchanges_what_its_groups_exchange(ranks: Ranks) -> None:
    for device_type, backend, types in ranks.run(2, group_without_a_name):
        assert (device_type, backend) == ("cpu", "gloo")
        assert "cpu" in types


def test_a_default_group_without_a_backend_name_says_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """`get_backend` is "undefined" there; on a machine with GPUs its devices are both."""
    from types import SimpleNamespace

    from seqmesh.engine.mesh import _default_device_type

    def group(*types: str) -> SimpleNamespace:
        return SimpleNamespace(_device_types=[torch.device(name) for name in types])

    for backend, types, expected in (
        ("undefined", ("cpu", "cuda"), "cuda"),
        ("undefined", ("cpu",), "cpu"),
        ("nccl", ("cuda",), "cuda"),
        ("cpu:gloo,cuda:nccl", ("cpu", "cuda"), "cuda"),
        ("gloo", ("cuda", "cpu"), "cpu"),  # gloo says that it can exchange CUDA tensors on any machine
    ):
        monkeypatch.setattr(dist, "get_backend", lambda backend=backend: backend)
        monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=group(*types)))
        assert _default_device_type() == expected


def anomaly(case: Case) -> list[str]:
    """On one rank: what attention says of a NaN in the inputs, in the debug mode and without it."""
    schedule = build(case)
    (q, k, v), _, _ = local_inputs(case, schedule)
    q = q.detach().clone()
    q[:, 0] = torch.nan
    assert attention(q, k, v, schedule).isnan().any()
    with (
        warnings.catch_warnings(action="ignore"),  # it warns that it is slow
        torch.autograd.detect_anomaly(check_nan=False),
        pytest.raises(FloatingPointError, match="log-sum-exps that are") as caught,
    ):
        attention(q, k, v, schedule)
    return [str(caught.value)]


def test_anomaly_detection_names_the_block_whose_results_would_spoil_the_rest(ranks: Ranks) -> None:
    for (message,) in ranks.run(1, anomaly, Case(mask=masks.causal(9))):
        assert "Band(q_start=0" in message


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_either_result_of_a_kernel_alone_can_be_what_cannot_be_merged(bad: float) -> None:
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    lse[0, 0, 0] = -torch.inf  # a row that sees nothing
    check_mergeable(out, lse, "a block")
    spoiled = out.clone()
    spoiled[0, 1, 2, 3] = bad
    with pytest.raises(FloatingPointError, match=r"0 log-sum-exps that are .* and 1 outputs .* for a block"):
        check_mergeable(spoiled, lse, "a block")
    if bad != -torch.inf:
        lse[0, 1, 1] = bad
        with pytest.raises(FloatingPointError, match=r"1 log-sum-exps that are .* and 0 outputs"):
            check_mergeable(out, lse, "a block")


def positions_are_made_once(case: Case) -> bool:
    schedule = build(case)
    x = torch.randn(2, case.mask.q_len)
    local = schedule.shard(x, 1)
    schedule.unshard(local, 1)
    made = {key: kept for key, kept in schedule._kept.items() if isinstance(kept, torch.Tensor)}
    schedule.positions().fill_(-1)  # a copy: what is kept cannot be spoiled
    assert torch.equal(schedule.unshard(schedule.shard(x, 1), 1), x)
    again = {key: kept for key, kept in schedule._kept.items() if isinstance(kept, torch.Tensor)}
    return bool(made) and all(made[key] is again[key] for key in made) and len(again) == len(made)


def test_shard_and_unshard_make_their_permutations_once(ranks: Ranks) -> None:
    case = Case(mask=masks.causal(33), ulysses=2, ring=2, layout="zigzag")
    assert all(ranks.run(4, positions_are_made_once, replace(case)))
