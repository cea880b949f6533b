"""The predicted timeline of one step on the busiest rank, for chrome://tracing or Perfetto: `seqmesh plan
--trace`.

    micro-batch    layer 0 forward ... layer L-1, head and loss, layer L-1 backward ... layer 0      again for each micro-batch
    a layer        norms, q k v o products | heads out | ring stages, the next fetch beside each | heads home | MLP
    after them     gradient reduction, optimizer, weight gathering

Nothing is priced here: pieces come from `Pricer.price`, a layer's parts from `Pricer.attention` and
`Pricer.compute`, and ring stages from `price_attention` of one stage at a time. Durations of events with a
piece's name add up to its whole seconds, their `exposed_seconds` to what it adds to the estimate, and the
trace ends at the estimate (`Price.seconds`).

What is a drawing and not a schedule: micro-batches stand one after the other where a pipeline interleaves
them; its bubble is drawn half before and half after; a share hidden by assumption is drawn beside the work
just before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

from seqmesh.planner.cost.attention import Shape, price_attention
from seqmesh.planner.cost.estimate import COMPUTE, PIPELINE
from seqmesh.planner.cost.ring_load import StageLoad
from seqmesh.planner.cost.step import TP_BACKWARD, TP_FORWARD, Pricer
from seqmesh.planner.inputs.job import Point
from seqmesh.planner.output.trace_rows import Trace

MOST_EVENTS = 20_000
"""Micro-batches are drawn one by one up to about so many events, at least one; the rest is one event."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One ring stage: its compute, and the fetch of its rows, which runs beside the stage before."""

    kernel: float
    merge: float
    fetch: float
    exposed: float


def timeline(pricer: Pricer, point: Point) -> dict[str, Any]:
    """One step of a point as a Chrome trace: {"traceEvents": [...], "displayTimeUnit": "ms"}."""
    return _Step(pricer, point).draw()


def ring_stages(pricer: Pricer, point: Point) -> tuple[list[Stage], list[Stage]]:
    """The stages of one attention call, forward and backward; they add up to `pricer.attention(point)`."""
    job, ring = pricer.job, pricer.loads(point.ring)
    shape = Shape.of(job, batch=point.micro_batch, ulysses=point.ulysses, tp=point.tp)
    groups = pricer.group(point, "ulysses"), pricer.group(point, "ring")

    def priced(*stages: StageLoad) -> tuple[Any, Any]:
        cost = price_attention(
            job, replace(ring, stages=tuple(replace(stage, count=1) for stage in stages)), shape, *groups
        )
        return cost.forward, cost.backward

    ways: tuple[list[Stage], list[Stage]] = ([], [])
    before: StageLoad | None = None
    for stage in ring.stages:
        for number in range(min(stage.count, 2)):  # those after the second are like the second
            alone, times = priced(stage), stage.count - 1 if number else 1
            beside = priced(before, stage) if before else alone
            first = priced(before) if before else (None, None)
            for way, one, pair, lead in zip(ways, alone, beside, first, strict=True):
                exposed = pair.rows_exposed - (lead.rows_exposed if lead else 0.0)
                way.extend(
                    [Stage(kernel=one.kernel, merge=one.merge, fetch=one.rows, exposed=exposed)] * times
                )
            before = stage
    return ways


class _Step:
    """Walks over a step as the rank would."""

    def __init__(self, pricer: Pricer, point: Point) -> None:
        self.pricer, self.point, self.job = pricer, point, pricer.job
        self.price = pricer.price(point)
        self.pieces = {piece.name: piece for piece in self.price.pieces}
        self.trace = Trace({piece.name: piece.cause for piece in self.price.pieces})
        self.runs, self.micro_batches = pricer.runs(point), point.micro_batches(self.job)
        self.layer, self.attention = (
            pricer.compute.layer(point.tp, point.tokens(self.job)),
            pricer.attention(point),
        )
        self.ahead, self.back = ring_stages(pricer, point)
        self.again = point.checkpointing == "full"
        m = self.job.model
        self.heads_in = (m.heads + 2 * m.kv_heads) / (2 * m.heads + 2 * m.kv_heads)  # q, k, v of q, k, v, out
        self.mlp = self.layer.mlp_forward / self.layer.matmul_forward

    def draw(self) -> dict[str, Any]:
        """The whole step."""
        trace = self.trace
        self._pipeline_end("fill")
        start, before, count = trace.clock, dict(trace.drawn), trace.count
        self._micro_batch(0)
        seconds, one = trace.clock - start, trace.since(before)
        shown = min(self.micro_batches, max(1, MOST_EVENTS // (trace.count - count)))
        for number in range(1, shown):
            self._micro_batch(number)
        rest = self.micro_batches - shown
        if rest:
            trace.fold(f"{rest} more micro-batches, alike", rest, one, seconds)
        self._pipeline_end("drain")
        self._after()
        for piece in self.price.pieces:
            whole, exposed = trace.drawn[piece.name]
            near = (
                isclose(whole, piece.seconds, rel_tol=1e-6)
                and abs(exposed - piece.exposed) <= 1e-6 * piece.seconds
            )
            assert near, (
                f"{piece.name}: drew {whole} s, {exposed} exposed, of {piece.seconds} and {piece.exposed}"
            )
        return trace.as_json()

    def _micro_batch(self, number: int) -> None:
        layers = range(self.runs // self.micro_batches)
        self._boundary("forward", micro_batch=number)
        for layer in layers:
            self._forward({"micro_batch": number, "layer": layer, "direction": "forward"})
        self._share("output head and loss", 1 / self.micro_batches, micro_batch=number)
        for layer in reversed(layers):
            self._backward({"micro_batch": number, "layer": layer, "direction": "backward"})
        self._boundary("backward", micro_batch=number)

    def _forward(self, at: dict[str, Any]) -> None:
        layer, attention = self.layer, self.attention.forward
        self._gather(at)
        self.trace.work("norms, rotary, activation", layer.elementwise, **at)
        self.trace.work("matrix products", layer.matmul_forward * (1 - self.mlp), **at, part="attention")
        self._tensor(TP_FORWARD / 2, at)
        self._exchange_heads(attention.heads * self.heads_in, at)
        self._ring(self.ahead, at)
        self._exchange_heads(attention.heads * (1 - self.heads_in), at)
        self.trace.work("matrix products", layer.matmul_forward * self.mlp, **at, part="MLP")
        self._tensor(TP_FORWARD / 2, at)
        self._share("activations to and from the host", 1 / (2 * self.runs), start=self.trace.clock, **at)

    def _backward(self, at: dict[str, Any]) -> None:
        layer, attention = self.layer, self.attention.backward
        self._gather(at)
        self._share("activations to and from the host", 1 / (2 * self.runs), **at)
        self._recompute(at)
        self.trace.work("matrix products", layer.matmul_backward * self.mlp, **at, part="MLP")
        self._tensor(TP_BACKWARD / 2, at)
        self._exchange_heads(attention.heads * (1 - self.heads_in), at)
        self._ring(self.back, at)
        self._exchange_heads(attention.heads * self.heads_in, at)
        self.trace.work("matrix products", layer.matmul_backward * (1 - self.mlp), **at, part="attention")
        self.trace.work("norms, rotary, activation", 2 * layer.elementwise, **at)
        self._tensor(TP_BACKWARD / 2, at)
        if self.point.zero >= 2:
            self._share("gradient reduction", 1 / self.runs, **at)

    def _recompute(self, at: dict[str, Any]) -> None:
        """The forward once more, in one event; under full checkpointing its exchanges too."""
        at = {**at, "direction": "recomputation"}
        if self.again:
            self._exchange_heads(self.attention.forward.heads, at)
        start = self.trace.clock
        self._share("recomputation", 1 / self.runs, **at)
        if self.again:
            self.trace.exchange(
                "ring exchange", self.attention.forward.rows, self.attention.forward.rows_exposed, start, **at
            )
            self._tensor(TP_FORWARD, at)

    def _ring(self, stages: Sequence[Stage], at: dict[str, Any]) -> None:
        """Stage after stage; beside each the fetch of the next one's rows."""
        for number, (stage, after) in enumerate(zip(stages, (*stages[1:], None), strict=True)):
            start = self.trace.clock
            self.trace.work("attention kernel", stage.kernel, **at, stage=number)
            self.trace.work("attention merge and launches", stage.merge, **at, stage=number)
            if after is not None:
                self.trace.exchange(
                    "ring exchange", after.fetch, after.exposed, start, **at, stage=number + 1
                )

    def _exchange_heads(self, seconds: float, at: dict[str, Any]) -> None:
        self.trace.exchange("ulysses exchange", seconds, seconds, **at)

    def _tensor(self, calls: float, at: dict[str, Any]) -> None:
        """So many of a layer's collectives of tensor parallelism."""
        of_a_layer = (2 if self.again else 1) * TP_FORWARD + TP_BACKWARD
        self._share("tensor parallel exchange", calls / of_a_layer / self.runs, **at)

    def _gather(self, at: dict[str, Any]) -> None:
        """ZeRO-3's weights of a layer."""
        if self.point.zero == 3:
            self._share("weight gathering", 1 / (2 * self.runs), **at)

    def _boundary(self, direction: str, times: int = 1, **args: Any) -> None:
        """A pipeline stage's activations in one direction, for so many micro-batches."""
        sends = 2 * (self.micro_batches + self.point.pp - 1)
        self._share("pipeline exchange", times / sends, direction=direction, **args)

    def _pipeline_end(self, what: str) -> None:
        """The bubble while the pipeline fills or drains, and its boundaries."""
        self._share("pipeline bubble", 1 / 2, part=what)
        self._boundary("forward" if what == "fill" else "backward", self.point.pp - 1, part=what)

    def _after(self) -> None:
        """Once a step: gradients, optimizer, weights."""
        numerics = self.job.numerics
        down = numerics.gradient / (numerics.gradient + numerics.element)
        host = "gradients and weights to and from the host"
        if self.point.zero < 2:
            self._share("gradient reduction", 1)
        self._share(host, down, part="gradients")
        self._share("optimizer", 1)
        self._share("optimizer on the host", 1)
        self._share(host, 1 - down, part="weights")
        if self.point.zero < 3:
            self._share("weight gathering", 1)

    def _share(self, name: str, share: float, start: float | None = None, **args: Any) -> None:
        """A share of a piece, if the price has that piece: work on the compute row, an exchange on its own."""
        piece = self.pieces.get(name)
        if piece is None:
            return
        if piece.cause in (COMPUTE, PIPELINE):
            self.trace.work(name, share * piece.seconds, **args)
        else:
            self.trace.exchange(name, share * piece.seconds, share * piece.exposed, start, **args)
