"""Every parallelism applied to a Hugging Face model, from outside, in the order in which they must come.

    pp             foreign layers become identities                   split.py, pipeline.py
    tp             matrices are shared, heads are divided             tensor.py
    experts        those of a layer are spread over ranks             experts.py
    attention      exact over ring x ulysses, within tp's heads       integrations/transformers.py
    recurrences    the same; tp's heads                               recurrent_heads.py
    recomputation  layers keep attention's output only                recompute.py
    fsdp           what is left of each parameter is sharded          fsdp.py, or zero1.py

tp comes before fsdp, which shards the shards; recomputation before fsdp, whose gathering is outside of it.
"""

from transformers import PreTrainedModel

from seqmesh.integrations.adapted import PeftModel, unwrapped
from seqmesh.integrations.transformers import plug_in
from seqmesh.parallel.adapters import check_adapters
from seqmesh.parallel.balance import BalanceLoss
from seqmesh.parallel.dims import ParallelMesh
from seqmesh.parallel.experts import check_degree, share_experts
from seqmesh.parallel.fsdp import shard_parameters
from seqmesh.parallel.model import ParallelModel
from seqmesh.parallel.part import ModelPart
from seqmesh.parallel.pipeline import stage_count, stages_of_rank
from seqmesh.parallel.plan import ParallelPlan
from seqmesh.parallel.recompute import recompute
from seqmesh.parallel.recurrent_heads import OwnHeads, share_recurrent_heads
from seqmesh.parallel.split import split
from seqmesh.parallel.tensor import plan_of, share_matrices


def parallelize(
    model: PreTrainedModel | PeftModel, mesh: ParallelMesh, plan: ParallelPlan | None = None
) -> ParallelModel:
    """Make a causal LM parallel: in place, or with pp > 1 copies of this rank's layers.

    Args:
        model: with the same weights on every rank, or on the meta device; a PeftModel's is trained with its
            LoRA adapters.
        mesh: of all parallelisms.
        plan: sharding, recomputation and the order of a pipeline.

    Raises:
        ValueError: on all ranks alike, a model or a plan that does not fit the mesh.
    """
    plan = plan or ParallelPlan()
    _check(mesh, plan)
    model = unwrapped(model)
    check_adapters(model, mesh.dims.tp, plan.experts)
    model.train()
    styles = plan_of(model, mesh.dims, plan.experts) if mesh.dims.tp > 1 else {}
    _check_heads(model, mesh)
    if mesh.dims.pp == 1:
        parts: tuple[ModelPart, ...] = (ModelPart(model, loss_rows=plan.loss_rows),)
    else:
        count = stage_count(mesh, plan)
        parts = split(model, stages_of_rank(mesh, plan), count, loss_rows=plan.loss_rows)
    if plan.balance > 0:
        parts[0].balance = BalanceLoss(parts[0].hf, mesh, plan.balance)
    for part in parts:
        if styles:
            share_matrices(part.hf, mesh.tp, styles, shard_norms=plan.shard_norms)
        experts = share_experts(part.hf, mesh, plan) if plan.experts > 1 else None
        plug_in(part.hf)
        if mesh.dims.tp > 1:
            share_recurrent_heads(part.hf, OwnHeads.of(mesh.tp))
        recompute(part, plan)
        if mesh.device_mesh is not None and plan.zero > 1:
            shard_parameters(part, mesh.fsdp, plan, experts)
    return ParallelModel(parts, mesh, plan)


def _check_heads(model: PreTrainedModel, mesh: ParallelMesh) -> None:
    heads = model.config.num_attention_heads // mesh.dims.tp
    if heads < mesh.dims.ulysses:
        raise ValueError(
            f"ulysses={mesh.dims.ulysses} with {heads} query heads on each rank of tp={mesh.dims.tp} leaves"
            f" ranks without a head; use ulysses <= {heads} and put the rest on ring"
        )


def _check(mesh: ParallelMesh, plan: ParallelPlan) -> None:
    if mesh.device_mesh is None and plan.param_dtype is not None:
        raise ValueError(
            f"param_dtype={plan.param_dtype} without a process group, where nothing is gathered in another"
            " dtype; initialise one, also for one rank"
        )
    if plan.experts > 1:
        check_degree(mesh.dims, plan.experts)
    if plan.shard_norms and plan.balance > 0:
        raise ValueError(
            f"shard_norms=True with balance={plan.balance}: that loss takes routers to have all rows of a"
            " rank; use one of them"
        )
    if plan.shard_norms and mesh.dims.tp == 1:
        raise ValueError("shard_norms=True with tp=1: no other rank has the same rows; leave it out")
    if plan.pipeline != "1f1b" and mesh.dims.pp == 1:
        raise ValueError(f"pipeline={plan.pipeline!r} with pp=1: there are no stages to order; leave it out")
