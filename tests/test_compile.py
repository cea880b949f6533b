"""torch.compile(fullgraph=True): the same numbers as eager, and new documents do not compile again."""

import warnings
from dataclasses import replace

import pytest
import torch
from oracle import Case, build, local_inputs
from ranks import Ranks

from seqmesh import attention, masks

pytestmark = pytest.mark.filterwarnings("default")  # PyTorch's compiler warns about itself


def compiled(cases: list[Case], backend: str) -> tuple[list[float], int]:
    """On one rank: the largest difference to eager of each case, and how often it compiled."""
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    schedules = [build(case) for case in cases]

    def layer(q, k, v, sinks, schedule):
        return attention(q * 1.5, k, v, schedule, sinks=sinks).sin()

    warnings.simplefilter("ignore")  # PyTorch's compiler warns about its own deprecations
    compiled_layer = torch.compile(layer, fullgraph=True, backend=counter)
    errors = []
    for case, schedule in zip(cases, schedules, strict=True):
        results = []
        for function in (layer, compiled_layer):
            (q, k, v), weights, sinks = local_inputs(case, schedule)
            out = function(q, k, v, sinks, schedule)
            (out * weights).sum().backward()
            results.append([out.detach(), *(x.grad for x in (q, k, v, sinks) if x is not None)])
        errors.append(max((a - b).abs().max().item() for a, b in zip(*results, strict=True)))
    return errors, counter.frame_count


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_a_full_graph_gives_the_eager_numbers_and_new_documents_do_not_recompile(
    ranks: Ranks, backend: str, mesh: tuple[int, int]
) -> None:
    lengths = [[20, 30], [50], [1, 4, 45], [10] * 5, [25, 25]]
    case = Case(mask=masks.causal(50), ulysses=mesh[0], ring=mesh[1], layout="zigzag", sinks=True)
    case = replace(case, heads=4, kv_heads=2, dtype=torch.float32)
    cases = [replace(case, mask=masks.documents(packed)) for packed in lengths]
    for errors, compilations in ranks.run(2, compiled, cases, backend):
        # Attention is the same operators; sin and the product around it may be fused or reordered, a rounding
        # each.
        assert max(errors) <= 2e-6
        # One graph, and one more when the number of documents first becomes symbolic.
        assert compilations <= 2


def test_a_schedule_that_nobody_has_used_yet_compiles() -> None:
    case = Case(mask=masks.full(9), dtype=torch.float32)
    schedule = build(case)
    (q, k, v), _, _ = local_inputs(case, build(case))
    warnings.simplefilter("ignore")  # PyTorch's compiler warns about its own deprecations
    out = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v, schedule)
    torch.testing.assert_close(out, attention(q, k, v, schedule))


def test_one_process_without_a_group_compiles_too() -> None:
    case = Case(mask=masks.causal(33), dtype=torch.float32, heads=4, kv_heads=2)
    (error,), _ = compiled([case], "aot_eager")
    assert error <= 2e-6


def test_keys_with_a_layout_of_their_own_compile_too(ranks: Ranks) -> None:
    """Queries and keys of as many rows, of other numbers of rows, and of as many on one rank only."""
    for q_len, k_len in ((16, 16), (8, 24), (8, 9)):
        case = Case(mask=masks.cross(q_len, k_len), ulysses=2, ring=2, layout="contiguous", own_keys=True)
        case = replace(case, dtype=torch.float32)
        for (error,), _ in ranks.run(4, compiled, [case], "aot_eager"):
            assert error <= 2e-6


def uneven(case: Case, backend: str) -> float:
    """On one rank: the largest difference to eager; ranks may hold no head of a chunk."""
    return compiled([case], backend)[0][0]


@pytest.mark.parametrize("mesh", [(4, 1), (2, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_a_rank_without_a_head_in_a_chunk_compiles_too(ranks: Ranks, mesh: tuple[int, int]) -> None:
    """The operator gave back its input there, which custom operators may not."""
    u, r = mesh
    for chunks in (None, 2, 3):
        case = Case(mask=masks.causal(24), ulysses=u, ring=r, heads=14, kv_heads=2, head_chunks=chunks)
        case = replace(case, dtype=torch.float32, sinks=True)
        assert max(ranks.run(4, uneven, case, "aot_eager")) <= 2e-6


def frozen(case: Case) -> list[float]:
    """On one rank: differences to eager of dq with frozen keys, and of an output without gradients."""
    torch._dynamo.reset()
    schedule = build(case)
    (q, k, v), weights, _ = local_inputs(case, schedule)
    k.requires_grad_(False)
    v.requires_grad_(False)
    warnings.simplefilter("ignore")  # PyTorch's compiler warns about its own deprecations
    layer = torch.compile(attention, fullgraph=True, backend="aot_eager")
    found = []
    for function in (attention, layer):
        q.grad = None
        (function(q, k, v, schedule) * weights).sum().backward()
        with torch.no_grad():
            found.append((q.grad, function(q, k, v, schedule)))
    assert k.grad is None
    return [(a - b).abs().max().item() for a, b in zip(*found, strict=True)]


def test_frozen_inputs_and_no_grad_compile_too(ranks: Ranks) -> None:
    case = Case(mask=masks.causal(24), ulysses=2, ring=2, dtype=torch.float32)
    for errors in ranks.run(4, frozen, case):
        assert max(errors) <= 2e-6
