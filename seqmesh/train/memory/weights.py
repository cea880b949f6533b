"""What a rank of the trainer holds of weights and their gradients, at any moment of its backwards. In bytes.

    ZeRO    weights                                                   gradients    optimizer states
    0       whole                                                     whole        whole
    1       whole                                                     whole        of the weights it is dealt
    2       shards; gathered from a step's first forward on           shards       shards
    3       shards; gathered root, a layer, and the next one, packed  shards       shards

FSDP2 gathers in the dtype that layers compute in, and reduces in fp32. With ZeRO-2 and -3 a gradient is whole
until its layer's backward is done in the last micro-batch; the packed gradients of the layer before are held
until then, too. In a pipeline a backward leaves weights gathered, which the next forward frees again with
ZeRO-3, and gradients are reduced after the last backward.

Source: torch.distributed.fsdp of PyTorch 2.13; parallel/zero1.py.
"""

from dataclasses import dataclass

from seqmesh.train.memory.rank import FP32, TrainedRank


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One micro-batch's backward among those of a step."""

    accumulates: bool
    """Whether gradients of micro-batches before it are there."""
    reduces: bool
    """Whether ZeRO-2 and -3 reduce its gradients, layer by layer."""
    in_flight: int = 1
    """Micro-batches whose activations live as it begins."""
    follows_backward: bool = False
    """Whether no forward is between it and the backward before, which in a pipeline left weights gathered."""
    lingers: bool = False
    """Whether a pipeline still holds what it sent of a micro-batch that is done (PyTorch 2.13's 1F1B)."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Weights and gradients at one moment."""

    gradients: int
    """Of the weights that a rank holds: sharded where those are."""
    whole: int
    """Gathered weights, and gradients that are not reduced yet."""


def turns(rank: TrainedRank) -> list[Turn]:
    """The backwards of a step that differ: the first, the second, one between, the last."""
    count = rank.micro_batches
    by_layer = rank.point.pp == 1
    found = []
    for number in dict.fromkeys((0, min(1, count - 1), count - 1)):
        is_last = number == count - 1
        found.append(
            Turn(
                accumulates=number > 0,
                reduces=is_last and by_layer,
                in_flight=rank.in_flight(number),
                follows_backward=number > max(0, count - rank.in_flight(0)),
                lingers=0 < number < count - 1 and count >= 2 * rank.in_flight(0) - 1 > 1,
            )
        )
    return found


@dataclass(frozen=True)
class HeldWeights:
    """Of one rank."""

    rank: TrainedRank

    @property
    def is_sharded(self) -> bool:
        """Whether weights are."""
        return self.rank.point.zero >= 2

    @property
    def parameters(self) -> int:
        """What the rank holds of the weights, in fp32."""
        return FP32 * self._share(self.rank.weights)

    @property
    def optimizer(self) -> int:
        """AdamW's two states, of what is this rank's to update."""
        rank = self.rank
        if rank.point.zero == 1:
            return 2 * FP32 * sum(_dealt(rank.all_weights, rank.shards))
        return 2 * FP32 * self._share(rank.weights)

    @property
    def in_adamw(self) -> int:
        """What AdamW holds of one matrix after the other: two copies of its size, and one of the last."""
        rank = self.rank
        matrices = [size for size in rank.all_weights if size > rank.shape.hidden]
        if rank.point.zero == 1:
            matrices = _dealt(matrices, rank.shards)
        pairs = zip([0, *matrices], matrices, strict=False)
        return FP32 * self._share(max((before + 2 * size for before, size in pairs), default=0))

    def _share(self, weights: int) -> int:
        return -(-weights // self.rank.shards) if self.is_sharded else weights

    def after_backward(self, turn: Turn) -> Held:
        """When all layers are done and the embedding's gradient is made; nothing else is reduced."""
        return self._held(turn, layer=-1, made=0, root=self.rank.root, embedding=self.rank.embedding)

    def in_update(self) -> int:
        """All gradients, as the optimizer takes them."""
        return FP32 * self._share(self.rank.weights)

    def in_reduction(self) -> Held:
        """After the last backward of a pipeline: the largest group of weights is packed and reduced first."""
        rank = self.rank
        group = max(rank.embedding, rank.root, rank.layer)
        whole = FP32 * (rank.weights + group) + rank.element * (rank.weights - group)
        return Held(gradients=FP32 * self._share(group), whole=whole)

    def in_loss(self, turn: Turn, head: int) -> Held:
        """Before the first layer's backward, with so many gradients of the head."""
        return self._held(turn, layer=self.rank.layers, made=0, root=head)

    def in_layer(self, turn: Turn, layer: int, made: int) -> Held:
        """In the backward of a layer, which has made the gradients of so many of its weights."""
        root = self.rank.root
        if self.rank.is_tied and self.rank.is_first:
            root -= self.rank.head  # a summand until the embedding's is there
        return self._held(turn, layer=layer, made=made, root=root)

    def _held(self, turn: Turn, *, layer: int, made: int, root: int, embedding: int = 0) -> Held:
        """With gradients of the root, of the layers behind this one, of a part of it, of the embedding."""
        rank = self.rank
        behind = max(0, rank.layers - 1 - max(layer, -1)) if layer < rank.layers else 0
        finished = behind * rank.layer
        if not self.is_sharded:
            # Where there was one before, a new gradient is added to it as it is made; the largest counts.
            if turn.accumulates:
                return Held(gradients=FP32 * rank.weights, whole=FP32 * embedding)
            return Held(gradients=FP32 * (finished + made + root + embedding), whole=0)
        gathered = rank.element * self._gathered(turn, layer)
        if turn.reduces:
            # Packed to be reduced: kept until the next layer's are packed.
            packed = FP32 * rank.layer if behind else 0
            whole = self._unreduced(turn, rank.weights - finished, made + root + embedding)
            return Held(gradients=FP32 * self._share(finished), whole=gathered + packed + whole)
        if turn.accumulates:
            whole = self._unreduced(turn, rank.weights, made + root + embedding)
        else:
            whole = FP32 * finished + rank.element * (made + root + embedding)
        return Held(gradients=0, whole=gathered + whole)

    def _unreduced(self, turn: Turn, waiting: int, new: int) -> int:
        """Gradients that are not reduced: sums so far, and beside sums in fp32 those of this micro-batch."""
        if not turn.accumulates:
            return self.rank.element * new
        return FP32 * waiting + (self.rank.element * new if self.rank.is_half else 0)

    def _gathered(self, turn: Turn, layer: int) -> int:
        """Weights that are gathered in the backward of a layer, or of the loss (behind all layers)."""
        rank = self.rank
        if rank.point.zero == 2 or turn.follows_backward:
            return rank.weights
        if layer < 0:
            return rank.weights if rank.point.pp > 1 else rank.root + rank.embedding
        ahead = rank.layer if layer > 0 else rank.embedding
        here = min(1, rank.layers - layer)
        if rank.point.pp > 1:  # those behind stay
            here = rank.layers - layer
        return rank.root + ahead + here * rank.layer


def _dealt(sizes: list[int], ranks: int) -> list[int]:
    """What the first rank gets if weights are dealt out: the largest first, each to whom has least."""
    held = [0] * ranks
    mine = []
    for place, size in sorted(enumerate(sizes), key=lambda one: -one[1]):
        owner = held.index(min(held))
        held[owner] += size
        mine += [place] if owner == 0 else []
    return [sizes[place] for place in sorted(mine)]
