"""Every constant of the cost model that is no fact of model, schedule or data sheet, with its source.

The defaults and their sources are in data/assumptions.toml: those of a100-sxm and of a fused program. A
training program has its own (stack.py), so has the attention kernel of a GPU (kernels.py), and a GPU's table
`[gpu.NAME.assumptions]` in hardware.toml or in a measured profile given by `--profile` goes before both.

None is fitted to a row of a published table. Four were chosen with a table in view, and say so: whether a
group that holds a part of a node's GPUs gets more than one of its network cards (Table 6, for a800-sxm only);
how PCIe slows an all-to-all, what a copy over PCIe reaches, and the L20's attention rate (Table 3).
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from typing import Any, NamedTuple

from seqmesh.planner.inputs.tables import read_data, unknown

LEAST = 1e-9
MOST = 1e15
"""Beyond these a number is a slip, and times would no longer be finite."""


class Explained(NamedTuple):
    """One assumption, as `--explain` shows it."""

    name: str
    value: float
    unit: str
    source: str


@cache
def _constants() -> Mapping[str, Mapping[str, Any]]:
    return read_data("assumptions.toml")


def _constant(name: str) -> float:
    """A field with what data/assumptions.toml knows of it."""
    known = {"share": False, "may_be_zero": False, "least": LEAST, **_constants()[name]}
    default: float = field(default=known["value"], metadata=known)
    return default


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Efficiencies, latencies and overlap rules. `explain()` lists them with their sources.

    Raises:
        ValueError: a number out of its range.
    """

    # Products and attention.
    matmul: float = _constant("matmul")
    matmul_fp8: float = _constant("matmul_fp8")
    matmul_half_outputs: float = _constant("matmul_half_outputs")
    fp8_cast_bytes: float = _constant("fp8_cast_bytes")
    attention_forward: float = _constant("attention_forward")
    attention_backward: float = _constant("attention_backward")
    attention_half_rows: float = _constant("attention_half_rows")
    small_head: float = _constant("small_head")
    small_head_rate: float = _constant("small_head_rate")

    # Memory, links and collectives.
    memory: float = _constant("memory")
    scale_up: float = _constant("scale_up")
    network: float = _constant("network")
    pcie: float = _constant("pcie")
    pcie_contention: float = _constant("pcie_contention")
    scale_up_latency: float = _constant("scale_up_latency")
    pcie_latency: float = _constant("pcie_latency")
    network_latency: float = _constant("network_latency")
    scale_up_hop: float = _constant("scale_up_hop")
    pcie_hop: float = _constant("pcie_hop")
    network_hop: float = _constant("network_hop")
    peer: float = _constant("peer")
    tree_rate: float = _constant("tree_rate")

    # What a step waits for, and what hides behind compute.
    straggler: float = _constant("straggler")
    launch: float = _constant("launch")
    one_nic_per_partial_node: float = _constant("one_nic_per_partial_node")
    tp_exposed: float = _constant("tp_exposed")
    gradient_overlap: float = _constant("gradient_overlap")
    prefetch: float = _constant("prefetch")
    overlap_tax: float = _constant("overlap_tax")

    # Numbers that are streamed through memory.
    merge_bytes: float = _constant("merge_bytes")
    dq_bytes: float = _constant("dq_bytes")
    dkv_bytes: float = _constant("dkv_bytes")
    streamed_hidden: float = _constant("streamed_hidden")
    streamed_ffn: float = _constant("streamed_ffn")
    streamed_routed: float = _constant("streamed_routed")
    expert_balance: float = _constant("expert_balance")
    streamed_backward: float = _constant("streamed_backward")
    streamed_logit: float = _constant("streamed_logit")

    # What memory holds, and the host.
    logit_bytes: float = _constant("logit_bytes")
    logit_bytes_tp: float = _constant("logit_bytes_tp")
    host_copy: float = _constant("host_copy")
    host_memory: float = _constant("host_memory")
    host_bytes: float = _constant("host_bytes")
    overhead: float = _constant("overhead")
    fragmentation: float = _constant("fragmentation")

    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where the values come from that are not the defaults, by name."""
    defaults_of: object = field(default=None, compare=False)
    """The GPU and stack whose defaults these are; None: some were given."""

    def __post_init__(self) -> None:
        for f in _named():
            name, value = f.name, getattr(self, f.name)
            may_be_zero, least = f.metadata["may_be_zero"], f.metadata["least"]
            if not (least <= value <= MOST or (value == 0 and may_be_zero)):
                kind = "0, or a number" if may_be_zero else "a positive finite number"
                raise ValueError(f"assumption {name} = {value}: use {kind} from {least:g} to {MOST:g}")
            if f.metadata["share"] and value > 1:
                raise ValueError(f"assumption {name} = {value}: it is a share; use at most 1")

    def override(self, given: Mapping[str, float], where: str) -> "Assumptions":
        """The same with some replaced.

        Raises:
            ValueError: an unknown name or a value out of range.
        """
        known = [f.name for f in _named()]
        for name in given:
            if name not in known:
                raise unknown(f"assumption in {where}", name, known)
        sources = {**self.sources, **dict.fromkeys(given, where)}
        changes: dict[str, Any] = {**given, "sources": sources, "defaults_of": None}
        return replace(self, **changes)

    def moved(self, name: str, value: float) -> "Assumptions":
        """The same with one moved; a share stays a share."""
        (moved,) = (f for f in _named() if f.name == name)
        changes: dict[str, Any] = {name: min(value, 1.0) if moved.metadata["share"] else value}
        return replace(self, defaults_of=None, **changes)

    def explain(self) -> list[Explained]:
        """Each of them, in the order of the fields."""
        found = []
        for f in _named():
            source = f.metadata["source"]
            if f.name in self.sources:
                source = f"{self.sources[f.name]}; else {source}"
            found.append(Explained(f.name, getattr(self, f.name), f.metadata["unit"], source))
        return found


@cache
def _named() -> tuple[Field[float], ...]:
    """The fields that are assumptions."""
    return tuple(f for f in fields(Assumptions) if f.metadata)
