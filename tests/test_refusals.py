"""What cannot be computed is refused, on the rank that got it, before any communication."""

import subprocess
import sys

import pytest
import torch
from oracle import Case, build, local_inputs
from ranks import Ranks

from seqmesh import Schedule, SequenceMesh, attention, layouts, masks
from seqmesh.engine.call import hopeless

# The 1 x 1 mesh of one process, written out: ranks import this file too, and there `build` would see their
# group.
MESH = SequenceMesh(
    ulysses=1, ring=1, ulysses_rank=0, ring_rank=0, ulysses_group=None, ring_group=None, device_mesh=None
)
SCHEDULE = Schedule.build(masks.causal(8), MESH)


def tensors(
    n: int = 8, h: int = 4, g: int = 2, d: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(1, n, h, d).to(dtype),
        torch.randn(1, n, g, d).to(dtype),
        torch.randn(1, n, g, d).to(dtype),
    )


@pytest.mark.parametrize(
    ("build_and_run", "message"),
    [
        (
            lambda: attention(*tensors(n=7), SCHEDULE),
            "q has 7 tokens but rank 0 of the mesh holds 8; pass what schedule.shard returned",
        ),
        (lambda: attention(*(x[0] for x in tensors()), SCHEDULE), r"need q \(b, n, h, d\)"),
        (lambda: attention(tensors()[0], *tensors(d=16)[1:], SCHEDULE), "with one b and one d"),
        (lambda: attention(tensors()[0], tensors()[1], tensors(g=1)[2], SCHEDULE), "need q"),
        (lambda: attention(*tensors(h=4, g=3), SCHEDULE), "4 query heads with 3 K/V heads"),
        (lambda: attention(tensors()[0].double(), *tensors()[1:], SCHEDULE), "one dtype is needed"),
        (lambda: attention(*tensors(dtype=torch.int32), SCHEDULE), "needs a floating dtype"),
        (
            lambda: attention(tensors()[0], *(x.to("meta") for x in tensors()[1:]), SCHEDULE),
            "k is on meta but q is on cpu",
        ),
        (
            lambda: attention(*tensors(), SCHEDULE, sinks=torch.zeros(3)),
            r"need one floating logit per query head, \(4,\)",
        ),
        (lambda: attention(*tensors(), SCHEDULE, softcap=0.0), "softcap=0.0: it must be positive"),
        (lambda: attention(*tensors(), SCHEDULE, scale=-1.0), "scale=-1.0: it must be positive"),
        (
            lambda: attention(*tensors(), SCHEDULE, scale=torch.tensor(0.5)),
            "scale is a tensor, whose gradient would be lost",
        ),
        (lambda: attention(*tensors(), SCHEDULE, softcap=torch.tensor(5.0)), "softcap is a tensor"),
        (lambda: attention(*tensors(), masks.causal(8)), "schedule is a Mask; pass Schedule.build"),
        (lambda: attention(*tensors(), SCHEDULE, kernel=None), "kernel=None is neither a name nor a Kernel"),
        (lambda: attention(*tensors(), SCHEDULE, head_chunks=2.5), "head_chunks=2.5: use a whole number"),
        (lambda: attention(*tensors(), SCHEDULE, kernel="cuda"), "cuda: it runs on cuda, not on cpu"),
        (lambda: attention(*tensors(), SCHEDULE, kernel="cpu", softcap=1.0), "cpu: it has no softcap"),
        (lambda: attention(*tensors(), SCHEDULE, head_chunks=0), "head_chunks=0"),
        (
            lambda: Schedule.build(masks.causal(8), MESH, "diagonal"),
            "layout='diagonal' is unknown; use 'auto'",
        ),
        (
            lambda: Schedule.build(masks.causal(8), MESH, layouts.zigzag(8, 2)),
            "the layout is for ring=2 but the mesh has ring=1",
        ),
        (
            lambda: Schedule.build(masks.causal(8), MESH, layouts.zigzag(9, 1)),
            "query layout holds 9 tokens but the mask has 8",
        ),
        (
            lambda: SCHEDULE.shard(torch.zeros(3, 9), 1),
            r"dim 1 of a tensor of shape \(3, 9\) must hold the mask's 8 tokens",
        ),
        (lambda: SCHEDULE.unshard(torch.zeros(3, 9), 1), "must hold this rank's 8 tokens"),
        (lambda: SequenceMesh.build(ulysses=2, ring=2), "needs 4 ranks but no process group is initialised"),
        (lambda: SequenceMesh.build(ulysses=0), "a degree is at least 1"),
    ],
)
def test_a_wrong_call_is_refused_with_got_rule_and_remedy(build_and_run, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_and_run()


def refuse_on_rank_0(case: Case) -> str:
    """On one rank: rank 0 passes one token too few.

    It must fail alone and at once; afterwards all ranks go on together.
    """
    schedule = build(case)
    (q, k, v), _, _ = local_inputs(case, schedule)
    refusal = ""
    if schedule.mesh.rank == 0:
        try:
            attention(q[:, 1:], k, v, schedule)
        except ValueError as error:
            refusal = str(error)
    attention(q, k, v, schedule)  # would hang or swap data if rank 0 had sent anything
    return refusal


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)])
def test_a_refusal_comes_before_any_communication(ranks: Ranks, mesh: tuple[int, int]) -> None:
    first, second = ranks.run(2, refuse_on_rank_0, Case(mask=masks.causal(16), ulysses=mesh[0], ring=mesh[1]))
    assert "rank 0 of the mesh holds 8" in first
    assert second == ""


def too_many_heads() -> str:
    with pytest.raises(ValueError, match="leaves 1 ranks without a head") as caught:
        attention(*tensors(n=4, h=1, g=1), Schedule.build(masks.causal(8), SequenceMesh.build(ulysses=2)))
    return str(caught.value)


def wrong_world() -> str:
    with pytest.raises(
        ValueError, match="ulysses=3 x ring=1 needs 3 ranks but the default process group has 2 ranks"
    ) as caught:
        SequenceMesh.build(ulysses=3)
    return str(caught.value)


@pytest.mark.parametrize("task", [too_many_heads, wrong_world])
def test_every_rank_refuses_what_is_wrong_for_all(ranks: Ranks, task) -> None:
    assert all(ranks.run(2, task))


def wrong_device() -> str:
    mesh = SequenceMesh.build(ulysses=2)
    vars(mesh)["device_types"] = frozenset({"cuda"})  # as of NCCL's groups
    schedule = Schedule.build(masks.causal(8), mesh)
    with pytest.raises(ValueError, match="q is on cpu but the mesh exchanges cuda tensors") as caught:
        attention(*tensors(n=4), schedule)
    return str(caught.value)


def test_tensors_on_another_device_than_the_mesh_are_refused(ranks: Ranks) -> None:
    assert all(ranks.run(2, wrong_device))


def test_double_backward_is_refused_not_wrong() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(dtype=torch.float64))
    (grad,) = torch.autograd.grad(
        attention(q, k, v, SCHEDULE, kernel="reference").square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_an_input_changed_after_the_forward_is_an_error_not_a_wrong_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(dtype=torch.float64))
    middle = q * 1
    out = attention(middle, k, v, SCHEDULE)
    middle.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_pure_part_imports_without_torch() -> None:
    """Masks, layouts and schedules serve the planner, which must not wait for torch."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None\n"
        "from seqmesh import layouts, masks; from seqmesh.schedule import ring_schedule\n"
        "m = masks.documents([9, 30, 5]); l = layouts.auto(m, 4); print(ring_schedule(m, l, l, 2).area > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_a_dense_kernel_at_hopeless_sizes_on_a_gpu_is_worth_a_warning() -> None:
    assert hopeless("cuda", "cuda", 1 << 40) is None
    assert hopeless("reference", "cpu", 1 << 40) is None
    assert hopeless("reference", "cuda", (1 << 34) - 1) is None
    message = hopeless("reference", "cuda", 1 << 34)
    assert message is not None
    assert "1.7e+10 logits" in message
    assert "cast to bf16" in message
