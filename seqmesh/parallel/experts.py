"""Expert parallelism: a layer's experts are spread over ranks, and tokens travel to them and back.

    ranks of fsdp x tp     0   1   2   3      two views of the same ranks
    fsdp 2, tp 2           a   a   b   b      ranks of tp have the same tokens: each sends a part of them
    ep 2, efsdp 2          ^---^   ^---^      an expert: on one rank of each ep group, sharded over efsdp

    tokens of a rank  -- all-to-all over ep -->  the rank of their expert  -- all-to-all -->  back, weighted

Which tokens go where is the router's choice, so the sizes differ from step to step. No two ranks send the
same token: those of fsdp are ranks of data or of a sequence, and those of tp send each its own part of the
rows and gather what came back, or, where they share the rows of norms, have only their own.

Experts are whole where they are, though tp shares every other matrix; all other parameters of a layer are
sharded over fsdp as ever. Gradients are sums here too.

transformers has the plan of which modules are experts, and the exchange; nothing of it knows of sequences.
Source: GShard (Lepikhin et al. 2020); transformers.distributed.expert_parallel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.distributed.expert_parallel import apply_expert_parallelism

from seqmesh.parallel.adapters import Styles
from seqmesh.parallel.dims import ParallelDims, ParallelMesh
from seqmesh.parallel.plan import ParallelPlan
from seqmesh.parallel.tensor import distributed, own_memory

_EXPERTS = "ep_dispatch_experts"
"""transformers' style of the modules that hold experts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedExperts:
    """The experts of a model, and the ranks that shard each."""

    modules: Sequence[nn.Module]
    mesh: DeviceMesh
    """Of FSDP: efsdp, with dp_replicate outside of it where there are replicas."""


def share_experts(model: PreTrainedModel, mesh: ParallelMesh, plan: ParallelPlan) -> SharedExperts:
    """Spread the experts of a model over ranks, in place. After tp, before attention is plugged in.

    Args:
        model: with whole weights, the same on every rank, or on the meta device.
        mesh: of all parallelisms.
        plan: experts and shard_norms are read.

    Raises:
        ValueError: a model without experts, or a degree that does not divide ranks or experts.
    """
    check_degree(mesh.dims, plan.experts)
    ranks, degree = mesh.flattened["experts"], plan.experts
    views = _two_axes(ranks, degree)
    mesh.limit(views)
    styles = expert_plan_of(model, mesh.dims, degree)
    here = dict(model.named_modules())
    parts = [path for path, style in styles.items() if style == _EXPERTS and path in here]
    here_too = here.keys() | {path for path, _ in model.named_parameters()}
    rest = {path: style for path, style in styles.items() if path in here_too}  # a stage has some layers only
    same_rows = _alone(mesh.tp) if plan.shard_norms else mesh.tp
    apply_expert_parallelism(model, views["ep"], same_rows, rest, ep_implementation="all_to_all")
    if same_rows.size() > 1:  # what they gather comes out of a DTensor
        for path in parts:
            here[path].register_forward_hook(own_memory)
    shards = views["efsdp"]
    if mesh.dims.dp_replicate > 1:
        assert mesh.device_mesh is not None
        shards = DeviceMesh._concatenate([mesh.device_mesh["dp_replicate"], shards])
    return SharedExperts(modules=[here[path] for path in parts], mesh=shards)


def _two_axes(ranks: DeviceMesh, degree: int) -> DeviceMesh:
    """The same ranks seen as efsdp x ep.

    Over all ranks there are, PyTorch would give ep the default group, which a ring of all has too: exchanges
    of tokens would be counted as those of attention. A backend that is named makes it another.
    """
    own: dict[str, Any] = {"ep": str(dist.get_backend(ranks.get_group()))}
    return ranks._unflatten(0, (ranks.size() // degree, degree), ("efsdp", "ep"), own)


def _alone(mesh: DeviceMesh) -> DeviceMesh:
    """One rank, which has rows that no other has."""
    return mesh._unflatten(0, (mesh.size(), 1), ("others", "alone"))["alone"]


def check_degree(dims: ParallelDims, degree: int) -> None:
    """Refuse a degree that does not fit the ranks.

    Raises:
        ValueError: the ranks of fsdp and tp are no multiple of it, or it is no multiple of tp.
    """
    ranks = dims.shards * dims.tp
    if ranks % degree or degree % dims.tp:
        raise ValueError(
            f"experts={degree} over dp_shard x ring x ulysses x tp = {ranks} ranks with tp={dims.tp}; use a"
            " degree that divides them, and a multiple of tp"
        )


def expert_plan_of(model: PreTrainedModel, dims: ParallelDims, degree: int) -> Styles:
    """What transformers spreads how over `degree` of the ranks of fsdp and tp.

    Raises:
        ValueError: a model without experts.
    """
    try:
        plan: Styles = model._resolve_parallel_plans(distributed(dims, degree))[1]
    except ValueError:
        raise ValueError(
            f"experts={degree} with {type(model).__name__}, which has no experts that transformers can spread"
            "; leave it out"
        ) from None
    return plan
