"""Memory of a fused stack's rank at the peak of a step, by category.

    states        parameters, gradients, optimizer               ZeRO stage, tp, pp
    activations   what autograd keeps of every layer             2h (6 + 2κ) + 6f bytes a token in bf16
    a moment      logits and loss, or the backward of            the largest of the three
                  attention, or that of the MLP
    overhead      a stated share of the memory                   inputs/assumptions.py

Pipeline stages differ: the first holds the embedding and most micro-batches, the last the head and the
logits. The fuller one counts.

Source: USP (Fang & Zhao 2024, arXiv 2405.07719), Table 2, for what ZeRO shards; engine/ring.py,
ulysses.py and merge.py for the attention's own buffers. What autograd keeps is counted module by module.
"""

from dataclasses import dataclass, field
from functools import lru_cache

from seqmesh.planner.cost.attention import AttentionShape, hides_heads
from seqmesh.planner.cost.memory import StepMemory, overhead
from seqmesh.planner.cost.parameters import stage_parameters
from seqmesh.planner.cost.pipeline import in_flight
from seqmesh.planner.cost.step_loads import LoadKey, StepLoads
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point
from seqmesh.schedule.heads import split_heads

TILE_ROWS = 4096
"""Rows of a tile of the loss, and of the MLP."""


@dataclass(frozen=True)
class _Placed:
    """Bytes by category on the GPU, and bytes on the host."""

    gpu: dict[str, int]
    host: int = 0
    again: dict[str, int] = field(default_factory=dict)
    """On the GPU while a layer goes backward: what it computes again."""


class FusedMemory:
    """The `MemoryModel` of `FusedStack`."""

    def __init__(self, job: Job, loads: StepLoads) -> None:
        self._job = job
        self._loads = loads
        self._attention_of = lru_cache(maxsize=None)(self._attention_moment)
        self._layer_of = lru_cache(maxsize=None)(self._layer_activations)

    def of(self, point: Point) -> StepMemory:
        """The memory of a point."""
        ends = {0, point.pp - 1}
        memories = (self._stage(point, pipeline_stage) for pipeline_stage in ends)
        return max(memories, key=lambda memory: memory.total)

    def floor(self, point: Point) -> int:
        """A lower bound of the total that needs no schedule: states and activations of the first stage."""
        states = self._states(point, first=True, last=point.pp == 1)
        activations = self._activations(point, 0)
        parts = (states.gpu, activations.gpu, activations.again)
        return sum(sum(part.values()) for part in parts)

    def _stage(self, point: Point, pipeline_stage: int) -> StepMemory:
        last = pipeline_stage == point.pp - 1
        states = self._states(point, first=pipeline_stage == 0, last=last)
        activations = self._activations(point, pipeline_stage)
        loads = self._loads
        attention = self._attention_of(point.tp, point.ulysses, loads.key(point), loads.batch(point))
        moments = {
            "logits": self._logits(point) if last else {},
            "attention": {**activations.again, **attention},
            "mlp": {**activations.again, **self._mlp_moment(point)},
        }
        peak = max(moments.values(), key=lambda moment: sum(moment.values()))
        categories = {**states.gpu, **activations.gpu, **peak}
        present = {name: size for name, size in categories.items() if size}
        gaps = round(self._job.assumptions.fragmentation * sum(present.values()))
        if gaps:
            present["fragmentation"] = gaps
        return StepMemory(
            categories={**present, "overhead": overhead(self._job)},
            moments={name: sum(moment.values()) for name, moment in moments.items()},
            host=states.host + activations.host,
        )

    def _states(self, point: Point, *, first: bool, last: bool) -> _Placed:
        """Weights, gradients and optimizer states, each whole or sharded by the ZeRO stage."""
        numerics = self._job.numerics
        parameters = stage_parameters(self._job, point, first=first, last=last)

        def shards(from_zero_stage: int) -> int:
            return point.replicas if point.zero >= from_zero_stage else 1

        optimizer = numerics.optimizer * parameters // shards(1)
        gradients = numerics.gradient * parameters // shards(2)
        if self._job.stack.shards_masters:
            # The masters are the parameters; what is whole is made of them, in bf16 and for a step at most.
            if point.zero == 2 and self._job.micro_batches(point) > 1:
                gradients += numerics.gradient * parameters
            whole = 0 if point.zero == 3 else numerics.element * parameters
        else:
            whole = numerics.element * parameters // shards(3)
        gpu = {
            "parameters": whole,
            "gradients": gradients,
            "optimizer": 0 if point.offloads_optimizer else optimizer,
            "zero_buffers": self._zero_buffers(point, ends=first + last),
        }
        return _Placed(gpu, host=optimizer if point.offloads_optimizer else 0)

    def _zero_buffers(self, point: Point, ends: int) -> int:
        """Whole weights and gradients for as long as they are needed, with so many of embedding and head."""
        numerics = self._job.numerics
        model = self._job.model
        layer = model.layer_parameters // point.tp
        embedding = model.embedding_parameters // point.tp
        if self._job.stack.shards_masters and point.zero >= 2:
            # FSDP2's root has embedding and head, which stay whole from forward to backward. A layer's
            # gradients are bf16, then fp32 to be scattered, while those of the layer before are.
            gathered = 2 * layer + ends * embedding if point.zero == 3 else 0
            return numerics.element * (gathered + layer) + 2 * numerics.gradient * layer
        size = 0
        if point.zero == 3:  # the layer in use and the one that is fetched; or the embedding
            size = numerics.element * max(2 * layer, embedding)
        if point.zero >= 2:  # gradients of a layer, before they are scattered
            size += numerics.gradient * layer
        return size

    def layer_activations(self, point: Point) -> dict[str, int]:
        """What autograd keeps of one layer for one micro-batch, by module, without checkpointing."""
        return self._layer_of(point.tp, point.ulysses, self._job.tokens(point), point.tiling == "mlp")

    def _layer_activations(self, tp: int, ulysses: int, n: int, mlp_tiled: bool) -> dict[str, int]:
        m = self._job.model
        element = self._job.numerics.element
        ffn = (3 if m.gated else 2) * m.intermediate
        norms = element * 4 * m.hidden * n // tp  # inputs and outputs of both norms
        if self._job.stack.keeps_gathered:
            norms += 2 * element * m.hidden * (n - n // tp)
        return {
            "activations_norms": norms,
            "activations_attention": self._attention_activations(tp, ulysses, n),
            "activations_mlp": 0 if mlp_tiled else element * ffn * n // tp,
        }

    def _attention_activations(self, tp: int, ulysses: int, n: int) -> int:
        """q, k, v and out as the kernel sees them and the fp32 lse; with ulysses out at home once more."""
        m = self._job.model
        element = self._job.numerics.element
        heads, kv_heads = m.heads // tp, m.kv_heads // tp
        at_home = 0
        q_rows, kv_rows = n * heads, n * kv_heads  # rows x heads
        if ulysses > 1:
            # A ulysses rank holds all its group's tokens, of its own heads only.
            (shares,) = split_heads(heads, kv_heads, ulysses)
            group_rows = n * ulysses
            q_rows = group_rows * max(share.q for share in shares)
            kv_rows = group_rows * max(share.kv for share in shares)
            at_home = element * m.head_dim * n * heads  # the output projection keeps its input
        return element * m.head_dim * (2 * q_rows + 2 * kv_rows) + 4 * q_rows + at_home

    def _activations(self, point: Point, pipeline_stage: int) -> _Placed:
        """Kept activations of a pipeline stage, of all its micro-batches in flight."""
        job = self._job
        held = in_flight(point, pipeline_stage, job.micro_batches(point))
        kept_layers = job.layers(point) * held
        layer = self.layer_activations(point)
        selective = point.checkpointing == "selective"
        if point.checkpointing == "none" or (selective and job.stack.selective == "all"):
            return _Placed({name: round(size * kept_layers) for name, size in layer.items()})
        checkpoint = job.numerics.element * job.model.hidden * job.tokens(point) // point.tp
        checkpoints = round(checkpoint * kept_layers)
        # Two stay on the GPU: the one that is copied, and the one in use. Its layer is there, recomputed.
        offloaded = max(0, checkpoints - 2 * checkpoint) if point.offloads_activations else 0
        gpu = {"checkpoints": checkpoints - offloaded}
        if selective:
            gpu |= {name: round(size * kept_layers) for name, size in self._kept_results(point).items()}
            layer = layer if job.stack.selective == "half" else self._made_again(point)
        return _Placed(gpu, host=offloaded, again=layer)

    def _kept_results(self, point: Point) -> dict[str, int]:
        """What a selective checkpoint keeps of a layer beside its input: matrix products, and attention's."""
        job, m = self._job, self._job.model
        bytes_a_column = job.numerics.element * job.tokens(point) // point.tp
        if (
            job.stack.selective == "half"
        ):  # q, v, attention's output and lse, the first of the MLP, and its last
            attended = (2 * m.heads + m.kv_heads) * m.head_dim
            mlp = m.intermediate + (m.hidden if m.gated else 0)
            lse = 4 * m.heads * job.tokens(point) // point.tp
            return {"activations_products": bytes_a_column * (attended + mlp) + lse}
        before_silu = 0 if point.tiling == "mlp" else (2 if m.gated else 1) * m.intermediate
        # Without ulysses q, k and v are what attention keeps already.
        qkv = (m.heads + 2 * m.kv_heads) * m.head_dim if point.ulysses > 1 else 0
        down = 0 if point.tiling == "mlp" else m.hidden
        return {
            "activations_attention": self.layer_activations(point)["activations_attention"],
            "activations_products": bytes_a_column * (qkv + m.hidden + before_silu + down),
        }

    def _made_again(self, point: Point) -> dict[str, int]:
        """The rest of a layer, made again for its backward: norms, and the MLP's activation."""
        job, m = self._job, self._job.model
        whole = self.layer_activations(point)
        mlp = 0 if point.tiling == "mlp" else job.numerics.element * m.intermediate * job.tokens(point)
        return {"activations_norms": whole["activations_norms"], "activations_mlp": mlp // point.tp}

    def _logits(self, point: Point) -> dict[str, int]:
        job = self._job
        rows = job.tokens(point)
        if point.tiling != "none":
            rows = min(rows, TILE_ROWS)
        element = job.numerics.element
        a = job.assumptions
        logit_bytes = 2 * element if element == 4 else a.logit_bytes_tp if point.tp > 1 else a.logit_bytes
        logits = round(rows * job.model.vocabulary // point.tp * logit_bytes)
        gathered = element * rows * job.model.hidden if job.stack.shards_masters and point.tp > 1 else 0
        return {"logits": logits, "head_input": gathered}

    def _mlp_moment(self, point: Point) -> dict[str, int]:
        """Gradients inside the MLP, and its gathered input under tensor parallelism.

        Where it is tiled, a tile's activations too: they are made again in the backward.
        """
        m = self._job.model
        rows = self._job.tokens(point)
        ffn = (3 if m.gated else 2) * m.intermediate // point.tp
        if point.tiling == "mlp":
            rows = min(rows, TILE_ROWS)
            ffn *= 2
        gathered = m.hidden if point.tp > 1 else 0
        return {"mlp_gradients": self._job.numerics.element * rows * (ffn + gathered)}

    def _attention_moment(self, tp: int, ulysses: int, key: LoadKey, batch: int) -> dict[str, int]:
        """Buffers of one attention backward, the heads in chunks as engine/ulysses.py takes them."""
        job = self._job
        load = self._loads.of(key)
        element = job.numerics.element
        shape = AttentionShape.of(job, batch=batch, ulysses=ulysses, tp=tp)
        d = shape.head_dim * batch
        chunks = shape.head_chunks(load.layout.s, key.ring)
        q = kv = 0
        for chunk in chunks:
            for share in chunk:
                q = max(q, share.q)
                kv = max(kv, 2 * share.kv)  # k and v
        rows = max(load.layout.counts)
        home_rows = -(-rows // ulysses)
        # Rows of the fullest stage that does not compute a rank's own.
        received = max((max(stage.received, stage.sent) for stage in load.stages[1:]), default=0)
        # Where chunks overlap, the next one's dout is sent and received while this one's is in use.
        douts = 3 if hides_heads(job, ulysses, len(chunks)) else 2
        return {
            # dout, dq, dk, dv of this rank's tokens
            "attention_gradients": element * home_rows * d * (2 * shape.heads + 2 * shape.kv_heads),
            # dout, and dq, dk, dv, each sent and received
            "attention_exchange": element * rows * d * (douts * q + 2 * (q + kv)) if ulysses > 1 else 0,
            # K/V here and in flight; dK/dV leaving and arriving
            "attention_stages": element * received * d * kv * 4,
            # fp32: sums of dq and of the rank's own dk, dv; and dk, dv of received rows
            "attention_accumulators": 4 * d * (rows * (q + kv) + received * kv),
        }
