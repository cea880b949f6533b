"""From a recipe to what trains: degrees to a mesh, the planner's words to a plan, a model with weights.

    [mesh]   -> ParallelDims      [train] -> ParallelPlan      [model] -> a transformers model, made parallel

Every rank starts from the weights of the model's folder, of which it reads what it holds, or from those that
the run's seed gives one rank. Where ranks hold whole models they make them; where they hold parts, rank 0
makes the whole and the others get their parts of it.
"""

from functools import partial

import torch
from transformers import PreTrainedModel

from seqmesh.parallel import (
    ParallelDims,
    ParallelMesh,
    ParallelModel,
    ParallelPlan,
    experts,
    load_folder,
    load_from_rank_0,
    parallelize,
    split,
    tensor,
)
from seqmesh.parallel.adapters import check_adapters
from seqmesh.train import folder as folders
from seqmesh.train import model as models
from seqmesh.train.config import Config, MeshConfig, check_fits
from seqmesh.train.data import TokenIds
from seqmesh.train.lora import adapt

MLP_ROWS = 4096
"""Tokens of an MLP's tile."""


def dims_of(mesh: MeshConfig) -> ParallelDims:
    """The degrees of a recipe."""
    return ParallelDims(**mesh.degrees)


def plan_of(config: Config) -> ParallelPlan:
    """What a recipe says beside its degrees."""
    train = config.train
    return ParallelPlan(
        zero=train.zero,
        param_dtype=torch.bfloat16 if train.precision == "bf16" else None,
        recompute=train.checkpointing,
        offload=train.offload in ("activations", "both"),
        shard_norms=train.shard_norms,
        offload_optimizer=train.offload in ("optimizer", "both"),
        experts=config.mesh.experts,
        balance=train.balance,
        mlp_rows=MLP_ROWS if train.tiling == "mlp" else None,
        pipeline="zero_bubble" if train.pipeline == "zero-bubble" else train.pipeline,
    )


def build(
    config: Config, mesh: ParallelMesh, hollow: PreTrainedModel, vocabulary: TokenIds | None = None
) -> ParallelModel:
    """This rank's part of the model, with the weights of its folder, or random ones of the run's seed.

    A collective over all ranks.

    Args:
        config: the run.
        mesh: of all parallelisms.
        hollow: the model on the meta device, which may become the part.
        vocabulary: of the text; default: that of the recipe's tokenizer.
    """
    plan = plan_of(config)
    whole = partial(models.build, config, vocabulary)
    folder = config.model.folder
    stored = folders.weights_of(folder, hollow) if folder else "none"
    if stored == "none" and mesh.dims.tp == mesh.dims.pp == 1 and plan.zero < 2:
        model = whole()
        if mesh.device_type != "cpu":  # where it is already, and fake tensors cannot be moved
            model.to(mesh.device_type)
        return parallelize(model, mesh, plan)
    made = parallelize(hollow, mesh, plan)
    if stored == "own":
        load_folder(made, folders.path_of(folder), config.train.seed)
    elif stored == "converted":
        load_from_rank_0(made, lambda: adapt(folders.build_converted(folder), config.lora, config.train.seed))
    else:
        load_from_rank_0(made, whole)
    return made


def check(config: Config) -> dict[str, tuple[int, ...]]:
    """Raise what `build` would raise of a model, without allocating or computing: before a rank starts.

    Returns:
        The shape of every parameter, by name.
    """
    hollow = models.build_hollow(config)
    sizes = models.sizes_of(config, hollow)
    for fitting in sizes.fits(config.model.folder):
        check_fits(config, fitting)
    sizes.kinds  # noqa: B018  (raises if there are several windows)
    folders.check_trainable(hollow, sizes, config.data.seq_len)
    if config.model.folder:
        folders.weights_of(config.model.folder, hollow)
    _check_plans(hollow, config)
    plan = ParallelPlan(zero=0, balance=config.train.balance)
    model = parallelize(hollow, ParallelDims().build(), plan)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _check_plans(hollow: PreTrainedModel, config: Config) -> None:
    """What tp, spread experts or a pipeline cannot do with this model."""
    mesh, dims = config.mesh, dims_of(config.mesh)
    check_adapters(hollow, mesh.tp, mesh.experts)
    if mesh.tp > 1:
        tensor.check_ranges(hollow, dims, mesh.experts)
    if mesh.experts > 1:
        experts.expert_plan_of(hollow, dims, mesh.experts)
    if mesh.pp > 1:
        split.check_stages(hollow, mesh.pp if config.train.pipeline == "1f1b" else 2 * mesh.pp)
