"""From a recipe to what trains: degrees to a mesh, the planner's words to a plan, a model with weights.

    [mesh]   -> ParallelDims      [train] -> ParallelPlan      [model] -> a transformers model, made parallel

Every rank starts from the weights that the run's seed gives one rank. Where ranks hold whole models they make
them; where they hold parts, rank 0 makes the whole and the others get their parts of it.
"""

from functools import partial

import torch

from seqmesh.parallel import (
    ParallelDims,
    ParallelMesh,
    ParallelModel,
    ParallelPlan,
    load_from_rank_0,
    parallelize,
)
from seqmesh.train import model as models
from seqmesh.train.config import Config, MeshConfig, TrainConfig
from seqmesh.train.data import TokenIds

MLP_ROWS = 4096
"""Tokens of an MLP's tile."""


def dims_of(mesh: MeshConfig) -> ParallelDims:
    """The degrees of a recipe."""
    return ParallelDims(**mesh.degrees)


def plan_of(train: TrainConfig) -> ParallelPlan:
    """What a recipe says beside its degrees."""
    return ParallelPlan(
        zero=train.zero,
        param_dtype=torch.bfloat16 if train.precision == "bf16" else None,
        recompute=train.checkpointing,
        offload=train.offload in ("activations", "both"),
        shard_norms=train.shard_norms,
        offload_optimizer=train.offload in ("optimizer", "both"),
        mlp_rows=MLP_ROWS if train.tiling == "mlp" else None,
        pipeline="zero_bubble" if train.pipeline == "zero-bubble" else train.pipeline,
    )


def build(config: Config, mesh: ParallelMesh, vocabulary: TokenIds | None = None) -> ParallelModel:
    """This rank's part of the model, with the weights of the run's seed. A collective over all ranks."""
    plan = plan_of(config.train)
    whole = partial(models.build, config, vocabulary)
    if mesh.dims.tp == mesh.dims.pp == 1 and plan.zero < 2:
        model = whole()
        if mesh.device_type != "cpu":  # where it is already, and fake tensors cannot be moved
            model.to(mesh.device_type)
        return parallelize(model, mesh, plan)
    with torch.device("meta"):
        hollow = whole()
    made = parallelize(hollow, mesh, plan)
    load_from_rank_0(made, whole)
    return made


def check(config: Config) -> dict[str, tuple[int, ...]]:
    """Raise what `build` would raise of a model, without allocating or computing: before a rank starts.

    Returns:
        The shape of every parameter, by name.
    """
    with torch.device("meta"):
        model = parallelize(models.build(config), ParallelDims().build(), ParallelPlan(zero=0))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
