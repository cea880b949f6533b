"""Memory of a fused stack's rank at the peak of a step, by category.

    states        parameters, gradients, optimizer               ZeRO stage, tp, pp
    activations   what autograd keeps of every layer             2h (6 + 2κ) + 6f bytes a token in bf16
    a moment      logits and loss, or the backward of            the largest of the three
                  attention, or that of the MLP
    overhead      a stated share of the memory                   inputs/assumptions.py

Of layers of several kinds the mean is kept, and made again; of the MLP's moment the largest counts.
Pipeline stages differ: the first holds the embedding and most micro-batches, the last the head and the
logits. The fuller one counts.

Source: USP (Fang & Zhao 2024, arXiv 2405.07719), Table 2, for what ZeRO shards; engine/ring.py,
ulysses.py and merge.py for the attention's own buffers. What autograd keeps is counted module by module.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from seqmesh.planner.cost.attention import AttentionShape, hides_heads
from seqmesh.planner.cost.memory import StepMemory, overhead
from seqmesh.planner.cost.parameters import stage_parameters
from seqmesh.planner.cost.pipeline import in_flight
from seqmesh.planner.cost.recurrent import FP32
from seqmesh.planner.cost.step_loads import LoadKey, StepLoads
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.mixers import MixedState, Mixer
from seqmesh.planner.inputs.point import TILE_ROWS, Point
from seqmesh.planner.inputs.shape import FeedForward, ModelShape
from seqmesh.schedule.chains import Chains
from seqmesh.schedule.heads import split_heads


class Passed(NamedTuple):
    """What a token passes in a layer's feed-forward networks, in numbers of a token."""

    width: float
    """Between the products, of all networks that it passes."""
    routed: float
    """Experts that it is sent to, of each of which there is an input and a result."""
    results: float
    """Results of width h: of its experts, and of what every token passes."""
    logits: float
    """Of the router."""


def passed_by(of: FeedForward, spread: float) -> Passed:
    """Of layers of a kind, on a rank with so many times the mean of rows."""
    if not of.experts:
        return Passed(of.width, 0, 1, 0)
    routed = spread * of.active
    return Passed(of.width + routed * of.expert_width, routed, routed + (of.width > 0), of.experts)


def mean_passed(model: ModelShape, spread: float) -> Passed:
    """Of a layer, on average over all."""
    kinds = [(of.layers, passed_by(of, spread)) for of in model.feed_forwards]
    if len(kinds) == 1 and model.networks == model.layers:
        return kinds[0][1]
    return Passed(*(sum(n * one[at] for n, one in kinds) / model.layers for at in range(len(Passed._fields))))


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
        self._passed_of = lru_cache(maxsize=None)(self._one_passed)
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
        shape = AttentionShape.of(self._job, batch=loads.batch(point), ulysses=point.ulysses, tp=point.tp)
        kinds = (self._attention_of(shape, key) for key, _ in loads.keys(point))
        attention = max(kinds, key=lambda kind: sum(kind.values()))
        moments = {
            "logits": self._logits(point) if last else {},
            "attention": {**activations.again, **attention},
            "mlp": {**activations.again, **self._mlp_moment(point)},
        }
        if self._job.model.mixer is not None:
            moments["mixer"] = {**activations.again, **self._mixer_moment(self._job.model.mixer, point)}
        peak = max(moments.values(), key=lambda moment: sum(moment.values()))
        categories = {**states.gpu, **activations.gpu, **peak}
        if self._job.model.mixer is not None and not activations.again:
            categories["activations_states"] = self._kept_states(self._job.model.mixer, point, pipeline_stage)
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
        weights = stage_parameters(self._job, point, first=first, last=last)

        def size(each: int, from_zero_stage: int) -> int:
            held = weights.sharded(point) if point.zero >= from_zero_stage else weights.whole
            return int(each * held)

        optimizer = size(numerics.optimizer, 1)
        gradients = size(numerics.gradient, 2)
        if self._job.stack.shards_masters:
            # The masters are the parameters; what is whole is made of them, in bf16 and for a step at most.
            if point.zero == 2 and self._job.micro_batches(point) > 1:
                gradients += int(numerics.gradient * weights.whole)
            whole = 0 if point.zero == 3 else int(numerics.element * weights.whole)
        else:
            whole = size(numerics.element, 3)
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
        experts = model.layer_expert_parameters
        layer = (model.layer_parameters - experts) // point.tp + experts // point.experts
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
        spread = self._job.expert_spread(point)
        tokens = self._job.tokens(point)
        return self._layer_of(point.tp, point.ulysses, tokens, point.tiling == "mlp", spread)

    def _layer_activations(
        self, tp: int, ulysses: int, n: int, mlp_tiled: bool, spread: float
    ) -> dict[str, int]:
        m = self._job.model
        element = self._job.numerics.element
        passed = mean_passed(m, spread)
        # Of every expert its input and its result too; of the router its logits, and in fp32 their softmax.
        ffn = (3 if m.gated else 2) * passed.width + 2 * passed.routed * m.hidden + 3 * passed.logits
        norms = element * 4 * m.hidden * n // tp * m.norms // (2 * m.layers)  # in and out of both norms
        if self._job.stack.keeps_gathered:
            norms += 2 * element * m.hidden * (n - n // tp)
        kept = {
            "activations_norms": norms,
            "activations_attention": self._attention_activations(tp, ulysses, n) * m.attending // m.layers,
            "activations_mlp": 0 if mlp_tiled else int(element * ffn * n // tp),
        }
        if m.mixer is not None:
            numbers = m.mixer.kept + m.mixer.reads
            kept["activations_mixers"] = element * numbers * n * m.mixer.layers // m.layers
        return kept

    def _kept_states(self, mixer: Mixer, point: Point, pipeline_stage: int) -> int:
        """Of all layers of a stage, where none is computed again."""
        held = in_flight(point, pipeline_stage, self._job.micro_batches(point))
        runs = self._job.layers(point) * held * mixer.layers / self._job.model.layers
        return round(runs * self._states_passed(point))

    def _states_passed(self, point: Point) -> int:
        """What a layer keeps of states that enter its pieces, and of transitions of its heads of the walk."""
        return self._loads.batch(point) * self._passed_of(self._loads.chains(point))

    def _one_passed(self, chains: Chains) -> int:
        """Of one sequence."""
        m = self._job.model
        heads, numbers, transition = m.mixer.state if m.mixer else MixedState(0, 0, 0)
        sizes = [chains.sizes(rank) for rank in range(chains.size)]
        own = -(-heads // chains.size)
        entered = max(size.entered for size in sizes) * heads * numbers
        return FP32 * (entered + sizes[0].passed * own * transition)

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
            # The output projection keeps its input.
            at_home = element * m.value_head_dim * n * heads
        # What latent attention keeps between its products: before and behind a norm, and the rotary part.
        z = m.latent
        between = element * n * (2 * (z.q_rank + z.kv_rank) + z.rotary_dim) if z else 0
        # A gate, and its product with the output.
        gate = 2 * element * m.value_head_dim * n * heads if m.gated_attention else 0
        return element * m.both_dims * (q_rows + kv_rows) + 4 * q_rows + at_home + between + gate

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
        passed = mean_passed(m, job.expert_spread(point))
        down = passed.results * m.hidden
        if (
            job.stack.selective == "half"
        ):  # q, v, attention's output and lse, the first of the MLP, and its last
            attended = (m.heads * m.both_dims + m.kv_heads * m.value_head_dim) * m.attending / m.layers
            attended += self._mixer_columns() / 2
            mlp = passed.width + (down if m.gated else 0)
            lse = 4 * m.heads * job.tokens(point) // point.tp
            return {"activations_products": int(bytes_a_column * (attended + mlp)) + lse}
        of_mlp = 0 if point.tiling == "mlp" else (2 if m.gated else 1) * passed.width + down + passed.logits
        # Without ulysses q, k and v are what attention keeps already.
        qkv = m.heads * m.head_dim + m.kv_heads * m.both_dims if point.ulysses > 1 else 0
        mixing = (qkv + m.hidden) * m.attending / m.layers + self._mixer_columns()
        return {
            "activations_attention": self.layer_activations(point)["activations_attention"],
            "activations_products": int(bytes_a_column * (mixing + of_mlp)),
        }

    def _mixer_columns(self) -> float:
        """Numbers of a token that the products of mixers give, of a layer on average."""
        m = self._job.model
        if m.mixer is None:
            return 0.0
        return sum(matrix.columns for matrix in m.mixer.matrices(m.hidden)) * m.mixer.layers / m.layers

    def _made_again(self, point: Point) -> dict[str, int]:
        """The rest of a layer, made again for its backward: norms, and the MLP's activation."""
        job, m = self._job, self._job.model
        whole = self.layer_activations(point)
        passed = mean_passed(m, job.expert_spread(point))
        # Of experts also the rows that come to them, and those that come back.
        again = 0 if point.tiling == "mlp" else passed.width + 2 * passed.routed * m.hidden
        mlp = int(job.numerics.element * again * job.tokens(point) // point.tp)
        again_too = ("activations_norms", "activations_mixers")
        kept = {name: size for name, size in whole.items() if name in again_too}
        return {**kept, "activations_mlp": mlp}

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

        Of experts also gradients of their inputs and results; where they are spread, each sent and received.
        Where it is tiled, a tile's activations too: they are made again in the backward.
        """
        m = self._job.model
        rows = self._job.tokens(point)
        spread = self._job.expert_spread(point)
        kinds = (passed_by(of, spread) for of in m.feed_forwards)
        gates = 3 if m.gated else 2
        ways = 4 if point.experts > 1 else 2
        ffn = max(gates * one.width // point.tp + ways * one.routed * m.hidden for one in kinds)
        if point.tiling == "mlp":
            rows = min(rows, TILE_ROWS)
            ffn *= 2
        gathered = m.hidden if point.tp > 1 else 0
        return {"mlp_gradients": int(self._job.numerics.element * rows * (ffn + gathered))}

    def _mixer_moment(self, mixer: Mixer, point: Point) -> dict[str, int]:
        """Gradients inside a layer that carries a state, and the states of one on their way."""
        numbers = mixer.channels + mixer.inner * (1 + mixer.gates)
        gradients = self._job.numerics.element * numbers * self._job.tokens(point)
        return {"mixer_gradients": gradients, "mixer_states": 2 * self._states_passed(point)}

    def _attention_moment(self, shape: AttentionShape, key: LoadKey) -> dict[str, int]:
        """Buffers of one attention backward, the heads in chunks as engine/ulysses.py takes them."""
        job, ulysses = self._job, shape.ulysses
        load = self._loads.of(key)
        element = job.numerics.element
        d, both = shape.head_dim * shape.batch, shape.both_dims * shape.batch
        chunks = shape.head_chunks(load.layout.s, key.ring)
        q = max(share.q for chunk in chunks for share in chunk)
        kv = max(share.kv for chunk in chunks for share in chunk)
        rows = max(load.layout.counts)
        home_rows = -(-rows // ulysses)
        # Rows of the fullest stage that does not compute a rank's own.
        received = max((max(stage.received, stage.sent) for stage in load.stages[1:]), default=0)
        # Where chunks overlap, the next one's dout is sent and received while this one's is in use.
        douts = 3 if hides_heads(job, ulysses, len(chunks)) else 2
        exchanged = douts * shape.value_head_dim * shape.batch * q + 2 * (d * q + both * kv)
        return {
            # dout, dq, dk, dv of this rank's tokens
            "attention_gradients": element * home_rows * both * (shape.heads + shape.kv_heads),
            # dout, and dq, dk, dv, each sent and received
            "attention_exchange": element * rows * exchanged if ulysses > 1 else 0,
            # K/V here and in flight; dK/dV leaving and arriving
            "attention_stages": element * received * both * kv * 4,
            # fp32: sums of dq and of the rank's own dk, dv; and dk, dv of received rows
            "attention_accumulators": 4 * (rows * (d * q + both * kv) + received * both * kv),
        }
