"""What is to be planned: a model on a cluster, a sequence and its mask, a batch; a rank's share of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from seqmesh import layouts, masks
from seqmesh.masks import Mask
from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.hardware import Cluster
from seqmesh.planner.inputs.kernels import NAMES, assumptions_of
from seqmesh.planner.inputs.numerics import Numerics
from seqmesh.planner.inputs.point import AXES, Point
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.inputs.stack import SeqmeshStack, Stack
from seqmesh.planner.inputs.tables import unknown

LARGEST = 1 << 40
"""Tokens, or sequences, beyond which nobody plans."""


class LayerReach(NamedTuple):
    """What so many layers see."""

    window: int | None
    """Keys that a query sees, itself among them; None: all before it."""
    layers: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training step to plan.

    Raises:
        ValueError: a length, batch, memory limit, layout, order of axes or documents that cannot be, or a
            precision that the GPU has no rate for.
    """

    model: ModelShape
    cluster: Cluster
    seq_len: int
    """Tokens of one sequence."""
    global_batch: int = 1
    """Sequences of a step, over all ranks."""
    documents: tuple[int, ...] = ()
    """Lengths of the packed documents of all sequences of a step, end to end; empty: sequences are causal."""
    evened: bool = True
    """Whether groups get sequences by their documents' area, as `seqmesh train` deals; else by tokens."""
    layout: str = "auto"
    """Layout on the ring: auto, contiguous, zigzag, striped, balanced."""
    numerics: Numerics = field(default_factory=Numerics)
    # None only until __post_init__: the defaults of stack and GPU, which go with them where one is replaced.
    assumptions: Assumptions = None  # type: ignore[assignment]
    stack: Stack = field(default_factory=SeqmeshStack)
    """What trains: it says which points are legal and how their memory is predicted."""
    memory_limit: int | None = None
    """Bytes per rank that may be used; default: the GPU's memory."""
    headroom: float = 0.0
    """Share of that memory that a plan leaves free."""
    max_micro_batch: int | None = None
    """Largest micro-batch to consider."""
    axes: tuple[str, ...] = AXES
    """Mesh axes from the fastest links to the slowest."""

    def __post_init__(self) -> None:
        now = self.cluster.gpu, self.stack
        if self.assumptions is None or self.assumptions.defaults_of not in (None, now):
            object.__setattr__(self, "assumptions", assumptions_of(*now))
        self._check_sizes()
        if self.layout not in layouts.NAMES:
            raise unknown("layout", self.layout, layouts.NAMES)
        _ = self.peak, self.product_rate  # raises where the GPU has no rate for this precision
        if self.model.mixer is not None and self.layout == "striped":
            raise ValueError(
                f"layout=striped with {self.model.name}, whose layers carry a state, which every token of a"
                " strided layout would pass on; use auto, zigzag, balanced or contiguous"
            )
        if sorted(self.axes) != sorted(AXES):
            raise ValueError(
                f"axes {','.join(self.axes)} must name each of {','.join(AXES)} once,"
                " from the fastest links to the slowest"
            )
        if self.documents and sum(self.documents) != self.seq_len * self.global_batch:
            raise ValueError(
                f"the documents hold {sum(self.documents)} tokens but seq_len={self.seq_len} x"
                f" global_batch={self.global_batch} is {self.seq_len * self.global_batch}; make them add up"
            )

    def _check_sizes(self) -> None:
        sizes = f"seq_len={self.seq_len}, global_batch={self.global_batch}"
        if max(self.seq_len, self.global_batch) > LARGEST:
            raise ValueError(f"{sizes}: beyond {LARGEST} is a slip; use smaller numbers")
        memory = max(self.cluster.gpu.memory_bytes, self.cluster.gpu.reported_bytes or 0)
        if self.memory_limit is not None and self.memory_limit > memory:
            raise ValueError(
                f"a memory limit of {self.memory_limit} bytes on a GPU with {memory};"
                " use less, or correct the GPU"
            )
        if self.seq_len < 1 or self.global_batch < 1:
            raise ValueError(f"{sizes}: both must be at least 1; use a positive length and batch")

    @property
    def peak(self) -> float:
        """FLOP/s of a GPU in the job's precision."""
        return self.cluster.gpu.peak_flops_per_s(self.numerics.element)

    @property
    def product_rate(self) -> float:
        """FLOP/s that large linear products of the layers reach.

        Raises:
            ValueError: fp8 on a GPU that has no fp8.
        """
        if not self.numerics.fp8_products:
            return self.peak * self.assumptions.matmul
        fp8 = self.cluster.gpu.fp8_flops_per_s
        if fp8 is None:
            raise ValueError(
                f"GPU {self.cluster.gpu.name!r} has no tflops_fp8, so fp8-linear cannot be priced;"
                " add it, or use --precision bf16"
            )
        return fp8 * self.assumptions.matmul_fp8

    @property
    def memory_rate(self) -> float:
        """Bytes/s through a GPU's memory that kernels reach."""
        return self.cluster.gpu.memory_bytes_per_s * self.assumptions.memory

    @property
    def capacity(self) -> int:
        """Bytes of memory that one rank may use."""
        gpu = self.cluster.gpu
        if self.memory_limit is not None:
            return self.memory_limit
        return gpu.reported_bytes or gpu.memory_bytes if self.stack.leaves_headroom else gpu.memory_bytes

    @property
    def attention_kernel(self) -> str:
        """The kernel of attention that is assumed, as people call it."""
        return NAMES[self.stack.attention_kernel(self.cluster.gpu.generation)]

    @property
    def room(self) -> int:
        """Bytes of it that a plan fills."""
        return round(self.capacity * (1 - self.headroom))

    @cached_property
    def reaches(self) -> tuple[LayerReach, ...]:
        """Layers by what they see, those that see everything first. All have one layout."""
        m = self.model
        if m.sliding_window is None or m.sliding_window >= self.seq_len:
            return (LayerReach(None, m.attending),)
        found = (LayerReach(None, m.full_layers), LayerReach(m.sliding_window, m.attending - m.full_layers))
        return tuple(reach for reach in found if reach.layers)

    def mask_of(self, documents: Sequence[int], reach: LayerReach) -> Mask:
        """Which query meets which key in a row of documents, in some layers."""
        tokens = sum(documents)
        causal = masks.documents(documents) if len(documents) > 1 else masks.causal(tokens)
        if reach.window is None or reach.window >= tokens:
            return causal
        return causal & masks.sliding_window(tokens, reach.window)

    def _area(self, documents: Sequence[int]) -> int:
        """Allowed (query, key) pairs of a row: the mean over layers, rounded, where they differ."""
        areas = (reach.layers * self.mask_of(documents, reach).area for reach in self.reaches)
        layers = self.model.layers
        return (sum(areas) + layers // 2) // layers

    @cached_property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """Documents of each sequence. One that a sequence ends in goes on as a document of the next."""
        ends = {*accumulate(self.documents), *range(self.seq_len, sum(self.documents), self.seq_len)}
        cut: list[list[int]] = [[] for _ in range(self.global_batch)]
        start = 0
        for end in sorted(ends):
            cut[start // self.seq_len].append(end - start)
            start = end
        return tuple(map(tuple, cut))

    @cached_property
    def sequence_areas(self) -> tuple[int, ...]:
        """Allowed (query, key) pairs of each packed sequence."""
        return tuple(map(self._area, self.sequences))

    @cached_property
    def area(self) -> int:
        """Allowed (query, key) pairs of a step."""
        return sum(self.sequence_areas) if self.documents else self.global_batch * self._area((self.seq_len,))

    @cached_property
    def all_pairs(self) -> int:
        """Pairs of a step, allowed or not, of a query and a key of the same document."""
        if not self.documents:
            return self.global_batch * self.seq_len**2
        return sum(length**2 for sequence in self.sequences for length in sequence)

    def micro_batches(self, point: Point) -> int:
        """Forward and backward passes of a step on each rank."""
        return self.global_batch // (point.dp * point.micro_batch)

    def tokens(self, point: Point) -> int:
        """Tokens of a micro-batch on the fullest rank."""
        return point.micro_batch * -(-self.seq_len // point.sp)

    def expert_spread(self, point: Point) -> float:
        """Tokens of the busiest of the ranks that share a layer's experts, over the mean."""
        return self.assumptions.expert_balance if point.experts > 1 else 1.0

    def layers(self, point: Point) -> int:
        """Layers of the fullest pipeline rank: each of its stages, if it has several, has as many."""
        return -(-self.model.layers // (point.pp * point.virtual)) * point.virtual
