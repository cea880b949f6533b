"""return_lse: the log-sum-exp of every row, on every mesh, eager and compiled."""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from oracle import Case, build, inputs, local_inputs
from ranks import Ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from seqmesh import attention, masks
from seqmesh.masks import Band, Mask

pytestmark = pytest.mark.filterwarnings("default")  # PyTorch's compiler warns about itself


def want_lse(case: Case) -> Tensor:
    """(b, h, s) in fp64, from the definition."""
    q, k, _, _, sinks = inputs(case)
    repeat = case.heads // case.kv_heads
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(repeat, 2)) * case.head_dim**-0.5
    logits = logits.masked_fill(~torch.from_numpy(case.mask.dense()), -torch.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks[None, :, None, None].expand(*logits.shape[:3], 1)), -1)
    return logits.logsumexp(-1)


def ways(case: Case) -> list[float]:
    """On one rank: errors of the lse and differences of the rest, by every way of calling."""
    torch._dynamo.reset()
    warnings.simplefilter("ignore")  # PyTorch's compiler warns about its own deprecations
    schedule = build(case)
    want = want_lse(case)[:, :, schedule.positions()]
    (q, k, v), weights, sinks = local_inputs(case, schedule)
    call = partial(attention, head_chunks=case.head_chunks, sinks=sinks)
    plain = call(q, k, v, schedule)
    (plain * weights).sum().backward()
    grads = [x.grad.clone() for x in (q, k, v)]
    keep = partial(create_selective_checkpoint_contexts, [torch.ops.seqmesh.attention.default])
    with_lse = partial(call, return_lse=True)
    compiled = torch.compile(with_lse, fullgraph=True, backend="aot_eager")
    errors = []
    for attend in (
        with_lse,
        compiled,
        lambda *args: checkpoint(with_lse, *args, use_reentrant=False, context_fn=keep),
        lambda *args: checkpoint(with_lse, *args, use_reentrant=False),
    ):
        q.grad = k.grad = v.grad = None
        out, lse = attend(q, k, v, schedule)
        assert lse.shape == want.shape
        assert not lse.requires_grad
        (out * weights).sum().backward()
        same = (lse == want) | ((lse - want).abs() <= 1e-12)
        errors.append(0.0 if bool(same.all()) else 1.0)
        errors += [(a - b.grad).abs().max().item() for a, b in zip(grads, (q, k, v), strict=True)]
        errors.append((out - plain).abs().max().item())
    with torch.no_grad():
        assert torch.equal(with_lse(q, k, v, schedule)[1], lse)
    return errors


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_the_log_sum_exp_of_every_row_comes_with_the_output(ranks: Ranks, mesh: tuple[int, int]) -> None:
    u, r = mesh
    sees_nothing = Mask(30, 30, (Band(5, 30, 0, 30, lo=4),))
    few = Case(mask=masks.causal(37), ulysses=u, ring=r, heads=6, kv_heads=3, head_chunks=2, batch=2)
    # Enough chunks to travel beside one another, where heads are exchanged.
    many = replace(few, heads=6 * u, kv_heads=6 * u, head_chunks=6, batch=1)
    for case in (replace(few, sinks=True), replace(few, mask=sees_nothing), many):
        for errors in ranks.run(u * r, ways, case):
            assert max(errors) <= 1e-13


def test_one_head_has_a_log_sum_exp_of_its_own(ranks: Ranks) -> None:
    """Its memory is not that which the backward keeps: an operator may not return one tensor twice."""
    case = Case(mask=masks.causal(19), heads=1, kv_heads=1)
    for errors in ranks.run(1, ways, case):
        assert max(errors) <= 1e-13
