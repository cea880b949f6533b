"""Recomputation: the same numbers, the same bytes sent, attention once; inputs on the host, MLPs in tiles."""

from typing import Any

import pytest
import torch
from parallel_runs import Run, build, check, mesh_of, micro_batch, on_mesh
from ranks import Ranks
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from seqmesh.engine.exchange import CountBytes
from seqmesh.parallel import ParallelDims, ParallelPlan, loss, parallelize, shard_batch

DIMS = ParallelDims(ring=2, ulysses=2)
PLANS = {
    "none": ParallelPlan(),
    "selective": ParallelPlan(recompute="selective"),
    "full": ParallelPlan(recompute="full"),
    "offload": ParallelPlan(recompute="full", offload=True),
    "full, tiles": ParallelPlan(recompute="full", mlp_rows=3, zero=2),
}


@pytest.mark.parametrize("name", [name for name in PLANS if name != "none"])
def test_training_equals_that_of_one_rank(ranks: Ranks, name: str) -> None:
    run = Run(dims=DIMS, plan=PLANS[name], micro_batches=2)
    check(ranks.run(4, on_mesh, run), run)


class CountOps(TorchDispatchMode):
    """How often attention kernels and matrix products run."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kernels += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def counted(plan: ParallelPlan) -> tuple[int, int, int, int]:
    """On one rank, of a step: bytes that attention sends, kernels and products run, tensors saved."""
    mesh = mesh_of(DIMS)
    model = parallelize(build("llama", False, 2, 2), mesh, plan)
    batch = shard_batch(micro_batch(0, 0), mesh)
    saved = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with CountOps() as ops, CountBytes() as sent:
        with saved_tensors_hooks(pack, lambda x: x):
            share = loss(model, batch)
        share.backward()
    return sent.bytes_sent, ops.kernels, ops.products, len(saved)


def test_recomputation_repeats_neither_attention_nor_its_exchange(ranks: Ranks) -> None:
    names = ["none", "selective", "full"]
    found = {name: ranks.run(4, counted, PLANS[name]) for name in names}
    for none, selective, full in zip(*(found[name] for name in names), strict=True):
        assert none[0] == selective[0] == full[0] > 0
        assert none[1] == selective[1] == full[1] > 0
        # Selective keeps the products; full repeats the 7 of each layer but those that only a product needs.
        assert none[2] == selective[2]
        assert none[2] < full[2] <= none[2] + 2 * 7
        assert full[3] < none[3] / 2


def test_inputs_of_layers_are_what_is_on_the_host(ranks: Ranks) -> None:
    for plain, offloaded in zip(
        ranks.run(4, counted, PLANS["full"]), ranks.run(4, counted, PLANS["offload"]), strict=True
    ):
        assert offloaded[:3] == plain[:3]
        assert offloaded[3] == plain[3] - 2 * 1  # a layer's input goes to save_on_cpu's hooks instead


def test_a_layer_without_a_known_mlp_is_refused() -> None:
    model = build("llama", False, 1, 2)
    layer = model.model.layers[0]
    layer.other = layer.mlp
    del layer.mlp
    with pytest.raises(ValueError, match="no mlp or feed_forward to cut in tiles"):
        parallelize(model, ParallelDims().build(), PLANS["full, tiles"])
