"""One rank of `seqmesh train`: its mix of parallelisms and savers, and the sizes that follow from it.

    rank = TrainedRank(shape=load_model("llama3-8b"), point=Point(ulysses=8, ring=2, zero=3), seq_len=212_992)

It is the first rank of its stage on every axis, as the one that trace/ traces: its late rows need the keys of
every other rank, and it owns the largest weight where ZeRO-1 deals them out.

Legend: n tokens of a micro-batch on this rank, c rows of them between layers (n, or a share of tp), h hidden,
f intermediate, V vocabulary. Weights are counted in elements, all else in bytes.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from seqmesh.layouts import split_evenly
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.train.memory.engine_buffers import EngineBuffers

FP32 = 4
"""Bytes of what weights, sums of gradients and optimizer states are in."""
BF16 = 2


@dataclass(frozen=True, kw_only=True)
class TrainedRank:
    """The first rank of a pipeline stage, in a step of the trainer."""

    shape: ModelShape
    """The model, trained as a Llama."""
    point: Point
    """Degrees and savers. tiling="loss" is as "none": the trainer's loss is always tiled."""
    seq_len: int
    """Tokens of a packed sequence, over all ranks."""
    micro_batches: int = 1
    """Forwards and backwards of a step."""
    is_half: bool = False
    """Whether layers compute in bf16; weights, their sums and states are fp32."""
    shard_norms: bool = False
    """Whether ranks of tp share the rows of norms and residuals."""
    copies: int = 1
    """dp_replicate: groups of ranks that each hold what ZeRO-2 and -3 shard."""
    stage: int = 0
    """Of the pipeline."""

    @property
    def element(self) -> int:
        """Bytes of what layers compute in."""
        return BF16 if self.is_half else FP32

    @cached_property
    def engine(self) -> EngineBuffers:
        """This rank as attention sees it: of a micro-batch, whose sequences are packed in one."""
        point = self.point
        tokens = self.seq_len * point.micro_batch
        return EngineBuffers(self.shape, tokens, point.ulysses, point.ring, point.tp, self.element)

    @property
    def tokens(self) -> int:
        """n."""
        return self.engine.tokens

    @property
    def rows(self) -> int:
        """c."""
        return -(-self.tokens // self.point.tp) if self.shard_norms else self.tokens

    @property
    def stream(self) -> int:
        """Bytes of hidden states between layers."""
        return self.rows * self.shape.hidden * self.element

    @property
    def heads_width(self) -> int:
        """Elements of a token's queries on this rank."""
        return self.shape.hidden // self.point.tp

    @property
    def mlp_width(self) -> int:
        """f on this rank."""
        return self.shape.intermediate // self.point.tp

    @property
    def recomputes(self) -> bool:
        """Whether layers are checkpointed."""
        return self.point.checkpointing != "none"

    @property
    def is_tiled(self) -> bool:
        """Whether MLPs take some tokens at a time."""
        return self.point.tiling == "mlp"

    # The pipeline.

    @cached_property
    def layers(self) -> int:
        """Layers of this stage."""
        cuts = split_evenly(self.shape.layers, self.point.pp)
        return cuts[self.stage + 1] - cuts[self.stage]

    @property
    def is_first(self) -> bool:
        """Whether this stage has the embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage has the last norm, the head and the loss."""
        return self.stage == self.point.pp - 1

    def at_stage(self, stage: int) -> "TrainedRank":
        """The first rank of another stage."""
        return replace(self, stage=stage)

    def in_flight(self, backward: int) -> int:
        """Micro-batches whose activations live as a backward begins, by its number in the step: 1F1B."""
        return min(self.point.pp - self.stage, self.micro_batches - backward)

    # Weights, in elements.

    @cached_property
    def vocabulary(self) -> int:
        """Tokens whose rows of the embedding and of the head this rank has."""
        return -(-self.shape.vocabulary // self.point.tp)

    @cached_property
    def matrices(self) -> dict[str, int]:
        """One layer's, by name."""
        m = self.shape
        kv = m.kv_heads * m.head_dim // self.point.tp
        width, mlp = self.heads_width, self.mlp_width
        return {
            "q": m.hidden * width,
            "k": m.hidden * kv,
            "v": m.hidden * kv,
            "output": m.hidden * width,
            "gate": m.hidden * mlp,
            "up": m.hidden * mlp,
            "down": m.hidden * mlp,
        }

    @cached_property
    def layer(self) -> int:
        """A layer's weights: its matrices and two norms, which are whole on every rank of tp."""
        return sum(self.matrices.values()) + 2 * self.shape.hidden

    @property
    def mlp_matrices(self) -> int:
        """Those of a layer's MLP."""
        return self.matrices["gate"] + self.matrices["up"] + self.matrices["down"]

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding's matrix."""
        return self.shape.tied_embeddings

    @property
    def embedding(self) -> int:
        """The embedding, where it is a weight of its own and this stage has it."""
        has_one = self.is_first and not (self.is_tied and self.is_last)
        return self.vocabulary * self.shape.hidden if has_one else 0

    @property
    def head(self) -> int:
        """The output head, tied or not, if this stage has it."""
        return self.vocabulary * self.shape.hidden if self.is_last else 0

    @property
    def root(self) -> int:
        """What belongs to no layer but to the end of the model: last norm and head."""
        return self.head + (self.shape.hidden if self.is_last else 0)

    @cached_property
    def weights(self) -> int:
        """All of this stage."""
        return self.layers * self.layer + self.embedding + self.root

    @cached_property
    def all_weights(self) -> list[int]:
        """The sizes of all weights of this stage, one by one, in the model's order."""
        hidden = self.shape.hidden
        sizes = [self.embedding] if self.embedding else []
        sizes += [*self.matrices.values(), hidden, hidden] * self.layers
        if self.is_last:
            sizes += [hidden, self.head]
        return sizes

    @property
    def shards(self) -> int:
        """Ranks that share the weights with ZeRO-2 and -3, or the optimizer states with ZeRO-1."""
        return self.point.replicas // self.copies if self.point.zero >= 2 else self.point.replicas
