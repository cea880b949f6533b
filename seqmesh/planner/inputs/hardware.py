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
from typing import Final

from seqmesh.planner.inputs.tables import LARGEST_COUNT, Table, read_tables, unknown

_PRESETS: Final = Path(__file__).parent / "data" / "hardware.toml"
_MEMORY: Final = {"memory_gib": 2**30, "memory_gb": 10**9}
_GPU_KEYS: Final = (
    "like",
    "tflops",
    "tflops_fp32",
    "tflops_fp8",
    "generation",
    "reported_gib",
    "gpus_per_node",
    *_MEMORY,
    "memory_tb_per_s",
    "scale_up_gb_per_s",
    "pcie_gb_per_s",
    "network_gb_per_s",
    "source",
    "measured",
    "assumptions",
)
_CLUSTER_KEYS: Final = ("gpu", "nodes", "gpus_per_node", "network_gb_per_s")


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
    flops_per_s: float | None
    """Dense bf16 FLOP/s; None: unknown, as for a profile measured in fp32."""
    memory_bytes: int
    """Device memory."""
    memory_bytes_per_s: float
    """Device memory bandwidth."""
    scale_up_bytes_per_s: float | None
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
        rates = (
            "flops_per_s",
            "fp32_flops_per_s",
            "fp8_flops_per_s",
            "memory_bytes_per_s",
            "scale_up_bytes_per_s",
            "pcie_bytes_per_s",
            "network_bytes_per_s",
        )
        for name in ("memory_bytes", *rates):
            value = getattr(self, name)
            if value is None and (name == "scale_up_bytes_per_s" or name.endswith("flops_per_s")):
                continue
            if not 0 < value < math.inf:
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
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_COUNT:
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
    own_overrides = {key: assumptions.number(key) for key in assumptions.values}
    return Gpu(
        name=table.name,
        flops_per_s=_peak(table, "tflops", "tflops_fp32", base.flops_per_s if base else None),
        fp32_flops_per_s=_peak(table, "tflops_fp32", "tflops", base.fp32_flops_per_s if base else None),
        fp8_flops_per_s=_peak(table, "tflops_fp8", "tflops", base.fp8_flops_per_s if base else None),
        generation=_generation(table, base),
        memory_bytes=_memory(table, base),
        reported_bytes=_reported(table, base),
        gpus_per_node=_per_node(table, base),
        memory_bytes_per_s=_rate(table, "memory_tb_per_s", 1e12, base.memory_bytes_per_s if base else None),
        scale_up_bytes_per_s=_scale_up(table, base),
        pcie_bytes_per_s=_rate(table, "pcie_gb_per_s", 1e9, base.pcie_bytes_per_s if base else None),
        network_bytes_per_s=_rate(table, "network_gb_per_s", 1e9, base.network_bytes_per_s if base else None),
        source=_source(table, base),
        measured=table.flag("measured", default=False),
        overrides={**(base.overrides if base else {}), **own_overrides},
    )


def _source(table: Table, base: Gpu | None) -> str:
    if "source" in table:
        return table.text("source")
    return f"like {base.name}" if base else ""


def _peak(table: Table, key: str, other: str, inherited: float | None) -> float | None:
    """A peak rate, which may be left out where the other one is given (or both are inherited)."""
    if key not in table and (other in table or "like" in table or key != "tflops"):
        return inherited
    return table.positive(key) * 1e12


def _rate(table: Table, key: str, unit: float, inherited: float | None) -> float:
    """A rate in bytes/s, which may be left out where it is inherited."""
    if key not in table and inherited is not None:
        return inherited
    return table.positive(key) * unit


def _generation(table: Table, base: Gpu | None) -> str:
    if "generation" in table:
        return table.text("generation")
    return base.generation if base else "ampere"


def _per_node(table: Table, base: Gpu | None) -> int:
    if "gpus_per_node" in table:
        return table.count("gpus_per_node")
    return base.gpus_per_node if base else 8


def _reported(table: Table, base: Gpu | None) -> int | None:
    """As it is said; not inherited where the memory itself is another."""
    if "reported_gib" in table:
        return round(table.positive("reported_gib") * 2**30)
    return base.reported_bytes if base and not any(key in table for key in _MEMORY) else None


def _memory(table: Table, base: Gpu | None) -> int:
    given = [key for key in _MEMORY if key in table]
    if len(given) == 2:
        raise ValueError(
            f"{table.where}: both memory_gib and memory_gb; give one, GiB for 2^30 bytes or GB for 10^9"
        )
    if not given and base:
        return base.memory_bytes
    if not given:
        raise ValueError(
            f"{table.where}: memory_gib (2^30 bytes) and memory_gb (10^9) are both missing; add one of them"
        )
    return round(table.positive(given[0]) * _MEMORY[given[0]])


def _scale_up(table: Table, base: Gpu | None) -> float | None:
    if "scale_up_gb_per_s" not in table:
        return base.scale_up_bytes_per_s if base else None
    given = table.number("scale_up_gb_per_s")
    return table.positive("scale_up_gb_per_s") * 1e9 if given != 0 else None
