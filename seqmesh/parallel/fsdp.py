"""ZeRO-2 and -3 by PyTorch's FSDP2, over data-parallel and sequence ranks alike, with sums in place of means.

    parameter -> a shard of its rows on each of dp_shard x ring x ulysses ranks, copies over dp_replicate
    a layer's forward, backward:    all-gather its parameters
    after its last backward:        reduce-scatter (SUM) its gradients, all-reduce (SUM) over dp_replicate

The loss of a rank is already divided by the labels of all ranks (loss.py), so gradients add up. FSDP2
averages by default, and takes two calls to stop: a divisor of 1, and SUM itself in the collectives.

Each layer is a group of parameters that is gathered together, and so is the input embedding; what is left
(last norm, head, and the embedding where it is tied to the head) belongs to the root, and stays gathered from
the forward to the backward.

Source: FSDP2 (torch.distributed.fsdp.fully_shard); ZeRO (Rajbhandari et al. 2020).
"""

from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from seqmesh.parallel.experts import SharedExperts
from seqmesh.parallel.part import ModelPart
from seqmesh.parallel.plan import ParallelPlan


def shard_parameters(
    part: ModelPart, mesh: DeviceMesh, plan: ParallelPlan, experts: SharedExperts | None = None
) -> None:
    """Shard the parameters of a part, in place.

    Args:
        part: whose parameters are all on one device, or meta.
        mesh: one axis of shards, or replicas x shards.
        plan: zero (2 or 3), param_dtype and offload_optimizer are read.
        experts: what is sharded over other ranks, if experts are spread.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=plan.param_dtype,
        reduce_dtype=None if plan.param_dtype is None else torch.float32,
        # Casting would copy the batch and its schedule for every layer; inputs have the dtype already.
        cast_forward_inputs=False,
    )
    host = CPUOffloadPolicy() if plan.offload_optimizer and mesh.device_type != "cpu" else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=host)
    frees = plan.zero == 3
    if experts is not None:  # before the layers that hold them, which then leave them alone
        for module in experts.modules:
            shard(module, mesh=experts.mesh, reshard_after_forward=frees)
    anatomy = part.anatomy
    for layer in anatomy.own_layers:
        shard(layer, reshard_after_forward=frees)
    if part.is_first and not anatomy.is_tied:
        shard(anatomy.embedding, reshard_after_forward=frees)
    shard(part, reshard_after_forward=False)
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def announce(part: ModelPart, plan: ParallelPlan, *, is_last: bool) -> None:
    """Say whether the micro-batch that comes is the last of its step: then gradients are reduced."""
    if not isinstance(part, FSDPModule):
        return
    part.set_requires_gradient_sync(is_last or plan.reduce_each)
    if plan.zero == 2:
        part.set_reshard_after_backward(is_last)
