"""The predicted timeline of one step on the busiest rank, for chrome://tracing or Perfetto.

`seqmesh plan --trace` writes it.

    each micro-batch    layer 0 forward ... layer L-1, head and loss, layer L-1 backward ... layer 0
    a layer             norms, q k v o products | heads out | ring stages, the next fetch beside each, and
                        what they hide of the heads | heads home | tokens to experts | MLP | back
    after them          gradient reduction, optimizer, weight gathering

Nothing is priced here: terms come from `CostModel.estimate`, a layer's parts from `CostModel.attention` and
`CostModel.compute`, and ring stages from stage_times.py. Durations of events with a term's name add up to its
whole seconds, their `exposed_seconds` to what it adds to the estimate, and the trace ends at the estimate
(`StepEstimate.seconds`).

What is a drawing and not a schedule: micro-batches stand one after the other where a pipeline interleaves
them; its bubble is drawn half before and half after; a share hidden by assumption is drawn beside the work
just before it.
"""

from collections.abc import Sequence
from math import isclose
from typing import Any

from seqmesh.planner.cost.attention import Pass
from seqmesh.planner.cost.estimate import COMPUTE, PIPELINE
from seqmesh.planner.cost.experts import repeats_experts
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.cost.tensor_parallel import tensor_calls
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.output.stage_times import StageTime, stage_times
from seqmesh.planner.output.trace_rows import Trace

MOST_EVENTS = 20_000
"""Micro-batches are drawn one by one up to about so many events, at least one; the rest is one event."""


def timeline(costs: CostModel, point: Point) -> dict[str, Any]:
    """One step of a point as a Chrome trace: {"traceEvents": [...], "displayTimeUnit": "ms"}.

    Raises:
        ValueError: a model with layers that carry a state.
    """
    if costs.job.model.mixer is not None:
        raise ValueError(
            f"{costs.job.model.name} has layers that carry a state, which a trace does not draw yet; leave"
            " --trace out, or use --plot"
        )
    return _Step(costs, point).draw()


class _Step:
    """Walks over a step as the rank would."""

    def __init__(self, costs: CostModel, point: Point) -> None:
        self.point = point
        self.job = costs.job
        self.estimate = costs.estimate(point)
        self.terms = {term.name: term for term in self.estimate.terms}
        self.trace = Trace({term.name: term.cause for term in self.estimate.terms})
        self.layer_runs = costs.layer_runs(point)
        self.micro_batches = self.job.micro_batches(point)
        self.layer = costs.compute.layer(point)
        self.attention = costs.attention(point)
        self.stages = stage_times(costs, point)
        self.repeats_attention = costs.repeats_attention(point)
        self.repeats_experts = repeats_experts(self.job, point)
        self.tensor_calls = tensor_calls(self.job, point)
        self.qkv_share = costs.attention_shape(point).qkv_share  # q, k and v go one way, and out the other
        self.mlp_share = self.layer.mlp_forward / self.layer.matmul_forward

    def draw(self) -> dict[str, Any]:
        """The whole step."""
        self._pipeline_end("fill")
        self._all_micro_batches()
        self._pipeline_end("drain")
        self._after()
        self._check()
        return self.trace.as_json()

    def _all_micro_batches(self) -> None:
        """One by one while that is not too many events; the rest are alike, and one event stands for them."""
        trace = self.trace
        start = trace.clock
        events_before = trace.count
        drawn_before = dict(trace.drawn)
        self._micro_batch(0)
        seconds = trace.clock - start
        one = trace.since(drawn_before)
        affordable = max(1, MOST_EVENTS // (trace.count - events_before))
        shown = min(self.micro_batches, affordable)
        for number in range(1, shown):
            self._micro_batch(number)
        rest = self.micro_batches - shown
        if rest:
            trace.fold(f"{rest} more micro-batches, alike", rest, one, seconds)

    def _check(self) -> None:
        """What was drawn is what was priced, term by term."""
        for term in self.estimate.terms:
            drawn = self.trace.drawn[term.name]
            same_seconds = isclose(drawn.seconds, term.seconds, rel_tol=1e-6)
            same_exposed = abs(drawn.exposed - term.exposed) <= 1e-6 * term.seconds
            faithful = same_seconds and same_exposed
            assert faithful, f"{term.name}: drew {drawn} of {term.seconds} s, {term.exposed} s exposed"

    def _micro_batch(self, number: int) -> None:
        layers = range(self.layer_runs // self.micro_batches)
        self._boundary("forward", micro_batch=number)
        for layer in layers:
            self._forward({"micro_batch": number, "layer": layer, "direction": "forward"})
        self._share("output head and loss", 1 / self.micro_batches, micro_batch=number)
        for layer in reversed(layers):
            self._backward({"micro_batch": number, "layer": layer, "direction": "backward"})
        self._boundary("backward", micro_batch=number)

    def _forward(self, at: dict[str, Any]) -> None:
        layer = self.layer
        attention = self.attention.forward
        in_attention = layer.matmul_forward * (1 - self.mlp_share)
        self._gather(at)
        self.trace.work("norms, rotary, activation", layer.elementwise, **at)
        self.trace.work("matrix products", in_attention, **at, part="attention")
        self._tensor(self.tensor_calls.forward / 2, at)
        self._attend(attention, self.stages.forward, self.qkv_share, at)
        self._experts(1, at)
        self.trace.work("matrix products", layer.matmul_forward * self.mlp_share, **at, part="MLP")
        self._experts(1, at)
        self._tensor(self.tensor_calls.forward / 2, at)
        # The copy begins here, and what follows hides it.
        self._host_copy(at, start=self.trace.clock)

    def _backward(self, at: dict[str, Any]) -> None:
        layer = self.layer
        attention = self.attention.backward
        in_attention = layer.matmul_backward * (1 - self.mlp_share)
        self._gather(at)
        self._host_copy(at)
        self._recompute(at)
        self._experts(1, at)
        self.trace.work("matrix products", layer.matmul_backward * self.mlp_share, **at, part="MLP")
        self._experts(1, at)
        self._tensor(self.tensor_calls.backward / 2, at)
        self._attend(attention, self.stages.backward, 1 - self.qkv_share, at)
        self.trace.work("matrix products", in_attention, **at, part="attention")
        self.trace.work("norms, rotary, activation", 2 * layer.elementwise, **at)
        self._tensor(self.tensor_calls.backward / 2, at)
        if self.point.zero >= 2:  # every layer's gradients are scattered as soon as they are there
            self._share("gradient reduction", 1 / self.layer_runs, **at)

    def _recompute(self, at: dict[str, Any]) -> None:
        """The forward once more, in one event; its exchanges too, as far as they are repeated."""
        at = {**at, "direction": "recomputation"}
        forward = self.attention.forward
        if self.repeats_attention:
            self._exposed_heads(forward.heads_exposed_s, at)
        start = self.trace.clock
        self._share("recomputation", 1 / self.layer_runs, **at)
        if self.repeats_attention:
            # Its stages are not drawn one by one: what is hidden runs beside the whole event.
            self._hidden_heads(forward, start, at)
            self.trace.exchange("ring exchange", forward.rows_s, forward.rows_exposed_s, start, **at)
        self._experts(2 * self.repeats_experts, at)
        self._tensor(self.tensor_calls.again, at)

    def _attend(
        self, attention: Pass, stages: Sequence[StageTime], there_share: float, at: dict[str, Any]
    ) -> None:
        """Heads to their owners, ring stages, heads home; what the stages hide of the heads beside them."""
        self._exposed_heads(attention.heads_exposed_s * there_share, at)
        start = self.trace.clock
        self._ring(stages, at)
        self._hidden_heads(attention, start, at)
        self._exposed_heads(attention.heads_exposed_s * (1 - there_share), at)

    def _ring(self, stages: Sequence[StageTime], at: dict[str, Any]) -> None:
        """Stage after stage; beside each the fetch of the next one's rows."""
        for number, stage in enumerate(stages):
            start = self.trace.clock
            self.trace.work("attention kernel", stage.kernel, **at, stage=number)
            self.trace.work("attention merge and launches", stage.merge, **at, stage=number)
            if number + 1 < len(stages):
                after = stages[number + 1]
                self.trace.exchange(
                    "ring exchange", after.fetch, after.exposed, start, **at, stage=number + 1
                )

    def _exposed_heads(self, seconds: float, at: dict[str, Any]) -> None:
        self.trace.exchange("ulysses exchange", seconds, seconds, **at)

    def _hidden_heads(self, attention: Pass, start: float, at: dict[str, Any]) -> None:
        hidden = attention.heads_s - attention.heads_exposed_s
        self.trace.exchange("ulysses exchange", hidden, 0.0, start, **at)

    def _tensor(self, calls: float, at: dict[str, Any]) -> None:
        """So many of a layer's collectives of tensor parallelism."""
        if calls:
            of_a_layer = sum(self.tensor_calls)
            self._share("tensor parallel exchange", calls / of_a_layer / self.layer_runs, **at)

    def _experts(self, ways: float, at: dict[str, Any]) -> None:
        """Tokens to the ranks of their experts, or back: so many of the ways of a layer."""
        if ways:
            of_a_layer = 4 + 2 * self.repeats_experts
            self._share("experts exchange", ways / of_a_layer / self.layer_runs, **at)

    def _host_copy(self, at: dict[str, Any], start: float | None = None) -> None:
        """A layer's checkpoint, to the host in the forward and back in the backward."""
        self._share("activations to and from the host", 1 / (2 * self.layer_runs), start=start, **at)

    def _gather(self, at: dict[str, Any]) -> None:
        """ZeRO-3's weights of a layer."""
        if self.point.zero == 3:
            self._share("weight gathering", 1 / (2 * self.layer_runs), **at)

    def _boundary(self, direction: str, times: int = 1, **args: Any) -> None:
        """A pipeline stage's activations in one direction, for so many micro-batches."""
        sends = 2 * (self.micro_batches + self.point.pp - 1)
        self._share("pipeline exchange", times / sends, direction=direction, **args)

    def _pipeline_end(self, what: str) -> None:
        """The bubble while the pipeline fills or drains, and its boundaries."""
        self._share("pipeline bubble", 1 / 2, part=what)
        self._boundary("forward" if what == "fill" else "backward", self.point.pp - 1, part=what)

    def _after(self) -> None:
        """Once a step: gradients, optimizer, weights, and what all ranks wait for."""
        self._share("waiting for the slowest GPU", 1)
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
        """A share of a term, if the estimate has that term.

        Work goes on the compute row, an exchange on its own.
        """
        term = self.terms.get(name)
        if term is None:
            return
        if term.cause in (COMPUTE, PIPELINE):
            self.trace.work(name, share * term.seconds, **args)
        else:
            self.trace.exchange(name, share * term.seconds, share * term.exposed, start, **args)
