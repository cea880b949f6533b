"""GPUs and clusters: what they can do at best, from data/hardware.toml or a user's own TOML file.

    [gpu.ours]                    # load_gpu("ours", [Path("lab.toml")])
    like = "a800-sxm"             # everything that is not said here
    network_gb_per_s = 12.5       # one direction, per GPU
    measured = true               # a profile of measurements, not a datasheet
    [gpu.ours.assumptions]        # overrides of the cost model's assumptions, by name

    [cluster.lab]                 # load_cluster("lab", [Path("lab.toml")])
    gpu = "ours"
    nodes = 2
    gpus_per_node = 8

Files go before the presets and later files before earlier ones, so a measured profile may bear a preset's
name and be `like` it. Bandwidths are per GPU in ONE direction.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from seqmesh.planner.inputs.tables import LARGEST_COUNT, Table, data_file, is_count, read_tables, unknown

_PRESETS: Final = data_file("hardware.toml")
_MEMORY: Final = {"memory_gib": 2**30, "memory_gb": 10**9}
_GPU_KEYS: Final = (
    *("like", "tflops", "tflops_fp32", "tflops_fp8", "generation", "reported_gib", "gpus_per_node"),
    *(*_MEMORY, "memory_tb_per_s", "scale_up_gb_per_s", "pcie_gb_per_s", "network_gb_per_s"),
    *("source", "measured", "assumptions"),
)
_CLUSTER_KEYS: Final = ("gpu", "nodes", "gpus_per_node", "network_gb_per_s")


class _Rate(NamedTuple):
    """What a key means."""

    field: str
    """Of `Gpu`."""
    unit: float
    is_needed: bool = True
    """Whether a GPU that is like no other has to say it."""


_RATES: Final[Mapping[str, _Rate]] = {
    "tflops": _Rate("flops_per_s", 1e12),
    "tflops_fp32": _Rate("fp32_flops_per_s", 1e12, is_needed=False),
    "tflops_fp8": _Rate("fp8_flops_per_s", 1e12, is_needed=False),
    "memory_tb_per_s": _Rate("memory_bytes_per_s", 1e12),
    "pcie_gb_per_s": _Rate("pcie_bytes_per_s", 1e9),
    "network_gb_per_s": _Rate("network_bytes_per_s", 1e9),
}
GENERATIONS: Final = ("ampere", "ada", "hopper", "blackwell", "cdna3")
"""Of GPUs, by the kernels of attention that they run (kernels.py)."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU in its node: peak rates, none of which a program reaches.

    Raises:
        ValueError: a rate or size that is not positive and finite.
    """

    name: str
    """As in [gpu.NAME]."""
    flops_per_s: float | None = None
    """Dense bf16 FLOP/s; None: unknown, as for a profile measured in fp32."""
    memory_bytes: int
    """Device memory."""
    memory_bytes_per_s: float
    """Device memory bandwidth."""
    scale_up_bytes_per_s: float | None = None
    """NVLink in one direction; None: there is none, and the GPUs of a node talk over PCIe."""
    pcie_bytes_per_s: float
    """PCIe in one direction."""
    network_bytes_per_s: float
    """This GPU's share of its node's network, in one direction."""
    fp32_flops_per_s: float | None = None
    """fp32 FLOP/s, not TF32; None: unknown."""
    fp8_flops_per_s: float | None = None
    """Dense fp8 FLOP/s; None: it has none, or they are unknown."""
    generation: str = "ampere"
    """Whose kernels it runs: ampere, ada, hopper, blackwell or cdna3."""
    reported_bytes: int | None = None
    """Memory that PyTorch reports; None: all of it."""
    gpus_per_node: int = 8
    """GPUs that its links inside a node join, where no other number is given."""
    source: str = ""
    """Where the numbers come from."""
    measured: bool = False
    """Whether they were measured; if not, they are from datasheets and the paper."""
    overrides: Mapping[str, float] = field(default_factory=dict, hash=False)
    """The table [gpu.NAME.assumptions]: the cost model's assumptions that this GPU is known to break.

    Names are not checked here.
    """

    def __post_init__(self) -> None:
        if self.flops_per_s is None and self.fp32_flops_per_s is None:
            raise ValueError(f"GPU {self.name!r} has neither tflops (bf16) nor tflops_fp32; give one of them")
        rates = [rate.field for rate in _RATES.values()]
        for name in ("memory_bytes", *rates, "scale_up_bytes_per_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f"GPU {self.name!r}: {name}={value} is not positive and finite;"
                    " give what the hardware has"
                )
        if self.generation not in GENERATIONS:
            raise unknown(f"generation of GPU {self.name!r}", self.generation, GENERATIONS)

    def peak_flops_per_s(self, element: int) -> float:
        """FLOP/s in numbers of 2 bytes (bf16) or 4 (fp32).

        Raises:
            ValueError: the rate is not known.
        """
        if element == 2:
            peak = self.flops_per_s
            key = "tflops"
            precision = "bf16"
            other = "fp32"
        else:
            peak = self.fp32_flops_per_s
            key = "tflops_fp32"
            precision = "fp32"
            other = "bf16"
        if peak is None:
            raise ValueError(
                f"GPU {self.name!r} has no {key}, so {precision} cannot be priced;"
                f" add it, or use --precision {other}"
            )
        return peak

    @property
    def node_bytes_per_s(self) -> float:
        """From one GPU to another of its node, in one direction: NVLink, or PCIe without it."""
        return self.pcie_bytes_per_s if self.scale_up_bytes_per_s is None else self.scale_up_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal GPUs.

    Raises:
        ValueError: fewer than one node, or than one GPU in a node.
    """

    gpu: Gpu
    """Every GPU of it."""
    nodes: int
    """Nodes, joined by `gpu.network_bytes_per_s`."""
    gpus_per_node: int
    """GPUs of a node, joined by `gpu.node_bytes_per_s`."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            value = getattr(self, name)
            if not is_count(value):
                raise ValueError(
                    f"{name}={value!r} is not a whole number from 1 to {LARGEST_COUNT};"
                    f" give the cluster's {name}"
                )

    @property
    def gpus(self) -> int:
        """GPUs of the whole cluster."""
        return self.nodes * self.gpus_per_node


def known_gpus(extra: Iterable[Path] = ()) -> list[str]:
    """Names that `load_gpu` takes."""
    return _names(_layers("gpu", extra))


def known_gpus_of(path: Path) -> list[str]:
    """The GPUs that a file describes, in its order."""
    return [table.name for table in read_tables(path, "gpu").values()]


def known_clusters(extra: Iterable[Path] = ()) -> list[str]:
    """Names that `load_cluster` takes; there are no presets."""
    return _names(_layers("cluster", extra))


def load_gpu(name: str, extra: Iterable[Path] = ()) -> Gpu:
    """The GPU of this name, in upper or lower case.

    Args:
        name: a preset, or NAME of a table [gpu.NAME] in one of the files.
        extra: TOML files, which go before the presets; the last goes first.

    Raises:
        ValueError: an unknown GPU, or a file with a mistake.
    """
    return _find_gpu(name, _layers("gpu", extra))


def load_cluster(name: str, extra: Iterable[Path] = ()) -> Cluster:
    """The cluster described by [cluster.NAME] in one of the files, whose GPU may be a preset.

    Raises:
        ValueError: an unknown cluster or GPU, or a file with a mistake.
    """
    files = list(extra)
    layers = _layers("cluster", files)
    table = next((layer[name.lower()] for layer in reversed(layers) if name.lower() in layer), None)
    if table is None:
        raise ValueError(
            f"{unknown('cluster', name, _names(layers))}; describe it as [cluster.NAME] in a TOML file"
        )
    table.check_keys(_CLUSTER_KEYS)
    gpu = _find_gpu(table.text("gpu"), _layers("gpu", files), table.where)
    if "network_gb_per_s" in table:
        gpu = replace(gpu, network_bytes_per_s=table.positive("network_gb_per_s") * 1e9)
    return Cluster(gpu=gpu, nodes=table.count("nodes"), gpus_per_node=table.count("gpus_per_node"))


Layers = Sequence[Mapping[str, Table]]
"""The tables of each file by name in lower case, presets first."""


def _layers(section: str, extra: Iterable[Path]) -> Layers:
    return [read_tables(path, section) for path in (_PRESETS, *map(Path, extra))]


def _names(layers: Layers) -> list[str]:
    """Of all tables; one that goes before another of its name stands in its place."""
    merged: dict[str, Table] = {}
    for layer in layers:
        merged |= layer
    return [table.name for table in merged.values()]


def _find_gpu(name: str, layers: Layers, where: str = "", trail: tuple[Table, ...] = ()) -> Gpu:
    """The GPU of the last layer that has it. `trail`: the tables that are `like` it."""
    for depth in reversed(range(len(layers))):
        table = layers[depth].get(name.lower())
        if table is None:
            continue
        if any(table is earlier for earlier in trail):
            chain = " like ".join(repr(link.name) for link in (*trail, table))
            raise ValueError(
                f"{table.where}: {chain} has no end; give one of them its numbers in place of like"
            )
        base = None
        if "like" in table:
            # A table that is like its own name means the one it goes before.
            own_name = table.text("like").lower() == name.lower()
            below = layers[:depth] if own_name else layers[: depth + 1]
            base = _find_gpu(table.text("like"), below, table.where, (*trail, table))
        return _read_gpu(table, base)
    raise unknown("GPU", name, _names(layers), where)


def _read_gpu(table: Table, base: Gpu | None) -> Gpu:
    """A [gpu.NAME] table, where `base` says what it leaves out.

    That the base was measured says nothing about this one.
    """
    table.check_keys(_GPU_KEYS)
    assumptions = table.table("assumptions")
    said: dict[str, Any] = {
        "name": table.name,
        "measured": table.flag("measured", default=False),
        "overrides": {key: assumptions.number(key) for key in assumptions.values},
    }
    if base is not None:
        said["overrides"] = {**base.overrides, **said["overrides"]}
    if base is None or any(key in table for key in _MEMORY):
        said["memory_bytes"] = _memory(table)
        said["reported_bytes"] = None  # that of the base is of another memory
    for key, rate in _RATES.items():
        if key in table or (base is None and _is_needed(key, table)):
            said[rate.field] = table.positive(key) * rate.unit
    if "scale_up_gb_per_s" in table:
        has_none = table.number("scale_up_gb_per_s") == 0
        said["scale_up_bytes_per_s"] = None if has_none else table.positive("scale_up_gb_per_s") * 1e9
    if "reported_gib" in table:
        said["reported_bytes"] = round(table.positive("reported_gib") * 2**30)
    said |= {key: table.text(key) for key in ("generation", "source") if key in table}
    if "gpus_per_node" in table:
        said["gpus_per_node"] = table.count("gpus_per_node")
    return Gpu(**said) if base is None else replace(base, **{"source": f"like {base.name}", **said})


def _is_needed(key: str, table: Table) -> bool:
    """Whether a GPU that is like no other must say a rate; one of those in bf16 and fp32 is enough."""
    return _RATES[key].is_needed and not (key == "tflops" and "tflops_fp32" in table)


def _memory(table: Table) -> int:
    given = [key for key in _MEMORY if key in table]
    if len(given) == 2:
        raise ValueError(
            f"{table.where}: both memory_gib and memory_gb; give one, GiB for 2^30 bytes or GB for 10^9"
        )
    if not given:
        raise ValueError(
            f"{table.where}: memory_gib (2^30 bytes) and memory_gb (10^9) are both missing; add one of them"
        )
    return round(table.positive(given[0]) * _MEMORY[given[0]])
