"""Prices points: memory, time and bytes of a step, from the parts below, with the overlap rules.

    every micro-batch    matrix products, attention, head      ulysses and ring exchange, tensor parallelism, activations to the host
    once a step          optimizer                             gradients, weights (ZeRO-2 and 3: every micro-batch)
    pipeline             bubble = (pp - 1) micro-batches       boundary activations

What hides what: ring stages behind the compute of the stage before (attention.py); offloaded activations
behind the whole compute; a share of ZeRO-3's gathers, of gradients and of tensor parallelism by assumption;
the exchange of heads behind nothing.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from seqmesh.planner.cost.attention import AttentionCost, Loads, Shape, price_attention
from seqmesh.planner.cost.compute import Compute
from seqmesh.planner.cost.estimate import PIPELINE, Piece, Price, compute
from seqmesh.planner.cost.memory import MemoryModel
from seqmesh.planner.cost.network import PCIE, Group, Network, add_bytes, place
from seqmesh.planner.inputs.job import Job, Point

TP_FORWARD, TP_BACKWARD = 4, 6
"""Collectives of (tokens, hidden) in a layer under tensor parallelism with its sequence parallelism:
PAPER.md, 4M and 10M.
"""


class Pricer:
    """Prices the points of one job; what points share is computed once."""

    def __init__(self, job: Job, loads: Loads | None = None) -> None:
        self.job = job
        self.loads = loads or Loads(job)
        self.memory = MemoryModel(job, self.loads)
        self.compute = Compute(job)
        self.network = Network(job.cluster, job.assumptions)
        self._attention = lru_cache(maxsize=None)(self._price_attention)
        self._group = lru_cache(maxsize=None)(self._place)

    def price(self, point: Point) -> Price:
        """Everything about a legal point."""
        job, m = self.job, self.job.model
        memory, load = self.memory.of(point), self.loads(point.ring)
        linear = 6.0 * m.matmul_parameters * job.seq_len * job.global_batch
        pair = 12.0 * m.layers * m.heads * m.head_dim * job.global_batch
        return Price(
            point=point,
            memory=memory,
            fits=memory.fits(job),
            pieces=self._pieces(point),
            bytes_per_step=add_bytes(self._bytes(point)),
            tokens=job.seq_len * job.global_batch,
            gpus=point.gpus,
            layout=load.layout.name,
            exchanges=load.exchanges,
            imbalance=load.imbalance,
            flops=linear + pair * job.mask.area,
            flops_noncausal=linear + pair * sum(length**2 for length in job.documents or (job.seq_len,)),
            peak=job.peak,
        )

    def with_assumption(self, name: str, value: float) -> "Pricer":
        """The same job under another assumption; shares are kept below 1."""
        job = replace(self.job, assumptions=self.job.assumptions.moved(name, value))
        return Pricer(job, None if name == "attention_half_rows" else self.loads)

    def with_axes(self, axes: tuple[str, ...]) -> "Pricer":
        """The same job with its mesh axes in another order."""
        return Pricer(replace(self.job, axes=axes), self.loads)

    def with_nodes(self, nodes: int) -> "Pricer":
        """The same job on so many nodes."""
        return Pricer(replace(self.job, cluster=replace(self.job.cluster, nodes=nodes)), self.loads)

    def seconds(self, point: Point) -> float:
        """The estimate of a step alone."""
        return sum(piece.exposed for piece in self._pieces(point))

    def _pieces(self, point: Point) -> tuple[Piece, ...]:
        work = list(self._work(point))
        busy = sum(piece.seconds for piece in work)
        shade = _Shade(busy)
        every = [*work, *map(shade.hide, (*self._exchanges(point), *self._activations_to_host(point, busy)))]
        pieces = [
            *every,
            *self._bubble(point, every),
            *map(shade.hide, self._weights(point, busy)),
            *self._optimizer(point),
        ]
        return tuple(piece for piece in pieces if piece.seconds)

    def group(self, point: Point, *members: str) -> Group:
        """The process group over some axes."""
        return self._group(point.tp, point.ulysses, point.ring, point.dp, point.pp, members)

    def _place(self, tp: int, ulysses: int, ring: int, dp: int, pp: int, members: tuple[str, ...]) -> Group:
        degree = {"tp": tp, "ulysses": ulysses, "ring": ring, "dp": dp, "pp": pp}
        degrees = tuple(degree[axis] for axis in self.job.axes)
        return place(self.job.axes, degrees, frozenset(members), self.job.cluster.gpus_per_node)

    def attention(self, point: Point) -> AttentionCost:
        """One layer's attention for one micro-batch."""
        return self._attention(
            point.tp, point.micro_batch, self.group(point, "ulysses"), self.group(point, "ring")
        )

    def _price_attention(self, tp: int, batch: int, ulysses: Group, ring: Group) -> AttentionCost:
        shape = Shape.of(self.job, batch=batch, ulysses=ulysses.size, tp=tp)
        return price_attention(self.job, self.loads(ring.size), shape, ulysses, ring)

    def runs(self, point: Point) -> int:
        """How often a rank computes a layer in a step."""
        return point.layers(self.job) * point.micro_batches(self.job)

    def _work(self, point: Point) -> Iterator[Piece]:
        layer, attention = self.compute.layer(point.tp, point.tokens(self.job)), self.attention(point)
        runs, ahead, back = self.runs(point), attention.forward, attention.backward
        yield compute("matrix products", runs * (layer.matmul_forward + layer.matmul_backward))
        yield compute("attention kernel", runs * (ahead.kernel + back.kernel))
        yield compute("attention merge and launches", runs * (ahead.merge + back.merge))
        yield compute(
            "norms, rotary, activation",
            runs * (1 + self.job.assumptions.streamed_backward) * layer.elementwise,
        )
        again = layer.mlp_forward if point.tiling == "mlp" else 0.0
        if point.checkpointing == "full":
            again += layer.matmul_forward + layer.elementwise + ahead.kernel + ahead.merge
        yield compute("recomputation", runs * again)
        head = self.compute.head(point.tp, point.tokens(self.job), point.tiling != "none")
        yield compute("output head and loss", point.micro_batches(self.job) * head)

    def _exchanges(self, point: Point) -> Iterator[Piece]:
        """Ulysses, ring and tensor parallelism, inside every layer. Recomputation repeats the forward's."""
        attention, runs = self.attention(point), self.runs(point)
        ahead, back, times = attention.forward, attention.backward, _forwards(point)
        ulysses, ring, tp = (self.group(point, axis) for axis in ("ulysses", "ring", "tp"))
        heads = runs * (times * ahead.heads + back.heads)
        yield Piece(name="ulysses exchange", cause=self.network.reach(ulysses), seconds=heads, exposed=heads)
        yield Piece(
            name="ring exchange",
            cause=self.network.reach(ring),
            seconds=runs * (times * ahead.rows + back.rows),
            exposed=runs * (times * ahead.rows_exposed + back.rows_exposed),
        )
        calls = times * TP_FORWARD + TP_BACKWARD
        seconds = runs * self.network.round_seconds(tp, calls * self._tp_call(point), calls)
        exposed = seconds * self.job.assumptions.tp_exposed
        yield Piece(
            name="tensor parallel exchange", cause=self.network.reach(tp), seconds=seconds, exposed=exposed
        )

    def _tp_call(self, point: Point) -> float:
        """Bytes that a rank sends in one all-gather or reduce-scatter of (tokens, hidden)."""
        return self._activation(point) * (point.tp - 1)

    def _activation(self, point: Point) -> float:
        """Bytes of one activation of hidden size of a rank's tokens: a checkpoint, or what crosses a pipeline
        boundary.
        """
        return self.job.numerics.element * self.job.model.hidden * point.tokens(self.job) / point.tp

    def _activations_to_host(self, point: Point, busy: float) -> Iterator[Piece]:
        if point.offloads_activations:
            copied = 2 * self._activation(point) * self.runs(point) / self._host_rate()
            yield Piece(
                name="activations to and from the host",
                cause=PCIE,
                seconds=copied,
                exposed=max(0.0, copied - busy),
            )

    def _host_rate(self) -> float:
        return self.job.cluster.gpu.pcie_bytes_per_s * self.job.assumptions.host_copy

    def _bubble(self, point: Point, every: list[Piece]) -> Iterator[Piece]:
        """Idle time while the pipeline fills and drains, and its boundaries."""
        if point.pp == 1:
            return
        bubble = (point.pp - 1) * sum(piece.exposed for piece in every) / point.micro_batches(self.job)
        yield Piece(name="pipeline bubble", cause=PIPELINE, seconds=bubble, exposed=bubble)
        group = self.group(point, "pp")
        sends = 2 * (point.micro_batches(self.job) + point.pp - 1)
        seconds = sends * self.network.hop_seconds(group, self._activation(point))
        yield Piece(
            name="pipeline exchange", cause=self.network.reach(group), seconds=seconds, exposed=seconds
        )

    def _weights(self, point: Point, busy: float) -> Iterator[Piece]:
        """Data parallelism and ZeRO, over all ranks that hold the same weights."""
        group = self.group(point, "ulysses", "ring", "dp")
        link, runs = self.network.reach(group), self.runs(point)
        gradients, gathers = self._sent_for_weights(point, self.memory.fullest_parameters(point))
        reduce = self.network.round_seconds(group, gradients, runs if point.zero >= 2 else 1)
        exposed = reduce * (1 - self.job.assumptions.gradient_overlap)
        yield Piece(name="gradient reduction", cause=link, seconds=reduce, exposed=exposed)
        if point.zero:
            gather = self.network.round_seconds(group, gathers, 2 * runs if point.zero == 3 else 1)
            # ZeRO-3 fetches a layer's weights while the one before computes
            hidden = min(self.job.assumptions.prefetch * gather, busy) if point.zero == 3 else 0.0
            yield Piece(name="weight gathering", cause=link, seconds=gather, exposed=gather - hidden)

    def _sent_for_weights(self, point: Point, n: float) -> tuple[float, float]:
        """Bytes that a rank of n weights sends in a step to reduce gradients, and to gather weights."""
        numerics = self.job.numerics
        part, micro = (point.replicas - 1) / point.replicas, point.micro_batches(self.job)
        reductions = (2, 1, micro, micro)[
            point.zero
        ]  # an all-reduce sends what a reduce-scatter and an all-gather do
        gathers = (0, 1, 1, 2 * micro)[point.zero]
        return numerics.gradient * n * part * reductions, numerics.element * n * part * gathers

    def _optimizer(self, point: Point) -> Iterator[Piece]:
        a, numerics = self.job.assumptions, self.job.numerics
        mine = self.memory.fullest_parameters(point) / (point.replicas if point.zero else 1)
        if not point.offloads_optimizer:
            yield compute("optimizer", self.compute.streamed(numerics.update * mine))
            return
        copied = (
            mine * (numerics.gradient + numerics.element) / self._host_rate()
        )  # gradients down, then weights up
        yield Piece(
            name="gradients and weights to and from the host", cause=PCIE, seconds=copied, exposed=copied
        )
        yield compute("optimizer on the host", mine * numerics.update / a.host_memory)

    def _bytes(self, point: Point) -> Iterator[dict[str, float]]:
        """Bytes per link class that one GPU sends in a step, on average."""
        attention, network, runs, times = (
            self.attention(point),
            self.network,
            self.runs(point),
            _forwards(point),
        )
        ulysses, ring, pp = (self.group(point, axis) for axis in ("ulysses", "ring", "pp"))
        heads = times * attention.forward.heads_bytes + attention.backward.heads_bytes
        rows = times * attention.forward.rows_bytes + attention.backward.rows_bytes
        yield network.spread_bytes(ulysses.off_node, runs * heads / point.sp)
        yield network.spread_bytes(self.loads(point.ring).off_node(ring.per_node), runs * rows / point.sp)
        yield network.round_bytes(
            self.group(point, "tp"), runs * (times * TP_FORWARD + TP_BACKWARD) * self._tp_call(point)
        )
        yield network.round_bytes(
            self.group(point, "ulysses", "ring", "dp"),
            sum(self._sent_for_weights(point, self.memory.mean_parameters(point))),
        )
        sent = 2 * point.micro_batches(self.job) * self._activation(point) * (point.pp - 1) / point.pp
        yield network.spread_bytes((pp.nodes - 1) / (point.pp - 1) if point.pp > 1 else 0.0, sent)
        if point.offloads_optimizer:
            mine = self.memory.mean_parameters(point) / point.replicas
            yield {PCIE: mine * (self.job.numerics.gradient + self.job.numerics.element)}
        if point.offloads_activations:
            yield {PCIE: 2 * self._activation(point) * runs}


class _Shade:
    """What can hide behind compute: no more, over all pieces and links, than there is compute.

    So no link is busy longer than the step.

    Links of two classes could hide at once; counting them one after the other is a little pessimistic, and
    keeps a faster GPU from ever being slower.
    """

    def __init__(self, busy: float) -> None:
        self._left = busy

    def hide(self, piece: Piece) -> Piece:
        """The piece, hidden only as far as there is compute left."""
        if piece.exposed >= piece.seconds:
            return piece
        hidden = min(piece.seconds - piece.exposed, self._left)
        self._left -= hidden
        return replace(piece, exposed=piece.seconds - hidden)


def _forwards(point: Point) -> int:
    """Forward passes of a layer for one backward."""
    return 2 if point.checkpointing == "full" else 1
