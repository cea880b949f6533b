"""The two-dimensional mesh of a sequence: ring (outer, slower links) x ulysses (inner, faster links).

A `SequenceMesh` is a view of a `torch.distributed.device_mesh.DeviceMesh`: it names which ranks share heads
and which walk over K/V. It owns no state and sets nothing up globally, so several meshes can live in one
process.

    ring 2 x ulysses 3, 6 ranks          ulysses group: one row, all-to-all swaps sequence for heads
      ring 0:  0 1 2                     ring group: one column, K/V rows travel
      ring 1:  3 4 5

Source: the order of the axes is the USP paper's best practice 7, ulysses on the faster links.
"""

from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceMesh:
    """Where this rank stands on the ring x ulysses mesh. Build it with `build` or `from_device_mesh`."""

    ulysses: int
    """Ulysses degree U: ranks that swap sequence shards for head shards."""
    ring: int
    """Ring degree R: ranks that exchange key/value rows."""
    ulysses_rank: int
    ring_rank: int
    ulysses_group: str | None
    """Name of the ulysses process group, None for U = 1.

    Names are what functional collectives and torch.compile take.
    """
    ring_group: str | None
    """Name of the ring process group, None for R = 1."""
    device_mesh: DeviceMesh | None
    """The mesh this is a view of, None for a process without a process group."""
    axes: tuple[str, ...] = ()
    """Names of its axes in the device mesh, ring before ulysses, without those of degree 1."""

    @property
    def size(self) -> int:
        """Ranks that share one sequence: ulysses x ring."""
        return self.ulysses * self.ring

    @cached_property
    def device_types(self) -> frozenset[str]:
        """Devices whose tensors the ranks can exchange, as their process groups say; empty for one rank.

        A group that was made without a backend's name exchanges CPU tensors by gloo and CUDA tensors by NCCL.
        """
        groups = [name for name in (self.ulysses_group, self.ring_group) if name is not None]
        types = [frozenset(_device_types(_group(name))) for name in groups]
        return frozenset.intersection(*types) if types else frozenset()

    @property
    def rank(self) -> int:
        """Place of this rank in the sequence: ring_rank * ulysses + ulysses_rank."""
        return self.ring_rank * self.ulysses + self.ulysses_rank

    @cached_property
    def as_ring(self) -> "SequenceMesh":
        """The same ranks in the same order, all of them on the ring axis.

        With both degrees above 1 that makes a process group, once: a collective over the device mesh.
        """
        if self.ulysses == 1:
            return self
        group = self.ulysses_group
        if self.ring > 1:
            assert self.device_mesh is not None
            group = self.device_mesh[self.axes]._flatten("_x_".join(self.axes)).get_group().group_name
        return replace(
            self,
            ulysses=1,
            ring=self.size,
            ulysses_rank=0,
            ring_rank=self.rank,
            ulysses_group=None,
            ring_group=group,
            axes=(),
        )

    @property
    def sequence_group(self) -> str | None:
        """Name of the group of all ranks that share the sequence, in their order; None for one rank.

        With both degrees above 1 the first call is a collective, see `as_ring`.
        """
        if self.ulysses == 1:
            return self.ring_group
        return self.ulysses_group if self.ring == 1 else self.as_ring.ring_group

    @staticmethod
    def alone() -> "SequenceMesh":
        """The 1 x 1 mesh: one rank by itself, which exchanges nothing, whatever process groups there are."""
        return SequenceMesh(
            ulysses=1,
            ring=1,
            ulysses_rank=0,
            ring_rank=0,
            ulysses_group=None,
            ring_group=None,
            device_mesh=None,
        )

    @staticmethod
    def build(
        *,
        ulysses: int = 1,
        ring: int = 1,
        device_type: str | None = None,
        timeout: timedelta | None = None,
    ) -> "SequenceMesh":
        """A mesh over the whole default process group, or the 1 x 1 mesh of a single process without one.

        Args:
            ulysses: ulysses degree.
            ring: ring degree.
            device_type: of the device mesh: "cpu", "cuda", ...; default: "cuda" where the default group runs
                NCCL, also if it was made without a backend's name, else "cpu". Whatever this is, attention
                takes tensors of every device type that the group exchanges.
            timeout: how long a rank waits for the others in an exchange before it fails. Default: PyTorch's
                for new groups, which is half an hour with gloo, whatever the default group was given.

        Raises:
            ValueError: a degree below 1, or ulysses x ring that is not the number of ranks.
        """
        if ulysses < 1 or ring < 1:
            raise ValueError(
                f"ulysses={ulysses} x ring={ring}: a degree is at least 1; use 1 to leave an axis out"
            )
        is_ready = dist.is_available() and dist.is_initialized()
        _check_world(ulysses, ring, dist.get_world_size() if is_ready else None)
        if not is_ready:
            return SequenceMesh.alone()
        if device_type is None:
            device_type = _default_device_type()
        return SequenceMesh.from_device_mesh(_device_mesh(device_type, ulysses, ring, timeout))

    @staticmethod
    def from_device_mesh(
        device_mesh: DeviceMesh, *, ulysses: str | None = "ulysses", ring: str | None = "ring"
    ) -> "SequenceMesh":
        """The view of two named axes of a device mesh, whatever other axes (pp, dp, tp) it has.

        Args:
            device_mesh: a mesh with named axes.
            ulysses: name of the ulysses axis; None for a ulysses degree of 1.
            ring: name of the ring axis; None for a ring degree of 1.

        Raises:
            ValueError: an axis that the mesh does not have, the same axis twice, or a ring axis inside the
                ulysses axis.
        """
        _check_axes(device_mesh, ulysses, ring)
        inner = _Axis.of(device_mesh, ulysses)
        outer = _Axis.of(device_mesh, ring)
        return SequenceMesh(
            ulysses=inner.size,
            ring=outer.size,
            ulysses_rank=inner.rank,
            ring_rank=outer.rank,
            ulysses_group=inner.group,
            ring_group=outer.group,
            device_mesh=device_mesh,
            axes=tuple(name for name, axis in ((ring, outer), (ulysses, inner)) if name and axis.size > 1),
        )


def _default_device_type() -> str:
    """The device type of the default group's mesh."""
    backend = str(dist.get_backend())
    if backend == "undefined":  # made without a name: a backend for the CPU, and one for what else there is
        return max(_device_types(dist.group.WORLD) - {"cpu"}, default="cpu")
    return "cuda" if "nccl" in backend else "cpu"


def _group(name: str) -> Any:
    return _resolve_process_group(name)  # type: ignore[arg-type]  # a str with another name


def _device_types(group: Any) -> set[str]:
    """Types of the devices whose tensors a process group exchanges.

    Not from `get_backend`, which knows no name for a group that has a backend for each of several devices.
    """
    return {device.type for device in group._device_types}


def _check_world(ulysses: int, ring: int, world: int | None) -> None:
    """Raise ValueError unless the degrees use every rank; `world` is None without a process group."""
    ranks = 1 if world is None else world
    if ulysses * ring != ranks:
        if world is None:
            rule = "no process group is initialised, which makes 1 rank"
        else:
            rule = f"the default process group has {world} ranks"
        raise ValueError(
            f"ulysses={ulysses} x ring={ring} needs {ulysses * ring} ranks but {rule};"
            f" choose degrees whose product is {ranks},"
            " or pass a slice of a larger mesh to SequenceMesh.from_device_mesh"
        )


def _device_mesh(device_type: str, ulysses: int, ring: int, timeout: timedelta | None) -> DeviceMesh:
    """The ring x ulysses mesh of all ranks."""
    names = ("ring", "ulysses")
    if timeout is None:
        return init_device_mesh(device_type, (ring, ulysses), mesh_dim_names=names)
    # init_device_mesh takes no time-out, so the groups are made by hand: a column each for ring, a row each
    # for ulysses.
    ranks = torch.arange(ring * ulysses).view(ring, ulysses)
    groups = []
    for lines in (ranks.T, ranks):
        mine, _ = dist.new_subgroups_by_enumeration(lines.tolist(), timeout=timeout)
        groups.append(mine)
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=names)


def _check_axes(device_mesh: DeviceMesh, ulysses: str | None, ring: str | None) -> None:
    names = device_mesh.mesh_dim_names or ()
    for axis in (ulysses, ring):
        if axis is not None and axis not in names:
            raise ValueError(
                f"the device mesh has axes {names}, none is called {axis!r};"
                " name an axis of the mesh, or pass None"
            )
    if ulysses is None or ring is None:
        return
    if ulysses == ring:
        raise ValueError(f"the axis {ulysses!r} cannot be ulysses and ring at once; name two axes")
    if names.index(ring) > names.index(ulysses):
        raise ValueError(
            f"axes {names}: {ring!r} must come before {ulysses!r}, which belongs on faster links;"
            " reorder them"
        )


class _Axis(NamedTuple):
    """One axis of a device mesh, as this rank sees it."""

    size: int
    rank: int
    group: str | None
    """None for a size of 1: nothing is exchanged along it."""

    @staticmethod
    def of(device_mesh: DeviceMesh, name: str | None) -> "_Axis":
        """The axis of this name; of size 1 without one."""
        if name is None:
            return _Axis(1, 0, None)
        names = device_mesh.mesh_dim_names
        assert names is not None
        size = device_mesh.size(names.index(name))
        group = device_mesh.get_group(name).group_name if size > 1 else None
        return _Axis(size, device_mesh.get_local_rank(name), group)
