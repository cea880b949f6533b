"""Every constant of the cost model that is no fact of model, schedule or data sheet, with its source.

Defaults are those of a100-sxm and of a fused program. A training program has its own (stack.py), so has the
attention kernel of a GPU (kernels.py), and a GPU's table `[gpu.NAME.assumptions]` in hardware.toml or in a
measured profile given by `--profile` goes before both.

None is fitted to a row of a published table. Four were chosen with a table in view, and say so: whether a
group that holds a part of a node's GPUs gets more than one of its network cards (Table 6, for a800-sxm only);
how PCIe slows an all-to-all, what a copy over PCIe reaches, and the L20's attention rate (Table 3).
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from typing import Any, NamedTuple

from seqmesh.planner.inputs.tables import unknown

LEAST = 1e-9
MOST = 1e15
"""Beyond these a number is a slip, and times would no longer be finite."""


def _assumed(
    value: float,
    unit: str,
    source: str,
    *,
    share: bool = False,
    may_be_zero: bool = False,
    least: float = LEAST,
) -> float:
    """A field with what is known of it: a share is at most 1."""
    known = {"unit": unit, "source": source, "share": share, "may_be_zero": may_be_zero, "least": least}
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
        "assumption; 0.65 to 0.75 is what large bf16 matrix products reach on A100-class GPUs: 0.78 of the"
        " best that any reach (0.869, stas00/ml-engineering); other GPUs have the same share of their best",
        share=True,
    )
    matmul_fp8: float = _assumed(
        0.55,
        "of the fp8 peak",
        "0.78 of the best that any product reaches on H100 (1403 of 1979, stas00/ml-engineering)",
        share=True,
    )
    matmul_half_outputs: float = _assumed(
        1e6,
        "outputs",
        "a product of so many numbers runs at half rate: it has a tile of 128 x 64 for each multiprocessor of"
        " an A100 or H100; XLA's table for sm_90 has 0.44 of the largest's rate at 1M, 0.81 at 4M",
        may_be_zero=True,
    )
    fp8_cast_bytes: float = _assumed(
        6.0,
        "bytes per operand element",
        "torchao, dynamic tensorwise scales: bf16 read for its largest value, read again, fp8 written twice"
        " (once transposed)",
        may_be_zero=True,
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
    scale_up_hop: float = _assumed(
        3.4e-6, "s per further hop", "NCCL, graph/tuning.cc, hwLat: ring, Simple, NVLink", may_be_zero=True
    )
    pcie_hop: float = _assumed(5.7e-6, "s per further hop", "the same, PCI", may_be_zero=True)
    network_hop: float = _assumed(14e-6, "s per further hop", "the same, NET", may_be_zero=True)
    peer: float = _assumed(
        1e-6,
        "s per further peer",
        "assumption; an all-to-all is one send and one receive for each peer",
        may_be_zero=True,
    )
    tree_rate: float = _assumed(
        0.5,
        "of a ring's rate",
        "assumption; a collective over many nodes goes by a tree where that is faster: its latency grows with"
        " the logarithm of the nodes",
        share=True,
    )
    straggler: float = _assumed(
        0.01,
        "of compute",
        "assumption; how far like GPUs differ in speed, one standard deviation: all wait for the slowest"
        " of N, about sqrt(2 ln N) of them (1 to 5% apart in a node: stas00/ml-engineering)",
        share=True,
        may_be_zero=True,
    )
    launch: float = _assumed(
        20e-6, "s per stage", "assumption; a handful of kernel launches for each ring stage", may_be_zero=True
    )
    one_nic_per_partial_node: float = _assumed(
        0.0,
        "1 yes, 0 no",
        "of a800-sxm alone, inferred from Table 6: collectives of a group that holds only a part of a node's"
        " GPUs run at one network card's rate",
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
        "of all layers but the last; seqmesh train reduces gradients after the backward, and so is the"
        " paper's set-up assumed to do",
        share=True,
        may_be_zero=True,
    )
    prefetch: float = _assumed(
        0.5,
        "of ZeRO-3's gathers",
        "assumption; of all layers but the first, what hides behind compute",
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
    streamed_routed: float = _assumed(
        7.0,
        "numbers of hidden size a row",
        "of a token and expert; transformers' AllToAllEP, forward: rows put in the order of experts (r, w),"
        " results put back (r, w), weighted (r, w), added up (r)",
        may_be_zero=True,
    )
    expert_balance: float = _assumed(
        1.0,
        "of the mean",
        "assumption, unmeasured; tokens of the busiest of the ranks that share experts: 1 is what a router"
        " is trained for, and does not reach",
        least=1.0,
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
    logit_bytes: float = _assumed(
        6.0,
        "bytes per logit at the peak",
        "Megatron-LM: bf16, and fp32 for the loss, whose softmax is in place",
    )
    logit_bytes_tp: float = _assumed(
        6.0, "bytes per logit at the peak", "the same with the vocabulary divided over tp"
    )
    host_copy: float = _assumed(0.75, "of the one-way PCIe rate", "assumption; pinned memory", share=True)
    host_memory: float = _assumed(
        20e9, "bytes/s per GPU", "assumption; for an optimizer step on the host's memory, shared by 8 GPUs"
    )
    host_bytes: float = _assumed(137e9, "bytes per GPU", "assumption; a node with 1 TiB of memory and 8 GPUs")
    overhead: float = _assumed(
        0.01,
        "of memory",
        "assumption; what lies outside of PyTorch's allocator: CUDA context, NCCL buffers",
        share=True,
        may_be_zero=True,
    )
    fragmentation: float = _assumed(
        0.02,
        "of what is allocated",
        "assumption; what the allocator reserves and cannot use",
        share=True,
        may_be_zero=True,
    )
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
