"""Every constant of the cost model that is no fact of model, schedule or data sheet, with its source.

A measured profile overrides any of them: `[gpu.NAME.assumptions]` in a TOML file given by `--profile`
(hardware.py). None is fitted to a row of a published table. Three were chosen with a table in view, and say
so: whether a group that holds a part of a node's GPUs gets more than one of its network cards (Table 6); how
PCIe slows an all-to-all, and the L20's attention rate in hardware.toml (Table 3).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

from seqmesh.planner.inputs.tables import unknown

LEAST = 1e-9
MOST = 1e15
"""Beyond these a number is a slip, and times would no longer be finite."""


def _assumed(
    value: float, unit: str, source: str, *, share: bool = False, may_be_zero: bool = False
) -> float:
    """A field with what is known of it: a share is at most 1."""
    known = {"unit": unit, "source": source, "share": share, "may_be_zero": may_be_zero}
    default: float = field(default=value, metadata=known)
    return default


class Explained(NamedTuple):
    """One assumption, as `--explain` shows it."""

    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Efficiencies, latencies and overlap rules. `explain()` lists them with their sources."""

    matmul: float = _assumed(
        0.68,
        "of peak",
        "assumption; 0.65 to 0.75 is what large bf16 matrix products reach on A100-class GPUs",
        share=True,
    )
    attention_forward: float = _assumed(
        0.62, "of peak", "assumption; FlashAttention-2 reports 0.5 to 0.73 on A100", share=True
    )
    attention_backward: float = _assumed(
        0.52, "of peak", "assumption; FlashAttention-2 reports 0.4 to 0.63 on A100", share=True
    )
    attention_half_rows: float = _assumed(
        256.0,
        "rows",
        "assumption; a block this long on its shorter side runs at half efficiency:"
        " two tiles of 128 rows of flash attention",
        may_be_zero=True,
    )
    small_head: float = _assumed(
        64.0,
        "head dim",
        "assumption; heads of this dim run at `small_head_rate`, larger ones up to 128 in between,"
        " smaller ones in proportion",
        may_be_zero=True,
    )
    small_head_rate: float = _assumed(
        0.8,
        "of the rate at 128",
        "assumption; FlashAttention-2's figures at head dim 64 against 128",
        share=True,
    )
    memory: float = _assumed(0.8, "of peak", "assumption; usual for streaming kernels", share=True)
    scale_up: float = _assumed(
        0.8,
        "of the one-way rate",
        "assumption; NCCL bus bandwidth on NVLink is 0.75 to 0.85 of it",
        share=True,
    )
    network: float = _assumed(0.8, "of the one-way rate", "assumption; NCCL over RDMA", share=True)
    pcie: float = _assumed(
        0.7,
        "of the one-way rate",
        "assumption; copies between two GPUs under one switch (Table 3, u = 2)",
        share=True,
    )
    pcie_contention: float = _assumed(
        2.6,
        "",
        "inferred from Table 3, u = 2, 4, 8: over PCIe an all-to-all with k peers takes"
        " 1 + this x (k - 1) times as long as its bytes:"
        " streams of a GPU share its link and the host's, and do not add up",
        may_be_zero=True,
    )
    scale_up_latency: float = _assumed(20e-6, "s per collective", "assumption", may_be_zero=True)
    pcie_latency: float = _assumed(40e-6, "s per collective", "assumption", may_be_zero=True)
    network_latency: float = _assumed(40e-6, "s per collective", "assumption", may_be_zero=True)
    launch: float = _assumed(
        20e-6, "s per stage", "assumption; a handful of kernel launches for each ring stage", may_be_zero=True
    )
    one_nic_per_partial_node: float = _assumed(
        1.0,
        "1 yes, 0 no",
        "inferred from Table 6: collectives of a group that holds only a part of a node's GPUs"
        " run at one network card's rate",
        share=True,
        may_be_zero=True,
    )
    tp_exposed: float = _assumed(
        0.6,
        "of TP traffic",
        "Megatron-LM's source: of 10 collectives a layer, 4 of the backward run beside a matrix product",
        share=True,
        may_be_zero=True,
    )
    gradient_overlap: float = _assumed(
        0.0,
        "of gradient traffic",
        "seqmesh train reduces gradients after the backward; assumed of the paper's set-up",
        share=True,
        may_be_zero=True,
    )
    prefetch: float = _assumed(
        0.5,
        "of ZeRO-3's gathers",
        "assumption; the share that hides behind compute: the first layers' and those of short layers do not",
        share=True,
        may_be_zero=True,
    )
    overlap_tax: float = _assumed(
        0.1,
        "of hidden exchange",
        "assumption; NCCL's kernels take streaming multiprocessors and memory bandwidth"
        " from the compute they hide behind",
        share=True,
        may_be_zero=True,
    )
    merge_bytes: float = _assumed(
        26.0,
        "bytes per output element",
        "merge.py: fp32 out scaled (r, w), block cast (r, w), added (r, r, w)",
        may_be_zero=True,
    )
    dq_bytes: float = _assumed(
        10.0,
        "bytes per element",
        "merge.py RowSums: fp32 sum read and written, bf16 part read",
        may_be_zero=True,
    )
    dkv_bytes: float = _assumed(
        22.0,
        "bytes per element",
        "ring.py: copied to fp32, cast to bf16, and added to fp32 where it comes home",
        may_be_zero=True,
    )
    streamed_hidden: float = _assumed(
        14.0,
        "numbers of hidden size a token",
        "assumption; a layer's forward besides products: two norms, rotary embedding, residuals, fused",
        may_be_zero=True,
    )
    streamed_ffn: float = _assumed(
        3.0,
        "numbers of FFN size a token",
        "SwiGLU, fused: gate and up read, product written",
        may_be_zero=True,
    )
    streamed_backward: float = _assumed(
        2.0,
        "of the forward's",
        "assumption; inputs and gradients are read, gradients written",
        may_be_zero=True,
    )
    streamed_logit: float = _assumed(
        16.0,
        "bytes per logit",
        "loss: bf16 read, fp32 softmax written and read, gradient written, read twice",
        may_be_zero=True,
    )
    host_copy: float = _assumed(0.75, "of the one-way PCIe rate", "assumption; pinned memory", share=True)
    host_memory: float = _assumed(
        20e9, "bytes/s per GPU", "assumption; for an optimizer step on the host's memory, shared by 8 GPUs"
    )
    host_bytes: float = _assumed(137e9, "bytes per GPU", "assumption; a node with 1 TiB of memory and 8 GPUs")
    overhead: float = _assumed(
        0.01,
        "of memory",
        "assumption; CUDA context, NCCL buffers, fragmentation. The paper's margins are 1 to 5 GB",
        share=True,
        may_be_zero=True,
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            name, value = f.name, getattr(self, f.name)
            may_be_zero = f.metadata["may_be_zero"]
            if not (LEAST <= value <= MOST or (value == 0 and may_be_zero)):
                kind = "0, or a number" if may_be_zero else "a positive finite number"
                raise ValueError(f"assumption {name} = {value}: use {kind} from {LEAST:g} to {MOST:g}")
            if f.metadata["share"] and value > 1:
                raise ValueError(f"assumption {name} = {value}: it is a share; use at most 1")

    def override(self, given: Mapping[str, float], where: str) -> "Assumptions":
        """The same with some replaced.

        Raises:
            ValueError: an unknown name or a value out of range.
        """
        known = [f.name for f in fields(self)]
        for name in given:
            if name not in known:
                raise unknown(f"assumption in {where}", name, known)
        return replace(self, **given)

    def moved(self, name: str, value: float) -> "Assumptions":
        """The same with one moved; a share stays a share."""
        (moved,) = (f for f in fields(self) if f.name == name)
        return replace(self, **{name: min(value, 1.0) if moved.metadata["share"] else value})

    def explain(self) -> list[Explained]:
        """Each of them, in the order of the fields."""
        found = []
        for f in fields(self):
            unit, source = f.metadata["unit"], f.metadata["source"]
            found.append(Explained(f.name, getattr(self, f.name), unit, source))
        return found
