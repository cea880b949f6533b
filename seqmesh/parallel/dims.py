"""The degrees of every parallelism, the one device mesh they make, and the views that each takes of it.

    axis           pp   dp_replicate   dp_shard   ring   ulysses   tp     slower links ... faster links
    sequence                                      ring x ulysses          ranks that share a sequence
    fsdp                               [dp_shard x ring x ulysses]        ranks that share the parameters
    fsdp, HSDP          dp_replicate x [dp_shard x ring x ulysses]        the same, replicated
    data               [dp_replicate x dp_shard]                          ranks with batches of their own
    experts                            [dp_shard x ring x ulysses x tp]   ranks that share experts
    replicas           [dp_replicate x dp_shard x ring x ulysses]         ranks whose gradients are summed
    losses        [pp x dp_replicate x dp_shard x ring x ulysses]         ranks whose losses are summed

[...] is one flattened axis. Ranks of a sequence hold different tokens, so for parameters they are like any
other data-parallel rank; ranks of tp compute the same loss, so it is summed over the others only.

Source: the order of the axes is the USP paper's best practice; torchtitan for the flattened axes.
"""

from dataclasses import dataclass, fields
from datetime import timedelta
from math import prod
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from seqmesh.engine.mesh import SequenceMesh

SHARDED = ("dp_shard", "ring", "ulysses")
"""Axes over which parameters are sharded."""

_FLATTENED = {
    "fsdp": SHARDED,
    "experts": (*SHARDED, "tp"),
    "replicas": ("dp_replicate", *SHARDED),
    "sequence": ("ring", "ulysses"),
    "data": ("dp_replicate", "dp_shard"),
    "losses": ("pp", "dp_replicate", *SHARDED),
}


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """The degree of every parallelism; their product is the number of ranks."""

    pp: int = 1
    """Pipeline stages lie on this many ranks, one after the other."""
    dp_replicate: int = 1
    """Copies of the sharded parameters (HSDP)."""
    dp_shard: int = 1
    """Ranks with batches of their own that share the parameters (ZeRO)."""
    ring: int = 1
    """Ranks that walk over keys and values of one sequence."""
    ulysses: int = 1
    """Ranks that swap shards of a sequence for heads."""
    tp: int = 1
    """Ranks that share every matrix of a layer."""

    def __post_init__(self) -> None:
        """Refuse what is no degree."""
        for name, degree in self.degrees.items():
            if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
                raise ValueError(
                    f"{name}={degree!r}: a degree is a whole number of ranks, at least 1;"
                    " use 1 to leave an axis out"
                )

    @property
    def degrees(self) -> dict[str, int]:
        """Axis -> degree, from the outermost axis to the innermost."""
        return {axis.name: getattr(self, axis.name) for axis in fields(self)}

    @property
    def world(self) -> int:
        """Ranks of all axes together."""
        return prod(self.degrees.values())

    @property
    def shards(self) -> int:
        """Ranks that share the parameters, but for tp: those of fsdp."""
        return prod(self.degrees[axis] for axis in SHARDED)

    def build(self, device_type: str = "cpu", timeout: timedelta | None = None) -> "ParallelMesh":
        """The mesh over the default process group. A collective: every rank calls it.

        Args:
            device_type: "cpu", "cuda", ...: where parameters and tokens are.
            timeout: how long a rank waits for the others in an exchange before it fails, for every group of
                the mesh, the default one included where an axis spans it. Default: PyTorch's for new groups,
                which is half an hour with gloo, whatever the default group was given.

        Returns:
            The mesh; of a single process without a process group if the degrees say one rank.

        Raises:
            ValueError: degrees whose product is not the number of ranks.
        """
        is_ready = dist.is_available() and dist.is_initialized()
        ranks = dist.get_world_size() if is_ready else 1
        if self.world != ranks:
            got = " x ".join(f"{name}={degree}" for name, degree in self.degrees.items() if degree > 1)
            rule = f"there are {ranks} ranks" if is_ready else "no process group is initialised"
            raise ValueError(
                f"{got or 'all degrees of 1'} needs {self.world} ranks but {rule};"
                f" choose degrees whose product is {ranks}"
            )
        if not is_ready:
            return ParallelMesh(dims=self, sequence=SequenceMesh.build(), device_mesh=None, flattened={})
        root = init_device_mesh(device_type, tuple(self.degrees.values()), mesh_dim_names=tuple(self.degrees))
        flattened = {name: root[axes]._flatten(name) for name, axes in _FLATTENED.items()}
        sequence = SequenceMesh.from_device_mesh(root)
        _ = sequence.as_ring  # which hybrid models need, and is a collective: while every rank is here
        mesh = ParallelMesh(
            dims=self,
            sequence=sequence,
            device_mesh=root,
            flattened=flattened,
            timeout=timeout,
        )
        mesh.limit(root, *flattened.values())
        return mesh


@dataclass(frozen=True, kw_only=True, eq=False)
class ParallelMesh:
    """Where this rank stands on the mesh of all parallelisms, and the groups it talks to."""

    dims: ParallelDims
    sequence: SequenceMesh
    """ring x ulysses: what schedules are built for."""
    device_mesh: DeviceMesh | None
    """The axes of `ParallelDims`; None for a process without a process group."""
    flattened: dict[str, DeviceMesh]
    """Flattened axes by their name at the top of the file; empty without a process group."""
    timeout: timedelta | None = None
    """How long a rank waits for the others in an exchange; None: as long as PyTorch lets it."""

    def limit(self, *meshes: DeviceMesh) -> None:
        """Give the groups of meshes this one's timeout."""
        if self.timeout is None:
            return
        # init_device_mesh takes none; PyTorch has no public way to change that of a group.
        for mesh in meshes:
            for group in mesh.get_all_groups():
                _set_pg_timeout(self.timeout, group)

    @property
    def fsdp(self) -> DeviceMesh:
        """One axis of ranks that share the parameters; with dp_replicate > 1, a second one outside of it."""
        assert self.device_mesh is not None
        if self.dims.dp_replicate == 1:
            return self.flattened["fsdp"]
        return DeviceMesh._concatenate([self.device_mesh["dp_replicate"], self.flattened["fsdp"]])

    @property
    def tp(self) -> DeviceMesh:
        """The axis of tensor parallelism."""
        assert self.device_mesh is not None
        return self.device_mesh["tp"]

    @property
    def axes(self) -> tuple[str, ...]:
        """Every name that `group` takes: the axes, then the flattened ones."""
        return (*self.dims.degrees, *_FLATTENED)

    def group(self, name: str) -> Any:
        """The process group of an axis or of a flattened one; None where it has one rank."""
        if self.device_mesh is None:
            return None
        mesh = self.flattened[name] if name in self.flattened else self.device_mesh[name]
        return mesh.get_group() if mesh.size() > 1 else None

    @property
    def device_type(self) -> str:
        """Where parameters and tokens are."""
        return "cpu" if self.device_mesh is None else self.device_mesh.device_type

    def rank(self, name: str) -> int:
        """This rank's place on an axis or on a flattened one."""
        if self.device_mesh is None:
            return 0
        if name in self.flattened:
            return self.flattened[name].get_local_rank()
        return self.device_mesh.get_local_rank(name)

    @property
    def number(self) -> int:
        """This rank's number among all."""
        return 0 if self.device_mesh is None else self.device_mesh.get_rank()
