"""A recipe of `seqmesh train` as the planner's job and point: the way back of `seqmesh plan --emit`.

    job, point, missing = of_recipe(config, cluster)
    CostModel(job).estimate(point).seconds

`missing` names what the planner prices in another way.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from seqmesh.planner.inputs.hardware import Cluster
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.numerics import numerics_for
from seqmesh.planner.inputs.point import CHECKPOINTING, Point
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.train.config import Config, ModelConfig, TrainConfig


class Priced(NamedTuple):
    """A recipe in the planner's terms."""

    job: Job
    point: Point
    missing: tuple[str, ...]
    """Keys whose values the planner does not price, and what it takes in their place."""


def of_recipe(config: Config, cluster: Cluster, *, vocabulary: int) -> Priced:
    """The job and the point of a recipe on a cluster.

    Args:
        config: the run. Its text is not read: each sequence is one document.
        cluster: as large as the mesh, or larger.
        vocabulary: token ids of the model.

    Raises:
        ValueError: a model of a folder, a precision that the cluster's GPU has no rate for, or what no job
            can be.
    """
    mesh, train, data = config.mesh, config.train, config.data
    degrees = mesh.degrees
    job = Job(
        model=_shape(config.model, vocabulary),
        cluster=cluster,
        seq_len=data.seq_len,
        global_batch=data.sequences,
        layout=mesh.placement,
        numerics=numerics_for(train.precision, "fp32"),
    )
    point = Point(
        tp=degrees["tp"],
        ulysses=degrees["ulysses"],
        ring=degrees["ring"],
        dp=mesh.data_parallel,
        pp=degrees["pp"],
        zero=train.zero,
        checkpointing=train.checkpointing if train.checkpointing in CHECKPOINTING else "none",
        offload=train.offload,
        # The trainer's loss is always tiled.
        tiling="mlp" if train.tiling == "mlp" else "loss",
        micro_batch=config.micro_batch,
    )
    return Priced(job, point, tuple(_missing(train)))


def _missing(train: TrainConfig) -> Iterator[str]:
    if train.checkpointing not in CHECKPOINTING:
        yield f'train.checkpointing="{train.checkpointing}" as "none"'
    if train.pipeline != "1f1b":
        yield f'train.pipeline="{train.pipeline}" as "1f1b"'


def _shape(model: ModelConfig, vocabulary: int) -> ModelShape:
    if model.folder:
        raise ValueError(
            f"model.folder={model.folder!r}: the planner prices a recipe whose model is in its keys;"
            " use seqmesh plan --model FOLDER"
        )
    return ModelShape(
        name=model.architecture,
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        intermediate=model.intermediate,
        vocabulary=vocabulary,
        tied_embeddings=model.tie_embeddings,
        sliding_window=model.window or None,
        source="a recipe",
    )


def nodes_for(cluster: Cluster, ranks: int) -> Cluster:
    """As many nodes of a cluster as hold so many ranks; one that is not full if they do not fill it."""
    if ranks <= cluster.gpus_per_node:
        return replace(cluster, nodes=1, gpus_per_node=ranks)
    nodes, rest = divmod(ranks, cluster.gpus_per_node)
    if rest:
        raise ValueError(
            f"{ranks} ranks do not fill nodes of {cluster.gpus_per_node}; use a multiple, or fewer than one"
        )
    return replace(cluster, nodes=nodes)
