"""The cost model: memory, time and bytes of a step at any point, put together from this folder's parts.

    every micro-batch    matrix products, attention, head
                         ulysses, ring, experts and tensor parallel exchange, activations to the host
    once a step          optimizer, gradients, weights          ZeRO-2 and 3: every micro-batch
    pipeline             bubble and boundary activations: pipeline.py
    everything           waits for the slowest GPU

What hides what: ring stages behind the compute of the stage before, and heads behind that of other chunks of
heads, where there are chunks enough (both in attention.py); offloaded activations behind the whole compute; a
share of ZeRO-3's gathers, of gradients and of tensor parallelism by assumption.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from math import log, sqrt
from operator import attrgetter
from typing import NamedTuple

from seqmesh.planner.cost.attention import AttentionCost, AttentionShape, attention_cost, mean_cost
from seqmesh.planner.cost.compute import Compute
from seqmesh.planner.cost.estimate import PIPELINE, CostTerm, StepEstimate, compute
from seqmesh.planner.cost.experts import expert_group, sent_to_experts, sparse_share
from seqmesh.planner.cost.fused_memory import FusedMemory
from seqmesh.planner.cost.host import bytes_to_host, checkpoints_to_host, optimizer_terms
from seqmesh.planner.cost.memory import MemoryModel
from seqmesh.planner.cost.network import Group, Network, add_bytes, place
from seqmesh.planner.cost.overlap import OverlapBudget
from seqmesh.planner.cost.parameters import fullest_parameters, mean_parameters
from seqmesh.planner.cost.pipeline import boundary_bytes, crossings, exposed_crossings, idle_seconds
from seqmesh.planner.cost.recurrent import RecurrentLayers
from seqmesh.planner.cost.ring_load import RingLoad
from seqmesh.planner.cost.step_loads import LoadKey, StepLoads
from seqmesh.planner.cost.tensor_parallel import tensor_calls
from seqmesh.planner.cost.trainer_memory import TrainerMemory
from seqmesh.planner.cost.weights import sent_in_groups
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.stack import TrainerStack


class _Layers(NamedTuple):
    """The terms of all layers and micro-batches."""

    terms: tuple[CostTerm, ...]
    busy: float
    """Seconds that the GPU's own units compute."""
    left: float
    """Of these, those that hide nothing."""
    exposed: float
    """Seconds that they take in all."""


class CostModel:
    """Costs of the points of one job; what points share is computed once."""

    def __init__(self, job: Job, loads: StepLoads | None = None) -> None:
        self.job = job
        self.loads = loads or StepLoads(job)
        memory = TrainerMemory if isinstance(job.stack, TrainerStack) else FusedMemory
        self.memory: MemoryModel = memory(job, self.loads)
        self.compute = Compute(job)
        self.network = Network(job.cluster, job.assumptions)
        self.recurrent = RecurrentLayers(job, self.loads, self.network)
        self._attention = lru_cache(maxsize=None)(self._cost_of)
        self._shape = lru_cache(maxsize=None)(partial(AttentionShape.of, job))
        self._degrees = attrgetter(*job.axes)
        self._group = lru_cache(maxsize=None)(self._place)
        self._layers = lru_cache(maxsize=1024)(self._in_layers)

    def estimate(self, point: Point) -> StepEstimate:
        """Everything about a legal point."""
        job = self.job
        m = job.model
        memory = self.memory.of(point)
        load = self.load(point)
        linear = 6.0 * m.matmul_parameters * job.seq_len * job.global_batch
        linear += self.recurrent.flops()
        pair = 6.0 * m.layers * m.heads * m.both_dims
        return StepEstimate(
            point=point,
            memory=memory,
            fits=memory.fits(job),
            terms=self._terms(point),
            bytes_per_step=add_bytes(self._bytes(point)),
            tokens=job.seq_len * job.global_batch,
            gpus=point.gpus,
            layout=load.layout.name,
            stages=load.asked,
            exchanges=load.exchanges,
            imbalance=load.imbalance,
            flops=linear + pair * job.area,
            flops_noncausal=linear + pair * job.all_pairs * (m.attending / m.layers),
            peak=job.peak,
        )

    def seconds(self, point: Point) -> float:
        """The estimate of a step alone."""
        return sum(term.exposed for term in self._terms(point))

    def seconds_of_layers(self, point: Point) -> float:
        """Of these, those of layers and pipeline: the same for points that differ in ZeRO's stage alone."""
        layers = self._layers_of(point)
        return layers.exposed + sum(term.exposed for term in self._bubble(point, layers))

    def with_assumption(self, name: str, value: float) -> "CostModel":
        """The same job under another assumption; shares are kept below 1."""
        job = replace(self.job, assumptions=self.job.assumptions.moved(name, value))
        # Ring loads weigh blocks by this one; the numbers of exchanges chosen under the others are kept.
        return CostModel(job, None if name == "attention_half_rows" else self.loads)

    def with_axes(self, axes: tuple[str, ...]) -> "CostModel":
        """The same job with its mesh axes in another order."""
        return CostModel(replace(self.job, axes=axes), self.loads)

    def with_nodes(self, nodes: int) -> "CostModel":
        """The same job on so many nodes."""
        return CostModel(replace(self.job, cluster=replace(self.job.cluster, nodes=nodes)), self.loads)

    def group(self, point: Point, *members: str) -> Group:
        """The process group over some axes."""
        return self._group(self._degrees(point), members)

    def _place(self, degrees: tuple[int, ...], members: tuple[str, ...]) -> Group:
        return place(self.job.axes, degrees, frozenset(members), self.job.cluster.gpus_per_node)

    def attention(self, point: Point) -> AttentionCost:
        """One layer's attention for one micro-batch: the mean over layers, where they see more or less."""
        return mean_cost(tuple((cost, share) for _, share, cost in self._attentions(point)))

    def _attentions(self, point: Point) -> Iterator[tuple[LoadKey, float, AttentionCost]]:
        """That of each kind of layers, with what it depends on and their share."""
        ulysses, ring = self.group(point, "ulysses"), self.group(point, "ring")
        shape = self.attention_shape(point)
        for key, share in self.loads.keys(point):
            yield key, share, self._attention(shape, key, ulysses, ring)

    def _cost_of(self, shape: AttentionShape, key: LoadKey, ulysses: Group, ring: Group) -> AttentionCost:
        return attention_cost(self.job, self.loads.of(key), shape, ulysses, ring)

    def attention_shape(self, point: Point) -> AttentionShape:
        """The sizes of that attention."""
        return self._shape(batch=self.loads.batch(point), ulysses=point.ulysses, tp=point.tp)

    def load(self, point: Point) -> RingLoad:
        """The load of its ring, in the layers that see most."""
        return self.loads.of(self.loads.keys(point)[0].key)

    def layer_runs(self, point: Point) -> int:
        """How often a rank computes a layer in a step."""
        return self.job.layers(point) * self.job.micro_batches(point)

    def repeats_attention(self, point: Point) -> bool:
        """Whether the backward computes attention again, and makes its exchanges again."""
        return point.checkpointing == "full" and not self.job.stack.keeps_attention

    # Terms of the time.

    def _terms(self, point: Point) -> tuple[CostTerm, ...]:
        """The terms of a step, those of 0 s left out.

        What is hidden is taken from one `OverlapBudget`: first by the exchanges inside the layers, then by
        the weights.
        """
        layers = self._layers_of(point)
        budget = OverlapBudget(layers.left)
        terms = [
            *layers.terms,
            *self._bubble(point, layers),
            *budget.hide(self._weights(point, layers.busy)),
            *self._waiting(point, layers.busy),
            *optimizer_terms(self.job, self.compute, point),
        ]
        return tuple(term for term in terms if term.seconds)

    def _layers_of(self, point: Point) -> "_Layers":
        # ZeRO's stage says how documents are dealt, and nothing else of the layers; nor does their order.
        alike = point.but(zero=3 if self.job.documents and point.zero == 3 else 0)
        plain = alike.but(pipeline="1f1b", virtual=1)
        same = self._fullest_and_last(plain) == self._fullest_and_last(point)
        return self._layers(plain if same else alike)

    def _in_layers(self, point: Point) -> "_Layers":
        """What is the same whatever is sharded and in whatever order: work, and exchanges in the layers."""
        attention = self.attention(point)
        work = list(self._work(point, attention))
        busy = sum(term.seconds for term in work)
        budget = OverlapBudget(busy)
        terms = [*work, *budget.hide(self._inside_layers(point, attention, busy))]
        return _Layers(tuple(terms), busy, budget.left, sum(term.exposed for term in terms))

    def _work(self, point: Point, attention: AttentionCost) -> Iterator[CostTerm]:
        """What the GPU's own units compute."""
        job = self.job
        layer = self.compute.layer(point)
        forward, backward = attention.forward, attention.backward
        runs = self.layer_runs(point)
        yield compute("matrix products", runs * (layer.matmul_forward + layer.matmul_backward))
        yield compute("attention kernel", runs * (forward.kernel_s + backward.kernel_s))
        yield compute("attention merge and launches", runs * (forward.merge_s + backward.merge_s))
        yield from self.recurrent.work(point, runs)
        passes = 1 + job.assumptions.streamed_backward
        yield compute("norms, rotary, activation", runs * passes * layer.elementwise)
        # Work that the savers do twice; the exchanges of a repeated forward are counted with the exchanges.
        again = layer.mlp_forward if point.tiling == "mlp" else 0.0
        again += self._repeated(point)
        if self.repeats_attention(point):
            again += forward.kernel_s + forward.merge_s
        yield compute("recomputation", runs * again)
        head = self.compute.head(point.tp, job.tokens(point))
        beside = self._beside_layers(point, attention, head)
        yield compute("output head and loss", job.micro_batches(point) * beside)

    def _repeated(self, point: Point) -> float:
        """Seconds of a layer's products and elementwise work that its backward computes again."""
        layer = self.compute.layer(point)
        selective = self.job.stack.selective
        if point.checkpointing == "none" or (point.checkpointing == "selective" and selective == "all"):
            return 0.0
        if point.checkpointing == "full":
            return layer.elementwise + layer.matmul_forward
        return layer.elementwise + (layer.half_forward if selective == "half" else 0.0)

    def _beside_layers(self, point: Point, attention: AttentionCost, head: float) -> float:
        """Seconds of the head beyond the layers that the last pipeline rank has fewer than the others."""
        if point.pp == 1:
            return head
        layer = self.compute.layer(point)
        seconds = layer.matmul_forward + layer.matmul_backward + layer.elementwise
        seconds += attention.forward.kernel_s + attention.backward.kernel_s + self._repeated(point)
        return max(0.0, head - self._fullest_and_last(point)[1] * seconds)

    def _fullest_and_last(self, point: Point) -> tuple[int, int]:
        """Layers of the fullest rank, and those that the last stage has fewer than the others."""
        layers = self.job.layers(point)
        fewer = point.pp * layers - self.job.model.layers
        return layers, min(fewer, layers // point.virtual)

    def _inside_layers(self, point: Point, attention: AttentionCost, busy: float) -> Iterator[CostTerm]:
        """What is sent while layers are computed."""
        yield from self._exchanges(point, attention)
        yield from checkpoints_to_host(self.job, point, self._checkpoints_copied(point), busy)

    def _exchanges(self, point: Point, attention: AttentionCost) -> Iterator[CostTerm]:
        """Ulysses, ring and tensor parallelism, inside every layer. Recomputation repeats the forward's."""
        forward, backward = attention.forward, attention.backward
        runs = self.layer_runs(point)
        times = 2 if self.repeats_attention(point) else 1
        yield self._on_links(
            "ulysses exchange",
            self.group(point, "ulysses"),
            runs * (times * forward.heads_s + backward.heads_s),
            runs * (times * forward.heads_exposed_s + backward.heads_exposed_s),
        )
        yield self._on_links(
            "ring exchange",
            self.group(point, "ring"),
            runs * (times * forward.rows_s + backward.rows_s),
            runs * (times * forward.rows_exposed_s + backward.rows_exposed_s),
        )
        yield from self.recurrent.exchanges(point, runs, self.group(point, "ulysses", "ring"))
        yield from self._experts(point)
        yield self._tensor_parallel(point)

    def _tensor_parallel(self, point: Point) -> CostTerm:
        """Hidden states between ranks of tp."""
        tp = self.group(point, "tp")
        calls = sum(tensor_calls(self.job, point))
        one = self.network.round_seconds(tp, calls * self._tp_call_bytes(point), calls)
        seconds = self.layer_runs(point) * one
        return self._on_links(
            "tensor parallel exchange", tp, seconds, seconds * self.job.assumptions.tp_exposed
        )

    def _experts(self, point: Point) -> Iterator[CostTerm]:
        """Tokens to the ranks of their experts, and back."""
        if point.experts == 1:
            return
        sent = sent_to_experts(self.job, point)
        group = expert_group(self.job, point)
        seconds = self.network.all_to_all_seconds(group, sent.most, sent.calls, sent.off_node)
        runs = self.layer_runs(point) * sparse_share(self.job.model)
        yield self._on_links("experts exchange", group, runs * seconds, runs * seconds)

    def _on_links(self, name: str, group: Group, seconds: float, exposed: float) -> CostTerm:
        """A term of the slowest link class that a group uses."""
        return CostTerm(name=name, cause=self.network.slowest_link(group), seconds=seconds, exposed=exposed)

    def _tp_call_bytes(self, point: Point) -> float:
        """Bytes that a rank sends in one all-gather or reduce-scatter of (tokens, hidden)."""
        return self._activation_bytes(point) * (point.tp - 1)

    def _activation_bytes(self, point: Point) -> float:
        """Bytes of one activation of hidden size of a rank's tokens.

        That is a checkpoint, and what crosses a pipeline boundary.
        """
        job = self.job
        return job.numerics.element * job.model.hidden * job.tokens(point) / point.tp

    def _checkpoints_copied(self, point: Point) -> float:
        """Bytes of every layer's input, to the host and back."""
        return 2 * self._activation_bytes(point) * self.layer_runs(point)

    def _bubble(self, point: Point, layers: "_Layers") -> Iterator[CostTerm]:
        """Idle time while the pipeline fills and drains, and its boundaries."""
        if point.pp == 1:
            return
        job = self.job
        count = job.micro_batches(point)
        layer = self.compute.layer(point)
        bubble = idle_seconds(
            point, count, layers.exposed / count, job.layers(point) * layer.matmul_backward / 2
        )
        yield CostTerm(name="pipeline bubble", cause=PIPELINE, seconds=bubble, exposed=bubble)
        group = self.group(point, "pp")
        one = self.network.hop_seconds(group, self._activation_bytes(point))
        sent, exposed = crossings(point, count), exposed_crossings(point, count)
        taxed = exposed + job.assumptions.overlap_tax * (sent - exposed)
        yield self._on_links("pipeline exchange", group, sent * one, taxed * one)

    def _waiting(self, point: Point, busy: float) -> Iterator[CostTerm]:
        """All wait for the slowest of N GPUs: about sqrt(2 ln N) standard deviations beyond the mean."""
        spread = self.job.assumptions.straggler * sqrt(2 * log(point.gpus))
        yield compute("waiting for the slowest GPU", spread * busy)

    def _weights(self, point: Point, busy: float) -> Iterator[CostTerm]:
        """Data parallelism and ZeRO, over all ranks that hold the same weights."""
        job = self.job
        a, layers = job.assumptions, job.layers(point)
        replicas = self.group(point, "ulysses", "ring", "dp")
        views = sent_in_groups(job, point, fullest_parameters(job, point), replicas)
        group, sent = views[0]
        # What is exchanged once a step has the last backward, or the first forward, to hide behind.
        a_pass = busy / job.micro_batches(point)
        reduce = sum(self.network.round_seconds(at, one.gradients, one.reductions) for at, one in views)
        beside = 2 / 3 * (busy if sent.reductions > layers else a_pass)
        yield self._hidden("gradient reduction", group, reduce, a.gradient_overlap * (1 - 1 / layers), beside)
        if point.zero:
            gather = sum(self.network.round_seconds(at, one.weights, one.gathers) for at, one in views)
            beside = busy if point.zero == 3 else a_pass / 3 * job.stack.gathers_ahead
            yield self._hidden("weight gathering", group, gather, a.prefetch * (1 - 1 / (2 * layers)), beside)

    def _hidden(self, name: str, group: Group, seconds: float, share: float, beside: float) -> CostTerm:
        """An exchange of which a share hides behind so much compute, and takes its tax of it."""
        hidden = min(share * seconds, beside)
        exposed = seconds - hidden * (1 - self.job.assumptions.overlap_tax)
        return self._on_links(name, group, seconds, exposed)

    # Bytes.

    def _bytes(self, point: Point) -> Iterator[dict[str, float]]:
        """Bytes per link class that one GPU sends in a step, on average."""
        yield from self._attention_bytes(point)
        runs, sequence = self.layer_runs(point), self.group(point, "ulysses", "ring")
        yield from self.recurrent.sent(point, runs, sequence)
        tp_calls = runs * sum(tensor_calls(self.job, point))
        tp_bytes = tp_calls * self._tp_call_bytes(point)
        yield self.network.round_bytes(self.group(point, "tp"), tp_bytes)
        replicas = self.group(point, "ulysses", "ring", "dp")
        for group, sent in sent_in_groups(self.job, point, mean_parameters(self.job, point), replicas):
            yield self.network.round_bytes(group, sent.gradients + sent.weights)
        if point.experts > 1:
            rows = sent_to_experts(self.job, point)
            yield self.network.spread_bytes(rows.off_node, runs * sparse_share(self.job.model) * rows.mean)
        count, nodes = self.job.micro_batches(point), self.group(point, "pp").nodes
        crossed = boundary_bytes(point, count, self._activation_bytes(point), nodes)
        yield self.network.spread_bytes(*crossed)
        yield from bytes_to_host(self.job, point, self._checkpoints_copied(point))

    def _attention_bytes(self, point: Point) -> Iterator[dict[str, float]]:
        attention = self.attention(point)
        runs = self.layer_runs(point)
        times = 2 if self.repeats_attention(point) else 1
        forward, backward = attention.forward, attention.backward
        heads = times * forward.heads_bytes + backward.heads_bytes
        yield self.network.spread_bytes(self.group(point, "ulysses").off_node, runs * heads / point.sp)
        ring = self.group(point, "ring")
        for key, share, cost in self._attentions(point):
            load = self.loads.of(key)
            rows = share * (times * cost.forward.rows_bytes + cost.backward.rows_bytes)
            if load.rows_moved:
                # The rows of the busiest micro-batch; on average over the step they are others.
                rows *= self.loads.rows_moved(key) / load.rows_moved
            yield self.network.spread_bytes(load.off_node(ring.per_node), runs * rows / point.sp)
