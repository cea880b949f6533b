"""Expert parallelism: a layer's experts are spread over ranks, and tokens travel to them and back.

    fsdp ranks        0   1   2   3        two views of the same ranks, W of them
    ep 2, efsdp 2     ^---^   ^---^        an expert's rows: on one rank of each ep group, sharded over efsdp

    tokens of a rank  -- all-to-all over ep -->  the rank of their expert  -- all-to-all -->  back, weighted

Which tokens go where is the router's choice, so the sizes differ from step to step; ranks of ep hold other
tokens anyway, as they are ranks of data or of a sequence. All other parameters of a layer are sharded over
all W ranks as ever. Gradients are sums here too.

transformers has the plan of which modules are experts, and the exchange; nothing of it knows of sequences.
Source: GShard (Lepikhin et al. 2020); transformers.distributed.expert_parallel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism

from seqmesh.parallel.dims import ParallelMesh

_EXPERTS = "ep_dispatch_experts"
"""transformers' style of the modules that hold experts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedExperts:
    """The experts of a model, and the ranks that shard each."""

    modules: Sequence[nn.Module]
    mesh: DeviceMesh
    """Of FSDP: efsdp, with dp_replicate outside of it where there are replicas."""


def share_experts(model: PreTrainedModel, mesh: ParallelMesh, degree: int) -> SharedExperts:
    """Spread the experts of a model over `degree` ranks, in place. Before attention is plugged in.

    Args:
        model: with whole weights, the same on every rank, or on the meta device.
        mesh: of all parallelisms; tp is 1.
        degree: ranks that share the experts; it divides the ranks of fsdp.

    Raises:
        ValueError: a model without experts, or a degree that does not divide ranks or experts.
    """
    fsdp = mesh.flattened["fsdp"]
    if fsdp.size() % degree:
        raise ValueError(
            f"experts={degree} over dp_shard x ring x ulysses = {fsdp.size()} ranks; use a degree that"
            " divides them"
        )
    views = fsdp._unflatten(0, (fsdp.size() // degree, degree), ("efsdp", "ep"))
    plan = expert_plan_of(model, degree, fsdp.size())
    here = dict(model.named_modules())
    parts = [path for path, style in plan.items() if style == _EXPERTS and path in here]
    here_too = here.keys() | {path for path, _ in model.named_parameters()}
    rest = {path: style for path, style in plan.items() if path in here_too}  # a stage has some layers only
    apply_expert_parallelism(model, views["ep"], mesh.tp, rest, ep_implementation="all_to_all")
    shards = views["efsdp"]
    if mesh.dims.dp_replicate > 1:
        assert mesh.device_mesh is not None
        shards = DeviceMesh._concatenate([mesh.device_mesh["dp_replicate"], shards])
    return SharedExperts(modules=[here[path] for path in parts], mesh=shards)


def expert_plan_of(model: PreTrainedModel, degree: int, ranks: int) -> dict[str, str]:
    """What transformers spreads how over `degree` of the ranks of fsdp.

    Raises:
        ValueError: a model without experts.
    """
    try:
        config = DistributedConfig(ep_size=degree, fsdp_size=ranks)
        plan: dict[str, str] = model._resolve_parallel_plans(config)[1]
    except ValueError:
        raise ValueError(
            f"experts={degree} with {type(model).__name__}, which has no experts that transformers can spread"
            "; leave it out"
        ) from None
    return plan
