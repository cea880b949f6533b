"""Memory of one rank at the peak of a step, by category.

    states        parameters, gradients, optimizer                       ZeRO stage, tp, pp
    activations   what autograd keeps of every layer                     2h (6 + 2κ) + 6f bytes a token in bf16 (PAPER.md), by module
    a moment      logits and loss  |  backward of attention  |  backward of the MLP        the largest of the three
    overhead      a stated share of the memory                           assumptions.py

Pipeline stages differ: the first holds the embedding and most micro-batches, the last the head and the
logits. The fuller one counts.

Source: PAPER.md, "Formulas"; ring.py, ulysses.py and merge.py for the attention's own buffers.
"""

from dataclasses import dataclass
from functools import lru_cache

from seqmesh.planner.cost.attention import Loads
from seqmesh.planner.inputs.job import Job, Point
from seqmesh.planner.trainer.memory import trainer_moments
from seqmesh.schedule.heads import default_chunks, split_heads

TILE_ROWS = 4096
"""Rows of a tile of the loss (loss.py's chunk) and of the MLP."""

LOGIT_BYTES = 6
"""Of one logit: bf16, and fp32 for the loss. PAPER.md."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the fuller end stage of the pipeline."""

    categories: dict[str, int]
    """Bytes at the peak: states, activations, the moment of the peak, overhead."""
    moments: dict[str, int]
    """Bytes of each moment that could be the peak."""
    host: int
    """Bytes offloaded to the host."""

    def fits(self, job: Job) -> bool:
        """Whether the GPU and its share of the host hold it."""
        return self.total <= job.capacity and self.host <= job.assumptions.host_bytes

    def over(self, job: Job) -> int:
        """Bytes beyond the GPU's memory or its share of the host's, whichever is more."""
        return max(self.total - job.capacity, self.host - round(job.assumptions.host_bytes))

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.categories.values())


class MemoryModel:
    """Memory of the points of one job."""

    def __init__(self, job: Job, loads: Loads) -> None:
        self._job, self._loads = job, loads
        self._transients = lru_cache(maxsize=None)(self._attention_moment)
        self._layer = lru_cache(maxsize=None)(self._layer_activations)

    def of(self, point: Point) -> Memory:
        """The memory of a point."""
        if self._job.stack == "trainer":
            return self._trainer(point)
        ends = {0, point.pp - 1}
        return max((self._stage(point, stage) for stage in ends), key=lambda memory: memory.total)

    def _trainer(self, point: Point) -> Memory:
        job = self._job
        moments = trainer_moments(job.model, seq_len=job.seq_len, ulysses=point.ulysses, ring=point.ring)
        peak = max(moments, key=lambda moment: moment.total)
        kept = {name: size for name, size in vars(peak).items() if name != "name" and size}
        overhead = round(job.assumptions.overhead * job.cluster.gpu.memory_bytes)
        return Memory(
            categories={**kept, "overhead": overhead},
            moments={moment.name: moment.total for moment in moments},
            host=0,
        )

    def floor(self, point: Point) -> int:
        """A lower bound of the total that needs no schedule: states and activations of the first stage."""
        if self._job.stack == "trainer":
            return 0
        states, _ = self._states(point, first=True, last=point.pp == 1)
        activations, _ = self._activations(point, 0)
        return sum(states.values()) + sum(activations.values())

    def _stage(self, point: Point, stage: int) -> Memory:
        job = self._job
        last = stage == point.pp - 1
        states, host = self._states(point, first=stage == 0, last=last)
        activations, offloaded = self._activations(point, stage)
        attention = self._transients(point.tp, point.ulysses, point.ring, point.micro_batch)
        moments = {
            "logits": self._logits(point) if last else {},
            "attention": attention,
            "mlp": self._mlp_moment(point),
        }
        peak = max(moments.values(), key=lambda moment: sum(moment.values()))
        overhead = round(job.assumptions.overhead * job.cluster.gpu.memory_bytes)
        kept = {name: size for name, size in (*states.items(), *activations.items(), *peak.items()) if size}
        return Memory(
            categories={**kept, "overhead": overhead},
            moments={name: sum(moment.values()) for name, moment in moments.items()},
            host=host + offloaded,
        )

    def _states(self, point: Point, *, first: bool, last: bool) -> tuple[dict[str, int], int]:
        numerics, n = self._job.numerics, self.parameters(point, first=first, last=last)
        shards = [point.replicas if point.zero >= stage else 1 for stage in (1, 2, 3)]
        optimizer = numerics.optimizer * n // shards[0]
        offloaded = point.offloads_optimizer
        model = self._job.model
        layer = model.layer_parameters // point.tp
        working = 0
        if point.zero == 3:  # the layer in use and the one that is fetched; or the embedding
            working = numerics.element * max(2 * layer, model.embedding_parameters // point.tp)
        if point.zero >= 2:  # gradients of a layer, before they are scattered
            working += numerics.gradient * layer
        states = {
            "parameters": numerics.element * n // shards[2],
            "gradients": numerics.gradient * n // shards[1],
            "optimizer": 0 if offloaded else optimizer,
            "zero_buffers": working,
        }
        return states, optimizer if offloaded else 0

    def parameters(self, point: Point, *, first: bool = True, last: bool = True) -> int:
        """Weights of one rank before ZeRO shards them: a pipeline stage's share of a tensor-parallel shard."""
        model = self._job.model
        if point.pp == 1:
            return model.parameters // point.tp
        ends = int(first) + int(last)  # the last stage holds a copy of tied embeddings
        return (
            point.layers(self._job) * model.layer_parameters + ends * model.embedding_parameters
        ) // point.tp

    def fullest_parameters(self, point: Point) -> int:
        """Weights of a rank of the fuller end stage of the pipeline."""
        if point.pp == 1:
            return self.parameters(point)
        return max(self.parameters(point, last=False), self.parameters(point, first=False))

    def mean_parameters(self, point: Point) -> float:
        """Weights of a rank before ZeRO shards them, on average over the pipeline's stages."""
        if point.pp == 1:
            return self.parameters(point)
        model = self._job.model
        return (model.layers * model.layer_parameters + 2 * model.embedding_parameters) / point.tp / point.pp

    def layer_activations(self, point: Point) -> dict[str, int]:
        """What autograd keeps of one layer for one micro-batch, by module, without checkpointing."""
        return self._layer(point.tp, point.ulysses, point.tokens(self._job), point.tiling == "mlp")

    def _layer_activations(self, tp: int, ulysses: int, n: int, mlp_tiled: bool) -> dict[str, int]:
        m, element = self._job.model, self._job.numerics.element
        heads, kv_heads = m.heads // tp, m.kv_heads // tp
        (shares,) = split_heads(heads, kv_heads, ulysses)
        rows = n * ulysses  # of a ulysses rank, all its group's tokens
        exchanged = ulysses > 1
        q, kv = (
            (rows * max(s.q for s in shares), rows * max(s.kv for s in shares))
            if exchanged
            else (n * heads, n * kv_heads)
        )
        attention = (
            element * m.head_dim * (2 * q + 2 * kv) + 4 * q
        )  # q, k, v, out as the kernel sees them; fp32 lse
        attention += (
            element * m.head_dim * n * heads if exchanged else 0
        )  # out at home, which the output projection keeps
        ffn = (3 if m.gated else 2) * m.intermediate
        return {
            "activations_norms": element * 4 * m.hidden * n // tp,  # inputs and outputs of both norms
            "activations_attention": attention,
            "activations_mlp": 0 if mlp_tiled else element * ffn * n // tp,
        }

    def _activations(self, point: Point, stage: int) -> tuple[dict[str, int], int]:
        """Kept activations, and bytes of them on the host."""
        layers = point.layers(self._job)
        in_flight = min(point.pp - stage, point.micro_batches(self._job))  # 1F1B
        layer = self.layer_activations(point)
        if point.checkpointing == "none":
            return {name: size * layers * in_flight for name, size in layer.items()}, 0
        one = self._job.numerics.element * self._job.model.hidden * point.tokens(self._job) // point.tp
        checkpoints = one * layers * in_flight
        offloaded = max(0, checkpoints - 2 * one) if point.offloads_activations else 0
        return {"checkpoints": checkpoints - offloaded, **layer}, offloaded

    def _logits(self, point: Point) -> dict[str, int]:
        rows, element = point.tokens(self._job), self._job.numerics.element
        if point.tiling != "none":
            rows = min(rows, TILE_ROWS)
        return {
            "logits": rows
            * self._job.model.vocabulary
            // point.tp
            * (LOGIT_BYTES if element == 2 else 2 * element)
        }

    def _mlp_moment(self, point: Point) -> dict[str, int]:
        """Gradients inside the MLP, and its gathered input under tensor parallelism; a tile's activations too
        where it is tiled.
        """
        m, element, rows = self._job.model, self._job.numerics.element, point.tokens(self._job)
        ffn = (3 if m.gated else 2) * m.intermediate // point.tp
        if point.tiling == "mlp":
            rows = min(rows, TILE_ROWS)
            ffn *= 2
        return {"mlp_gradients": element * rows * (ffn + (m.hidden if point.tp > 1 else 0))}

    def _attention_moment(self, tp: int, ulysses: int, ring: int, batch: int) -> dict[str, int]:
        """Buffers of one attention backward, the heads in chunks as ulysses.py takes them."""
        job, load = self._job, self._loads(ring)
        d, element = job.model.head_dim * batch, job.numerics.element
        heads, kv_heads = job.model.heads // tp, job.model.kv_heads // tp
        chunks = split_heads(
            heads, kv_heads, ulysses, default_chunks(ulysses, ring, job.seq_len, kv_heads * d)
        )
        q, kv = (
            max(share.q for part in chunks for share in part),
            2 * max(share.kv for part in chunks for share in part),
        )
        rows = max(load.layout.counts)
        received = max((max(stage.received, stage.sent) for stage in load.stages[1:]), default=0)
        local = -(-rows // ulysses)
        exchange = element * rows * d * (2 * q + 2 * (q + kv)) if ulysses > 1 else 0
        return {
            "attention_gradients": element
            * local
            * d
            * (2 * heads + 2 * kv_heads),  # dout, dq, dk, dv of this rank's tokens
            "attention_exchange": exchange,  # dout, and dq, dk, dv, each sent and received
            "attention_stages": element
            * received
            * d
            * kv
            * 4,  # K/V here and in flight; dK/dV leaving and arriving
            "attention_accumulators": 4 * d * (rows * (q + kv) + received * kv),
        }
