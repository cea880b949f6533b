"""Activation checkpointing: full, and selective with attention's output kept. Exact, and exchanged once."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from oracle import Case, build, local_inputs
from ranks import Ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from seqmesh import Schedule, SequenceMesh, attention, masks
from seqmesh.engine.exchange import CountBytes
from seqmesh.engine.kernels.cpu import CpuFlash

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
EXCHANGE = torch.ops._c10d_functional.all_to_all_single.default


class CountExchanges(TorchDispatchMode):
    """Counts the all-to-alls and the attention kernels that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.exchanges = 0
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.exchanges += func is EXCHANGE
        self.kernels += func is FLASH
        return func(*args, **(kwargs or {}))


def keep(what: str, _: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    """A policy that keeps attention's output, or those of the operators inside it, or everything."""
    kept = {
        "attention": (torch.ops.seqmesh.attention.default,),
        "kernels": (FLASH,),
        "exchanges": (EXCHANGE,),
        "nothing": (),
    }
    if what == "everything" or op in kept[what]:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def trained(case: Case, mode: str) -> tuple[list[Tensor], int, int, int, int]:
    """On one rank: gradients, and what forward and backward exchange together, by this checkpointing."""
    schedule = build(case)
    (q, k, v), weights, sinks = local_inputs(case, schedule)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q * 1.5, k.sin(), v, schedule, sinks=sinks, head_chunks=case.head_chunks)
        return out.tanh()

    with CountExchanges() as counted, CountBytes() as sent:
        if mode == "none":
            out = layer(q, k, v)
        elif mode == "full":
            out = checkpoint(layer, q, k, v, use_reentrant=False)
        else:
            context = partial(create_selective_checkpoint_contexts, partial(keep, mode))
            out = checkpoint(layer, q, k, v, use_reentrant=False, context_fn=context)
        forward = counted.exchanges
        (out * weights).sum().backward()
    grads = [x.grad for x in (q, k, v, sinks) if x is not None]
    return grads, forward, counted.exchanges, counted.kernels, sent.bytes_sent


MODES = ["full", "attention", "kernels", "exchanges", "everything", "nothing"]
CASES = {
    "zigzag": Case(mask=masks.causal(40), layout="zigzag", sinks=True, heads=6, kv_heads=2),
    "documents": Case(mask=masks.documents([9, 20, 3, 8]), heads=5, kv_heads=5, head_chunks=2),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mesh", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_without_a_checkpoint(
    ranks: Ranks, name: str, mesh: tuple[int, int], mode: str
) -> None:
    case = replace(CASES[name], ulysses=mesh[0], ring=mesh[1])
    world = mesh[0] * mesh[1]
    plain = ranks.run(world, trained, case, "none")
    for want, got in zip(plain, ranks.run(world, trained, case, mode), strict=True):
        for a, b in zip(want[0], got[0], strict=True):
            # Equal, but for sums over another order of memory (gradients of sinks).
            assert (a - b).abs().max() <= 1e-15
        if mode in ("attention", "everything"):
            # Kept, it is neither attended to nor exchanged again.
            assert got[1:] == want[1:]
        else:
            # Twice the forward, once the backward.
            _, forward, both, kernels, _ = want
            assert got[1:4] == (forward, both + forward, 2 * kernels)
    if world > 1:
        assert all(rank[1] > 0 for rank in plain)
    assert all(rank[3] > 0 for rank in plain)


def test_a_kernel_object_recomputes_where_only_operators_can_be_kept() -> None:
    schedule = Schedule.build(masks.causal(16), SequenceMesh.build())
    q, k, v = (torch.randn(1, 16, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, schedule, kernel=CpuFlash())

    context = partial(create_selective_checkpoint_contexts, partial(keep, "attention"))
    checkpoint(layer, q, k, v, use_reentrant=False, context_fn=context).sum().backward()
    got = [x.grad.clone() for x in (q, k, v)]
    q.grad = k.grad = v.grad = None
    layer(q, k, v).sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(got, (q, k, v), strict=True))


def outputs_left_alone(case: Case) -> bool:
    """On one rank: whether what the kernel returned is what it was when all is done."""
    kept: list[tuple[Tensor, Tensor]] = []

    class Remembers(CpuFlash):
        def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
            found = super().forward(*args)
            kept.extend((x, x.clone()) for x in found)
            return found

        def backward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
            found = super().backward(*args)
            kept.extend((x, x.clone()) for x in found)
            return found

    schedule = build(case)
    (q, k, v), weights, sinks = local_inputs(case, schedule)
    out = attention(q, k, v, schedule, sinks=sinks, kernel=Remembers())
    (out * weights).sum().backward()
    assert kept
    return all(torch.equal(x, before) for x, before in kept)


@pytest.mark.parametrize("mesh", [(1, 1), (1, 4), (2, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_what_a_kernel_returned_is_never_changed(ranks: Ranks, mesh: tuple[int, int]) -> None:
    u, r = mesh
    for mask, layout in ((masks.causal(40), "zigzag"), (masks.documents([9, 31]), "striped")):
        case = Case(mask=mask, ulysses=u, ring=r, layout=layout, sinks=True, dtype=torch.float32)
        assert all(ranks.run(u * r, outputs_left_alone, case))
