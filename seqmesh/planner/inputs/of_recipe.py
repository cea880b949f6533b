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
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.shape import MixtureShape, ModelShape
from seqmesh.planner.inputs.stack import TrainerStack
from seqmesh.train.config import Config, ModelConfig


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
    job = Job(
        model=_shape(config.model, vocabulary),
        cluster=cluster,
        seq_len=config.data.seq_len,
        global_batch=config.data.sequences,
        documents=_documents(config),
        layout=config.mesh.placement,
        numerics=numerics_for(config.train.precision, "fp32"),
        stack=TrainerStack(),
    )
    return Priced(job, _point(config), tuple(_missing(config)))


def _missing(config: Config) -> Iterator[str]:
    """What of a recipe a point does not say."""
    train, degrees = config.train, config.mesh.degrees
    if degrees["tp"] > 1 and not train.shard_norms:
        yield "train.shard_norms=false as true"
    if train.zero >= 2 and degrees["dp_replicate"] > 1:
        yield f"mesh.dp_replicate={degrees['dp_replicate']} as dp_shard"
    if config.mesh.pool and degrees["dp_replicate"] > 1 and config.micro_batch > 1:
        yield f"mesh.pool with dp_replicate={degrees['dp_replicate']}: sequences side by side, not end to end"
    if train.pipeline != "1f1b":
        yield f'train.pipeline="{train.pipeline}" as "1f1b"'


def _point(config: Config) -> Point:
    train, degrees = config.train, config.mesh.degrees
    return Point(
        tp=degrees["tp"],
        ulysses=degrees["ulysses"],
        ring=degrees["ring"],
        dp=config.mesh.data_parallel,
        pp=degrees["pp"],
        zero=train.zero,
        checkpointing=train.checkpointing,
        offload=train.offload,
        # The trainer's loss is always tiled.
        tiling="mlp" if train.tiling == "mlp" else "loss",
        micro_batch=config.micro_batch,
        experts=config.mesh.experts,
        pool=_is_pool(config),
    )


def _is_pool(config: Config) -> bool:
    """Whether several sequences lie in a row on one ring, as a pool's do, and balanced."""
    degrees = config.mesh.degrees
    on_one_ring = config.mesh.data_parallel == 1 and degrees["ring"] > 1
    return config.mesh.pool and on_one_ring and config.micro_batch > 1


def _documents(config: Config) -> tuple[int, ...]:
    """Each sequence of a pool as one document: it is documents that a pool places."""
    return (config.data.seq_len,) * config.data.sequences if _is_pool(config) else ()


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
        head_dim=model.elements_of_head,
        intermediate=model.intermediate,
        vocabulary=vocabulary,
        tied_embeddings=model.tie_embeddings,
        sliding_window=model.window or None,
        mixture=_mixture(model),
        source="a recipe",
    )


def _mixture(model: ModelConfig) -> MixtureShape | None:
    if not model.experts:
        return None
    return MixtureShape(
        experts=model.experts,
        active=model.experts_per_token,
        intermediate=model.intermediate,
        architecture=model.architecture,
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
