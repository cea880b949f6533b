"""A whole recipe, and the rules that join its sections."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from seqmesh.train.config.data import DataConfig
from seqmesh.train.config.lora import AdapterConfig
from seqmesh.train.config.mesh import MeshConfig
from seqmesh.train.config.model import ModelConfig
from seqmesh.train.config.optimisation import TrainConfig
from seqmesh.train.config.rules import STRICT, require
from seqmesh.train.config.running import RunConfig
from seqmesh.train.config.sizes import DecoderSizes


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    def __post_init__(self) -> None:
        _check_experts(self)
        require(
            self.lora.rank == 0 or self.model.folder != "",
            f"lora.rank={self.lora.rank} without model.folder: adapters are of a model that has been trained;"
            " give its folder, or leave lora.rank out",
        )
        if not self.model.folder:
            check_fits(self, self.model.sizes)
        _check_orders(self)
        self.micro_batches  # noqa: B018  (raises if the sequences do not divide)

    @property
    def has_group(self) -> bool:
        """Whether ranks are a process group: several, or one of FSDP, which makes weights in bf16 and keeps
        states on the host."""
        return self.mesh.world > 1 or self.train.zero >= 2

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


def check_fits(config: Config, sizes: DecoderSizes) -> None:
    """Refuse a model that does not fit the mesh.

    Raises:
        ValueError: heads that do not divide, fewer layers than stages, experts that are not there, ...
    """
    _check_heads(config.mesh, sizes)
    _check_layers(config, sizes)
    require(
        sizes.experts > 0 or (config.mesh.experts == 1 and config.train.balance == 0),
        f"mesh.experts={config.mesh.experts} and train.balance={config.train.balance} with"
        f" model {config.model.name}, which has no experts; leave them out, or give model.experts, or the"
        " model.folder of a mixture of experts",
    )
    require(
        config.mesh.experts == 1 or sizes.experts % config.mesh.experts == 0,
        f"mesh.experts={config.mesh.experts} does not divide the {sizes.experts} experts of"
        f" model {config.model.name}; use a divisor of {sizes.experts}",
    )


def _check_heads(mesh: MeshConfig, sizes: DecoderSizes) -> None:
    require(
        sizes.heads % mesh.tp == 0,
        f"mesh.tp={mesh.tp} does not divide {sizes.named('heads')}; use a divisor of {sizes.heads}",
    )
    require(
        sizes.kv_heads % mesh.tp == 0 or mesh.tp % sizes.kv_heads == 0,
        f"mesh.tp={mesh.tp} with {sizes.named('kv_heads')}: neither divides the other; use a tp that"
        " divides them or that they divide",
    )
    heads = sizes.heads // mesh.tp
    idle = mesh.ulysses - heads
    share = "" if mesh.tp == 1 else f" / mesh.tp={mesh.tp}"
    require(
        idle <= 0,
        f"mesh.ulysses={mesh.ulysses} with {sizes.named('heads')}{share} query heads"
        f" leaves {idle} ranks without a head;"
        f" use mesh.ulysses <= {heads} and put the rest on mesh.ring",
    )


def _check_layers(config: Config, sizes: DecoderSizes) -> None:
    mesh, train = config.mesh, config.train
    if mesh.pp == 1:
        return
    stages = mesh.pp * (1 if train.pipeline == "1f1b" else 2)
    require(
        sizes.layers >= stages,
        f"{sizes.named('layers')} for {stages} pipeline stages; use fewer, each needs a layer",
    )
    require(
        not sizes.tie_embeddings,
        f"{sizes.named('tie_embeddings')} with mesh.pp={mesh.pp}: the first and the last stage would both"
        " have them; use mesh.pp=1, or untie them",
    )


def _check_experts(config: Config) -> None:
    mesh, train = config.mesh, config.train
    ranks = math.prod(mesh.degrees[axis] for axis in ("dp_shard", "ring", "ulysses", "tp"))
    require(
        mesh.experts == 1 or (ranks % mesh.experts == 0 and mesh.experts % mesh.tp == 0),
        f"mesh.experts={mesh.experts} over dp_shard x ring x ulysses x tp = {ranks} ranks with"
        f" mesh.tp={mesh.tp}; use a degree that divides them, and a multiple of mesh.tp",
    )
    require(
        mesh.experts == 1 or train.zero >= 2,
        f"mesh.experts={mesh.experts} with train.zero={train.zero}: experts are spread over ranks that share"
        " parameters; use train.zero=2 or 3",
    )
    require(
        train.balance == 0 or not train.shard_norms,
        f"train.balance={train.balance} with train.shard_norms: that loss takes routers to have all rows of a"
        " rank; use one of them",
    )
    require(
        train.balance == 0 or mesh.pp == 1,
        f"train.balance={train.balance} with mesh.pp={mesh.pp}: that loss needs the routers of all layers,"
        " and a stage has some; use mesh.pp=1, or train.balance=0",
    )


def _check_orders(config: Config) -> None:
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
    count = config.micro_batches
    require(
        count >= mesh.pp and (train.pipeline == "1f1b" or count % mesh.pp == 0),
        f"{count} micro-batches of train.micro_batch={config.micro_batch} sequences for mesh.pp={mesh.pp}"
        f" in the order {train.pipeline}; use more data.sequences, or a smaller train.micro_batch, for"
        f" {'at least' if train.pipeline == '1f1b' else 'a multiple of'} {mesh.pp}",
    )
