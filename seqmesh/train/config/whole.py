"""A whole recipe, and the rules that join its sections."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from seqmesh.train.config.data import DataConfig
from seqmesh.train.config.mesh import MeshConfig
from seqmesh.train.config.model import ModelConfig
from seqmesh.train.config.optimisation import TrainConfig
from seqmesh.train.config.rules import STRICT, require
from seqmesh.train.config.running import RunConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    def __post_init__(self) -> None:
        _check_heads(self.mesh, self.model)
        _check_stages(self)
        self.micro_batches  # noqa: B018  (raises if the sequences do not divide)

    @property
    def micro_batch(self) -> int:
        """Packed sequences of a micro-batch."""
        return self.train.micro_batch or self.data.sequences // self.mesh.data_parallel

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        mine, rest = divmod(self.data.sequences, self.mesh.data_parallel)
        require(
            rest == 0 and mine > 0,
            f"data.sequences={self.data.sequences} does not divide over {self.mesh.data_parallel}"
            f" data-parallel ranks; use a multiple of {self.mesh.data_parallel}",
        )
        count, rest = divmod(mine, self.micro_batch)
        require(
            rest == 0,
            f"train.micro_batch={self.micro_batch} does not divide the {mine} sequences of a data-parallel"
            f" rank; use a divisor of {mine}",
        )
        return count


def _check_heads(mesh: MeshConfig, model: ModelConfig) -> None:
    require(
        model.heads % mesh.tp == 0,
        f"mesh.tp={mesh.tp} does not divide model.heads={model.heads}; use a divisor of {model.heads}",
    )
    require(
        model.kv_heads % mesh.tp == 0 or mesh.tp % model.kv_heads == 0,
        f"mesh.tp={mesh.tp} with model.kv_heads={model.kv_heads}: neither divides the other; use a tp that"
        " divides them or that they divide",
    )
    heads = model.heads // mesh.tp
    idle = mesh.ulysses - heads
    share = "" if mesh.tp == 1 else f" / mesh.tp={mesh.tp}"
    require(
        idle <= 0,
        f"mesh.ulysses={mesh.ulysses} with model.heads={model.heads}{share} query heads"
        f" leaves {idle} ranks without a head;"
        f" use mesh.ulysses <= {heads} and put the rest on mesh.ring",
    )


def _check_stages(config: "Config") -> None:
    mesh, train = config.mesh, config.train
    require(
        mesh.tp > 1 or not train.shard_norms,
        "train.shard_norms with mesh.tp=1: no other rank has the same tokens; leave it out",
    )
    if mesh.pp == 1:
        require(
            train.pipeline == "1f1b",
            f'train.pipeline="{train.pipeline}" with mesh.pp=1: there are no stages to order; leave it out',
        )
        return
    stages = mesh.pp * (1 if train.pipeline == "1f1b" else 2)
    require(
        config.model.layers >= stages,
        f"model.layers={config.model.layers} for {stages} pipeline stages; use fewer, each needs a layer",
    )
    require(
        not config.model.tie_embeddings,
        f"model.tie_embeddings with mesh.pp={mesh.pp}: the first and the last stage would both have them;"
        " use mesh.pp=1, or model.tie_embeddings=false",
    )
    count = config.micro_batches
    require(
        count >= mesh.pp and (train.pipeline == "1f1b" or count % mesh.pp == 0),
        f"{count} micro-batches of train.micro_batch={config.micro_batch} sequences for mesh.pp={mesh.pp}"
        f" in the order {train.pipeline}; use more data.sequences, or a smaller train.micro_batch, for"
        f" {'at least' if train.pipeline == '1f1b' else 'a multiple of'} {mesh.pp}",
    )
