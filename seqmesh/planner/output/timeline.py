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

from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any

from seqmesh.planner.cost.attention import Pass
from seqmesh.planner.cost.experts import repeats_experts
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.cost.tensor_parallel import tensor_calls
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.output.stage_times import stage_times
from seqmesh.planner.output.trace_rows import Trace, seconds_by_term

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
        self.terms = {term.name: term for term in costs.estimate(point).terms}
        self.trace = Trace({name: term.cause for name, term in self.terms.items()})
        self.micro_batches = self.job.micro_batches(point)
        self.layers = costs.layer_runs(point) // self.micro_batches
        self.layer = costs.compute.layer(point)
        self.mlp_share = self.layer.mlp_forward / self.layer.matmul_forward
        self.attention = costs.attention(point)
        self.stages = stage_times(costs, point)
        self.repeats_attention = costs.repeats_attention(point)
        self.repeats_experts = repeats_experts(self.job, point)
        self.tensor_calls = tensor_calls(self.job, point)
        self.qkv_share = costs.attention_shape(point).qkv_share  # q, k and v go one way, and out the other
        self.parts = self._parts(costs.layer_runs(point))

    def _parts(self, layer_runs: int) -> dict[str, float]:
        """Into how many parts of a step terms are cut, those that are drawn in more than one."""
        numerics = self.job.numerics
        return {
            "pipeline bubble": 2,  # fill and drain
            "pipeline exchange": 2 * (self.micro_batches + self.point.pp - 1),
            "output head and loss": self.micro_batches,
            "recomputation": layer_runs,
            "tensor parallel exchange": layer_runs * sum(self.tensor_calls),
            "experts exchange": layer_runs * (4 + 2 * self.repeats_experts),
            "activations to and from the host": 2 * layer_runs,
            "gradients and weights to and from the host": numerics.gradient + numerics.element,
            "gradient reduction": layer_runs if self.point.zero >= 2 else 1,
            "weight gathering": 2 * layer_runs if self.point.zero == 3 else 1,
        }

    def _term(self, name: str, at: Mapping[str, Any], parts: float = 1, start: float | None = None) -> None:
        """So many parts of a term, if the estimate has it."""
        term = self.terms.get(name)
        if term is None:
            return
        share = parts / self.parts.get(name, 1)
        self.trace.draw(name, share * term.seconds, at, exposed=share * term.exposed, start=start)

    def draw(self) -> dict[str, Any]:
        """The whole step."""
        at_a_boundary = self.point.pp - 1
        self._term("pipeline bubble", {"part": "fill"})
        self._term("pipeline exchange", {"direction": "forward", "part": "fill"}, at_a_boundary)
        self._all_micro_batches()
        self._term("pipeline bubble", {"part": "drain"})
        self._term("pipeline exchange", {"direction": "backward", "part": "drain"}, at_a_boundary)
        self._after()
        self._check()
        return self.trace.as_json()

    def _all_micro_batches(self) -> None:
        """One by one while that is not too many events; the rest are alike, and one event stands for them."""
        trace = self.trace
        start, before = trace.clock, len(trace.events)
        self._micro_batch(0)
        seconds, one = trace.clock - start, trace.events[before:]
        shown = min(self.micro_batches, max(1, MOST_EVENTS // len(one)))
        for number in range(1, shown):
            self._micro_batch(number)
        rest = self.micro_batches - shown
        if rest:
            trace.fold(f"{rest} more micro-batches, alike", rest, one, seconds)

    def _check(self) -> None:
        """What was drawn is what was priced, term by term."""
        drawn = seconds_by_term(self.trace.events, "seconds")
        exposed = seconds_by_term(self.trace.events, "exposed_seconds")
        for name, term in self.terms.items():
            whole, waited = drawn.get(name, 0.0), exposed.get(name, 0.0)
            same_seconds = isclose(whole, term.seconds, rel_tol=1e-6)
            same_exposed = abs(waited - term.exposed) <= 1e-6 * term.seconds
            faithful = same_seconds and same_exposed
            assert faithful, f"{term}: drew {whole} s, {waited} s exposed"

    def _micro_batch(self, number: int) -> None:
        at = {"micro_batch": number}
        self._term("pipeline exchange", {"direction": "forward", **at})
        for layer in range(self.layers):
            self._forward({**at, "layer": layer, "direction": "forward"})
        self._term("output head and loss", at)
        for layer in reversed(range(self.layers)):
            self._backward({**at, "layer": layer, "direction": "backward"})
        self._term("pipeline exchange", {"direction": "backward", **at})

    def _forward(self, at: Mapping[str, Any]) -> None:
        stages = [stage.forward for stage in self.stages]
        if self.point.zero == 3:
            self._term("weight gathering", at)
        self.trace.draw("norms, rotary, activation", self.layer.elementwise, at)
        self._products(self.layer.matmul_forward, "attention", at)
        self._term("tensor parallel exchange", at, self.tensor_calls.forward / 2)
        self._attend(self.attention.forward, stages, self.qkv_share, at)
        self._term("experts exchange", at)
        self._products(self.layer.matmul_forward, "MLP", at)
        self._term("experts exchange", at)
        self._term("tensor parallel exchange", at, self.tensor_calls.forward / 2)
        # The copy begins here, and what follows hides it.
        self._term("activations to and from the host", at, start=self.trace.clock)

    def _backward(self, at: Mapping[str, Any]) -> None:
        stages = [stage.backward for stage in self.stages]
        if self.point.zero == 3:
            self._term("weight gathering", at)
        self._term("activations to and from the host", at)
        self._recompute({**at, "direction": "recomputation"})
        self._term("experts exchange", at)
        self._products(self.layer.matmul_backward, "MLP", at)
        self._term("experts exchange", at)
        self._term("tensor parallel exchange", at, self.tensor_calls.backward / 2)
        self._attend(self.attention.backward, stages, 1 - self.qkv_share, at)
        self._products(self.layer.matmul_backward, "attention", at)
        self.trace.draw("norms, rotary, activation", 2 * self.layer.elementwise, at)
        self._term("tensor parallel exchange", at, self.tensor_calls.backward / 2)
        if self.point.zero >= 2:  # every layer's gradients are scattered as soon as they are there
            self._term("gradient reduction", at)

    def _products(self, seconds: float, part: str, at: Mapping[str, Any]) -> None:
        """The matrix products of a layer's attention or MLP, of those of the whole layer."""
        share = self.mlp_share if part == "MLP" else 1 - self.mlp_share
        self.trace.draw("matrix products", share * seconds, {**at, "part": part})

    def _recompute(self, at: Mapping[str, Any]) -> None:
        """The forward once more, in one event; its exchanges too, as far as they are repeated."""
        forward = self.attention.forward
        if self.repeats_attention:
            self.trace.draw("ulysses exchange", forward.heads_exposed_s, at)
        start = self.trace.clock
        self._term("recomputation", at)
        if self.repeats_attention:
            # Its stages are not drawn one by one: what is hidden runs beside the whole event.
            self._hidden_heads(forward, at, start)
            self._hop(forward, at, start)
        self._term("experts exchange", at, 2 * self.repeats_experts)
        self._term("tensor parallel exchange", at, self.tensor_calls.again)

    def _attend(
        self, attention: Pass, stages: Sequence[Pass], there_share: float, at: Mapping[str, Any]
    ) -> None:
        """Heads to their owners, ring stages, heads home; what the stages hide of the heads beside them."""
        self.trace.draw("ulysses exchange", attention.heads_exposed_s * there_share, at)
        before_stages = start = self.trace.clock
        for number, stage in enumerate(stages):
            here = {**at, "stage": number}
            # What is not this rank's own has been fetched beside the stage before.
            self._hop(stage, here, start)
            start = self.trace.clock
            self.trace.draw("attention kernel", stage.kernel_s, here)
            self.trace.draw("attention merge and launches", stage.merge_s, here)
        self._hidden_heads(attention, at, before_stages)
        self.trace.draw("ulysses exchange", attention.heads_exposed_s * (1 - there_share), at)

    def _hop(self, stage: Pass, at: Mapping[str, Any], start: float) -> None:
        self.trace.draw("ring exchange", stage.rows_s, at, exposed=stage.rows_exposed_s, start=start)

    def _hidden_heads(self, attention: Pass, at: Mapping[str, Any], start: float) -> None:
        hidden = attention.heads_s - attention.heads_exposed_s
        self.trace.draw("ulysses exchange", hidden, at, exposed=0.0, start=start)

    def _after(self) -> None:
        """Once a step: gradients, optimizer, weights, and what all ranks wait for."""
        host = "gradients and weights to and from the host"
        self._term("waiting for the slowest GPU", {})
        if self.point.zero < 2:
            self._term("gradient reduction", {})
        self._term(host, {"part": "gradients"}, self.job.numerics.gradient)
        self._term("optimizer", {})
        self._term("optimizer on the host", {})
        self._term(host, {"part": "weights"}, self.job.numerics.element)
        if self.point.zero < 3:
            self._term("weight gathering", {})
