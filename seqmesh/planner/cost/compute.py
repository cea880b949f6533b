"""Time of what one rank computes besides attention: matrix products, streamed elements, the output head.

A product takes the time of its FLOPs at the assumed rate plus the time of its operands through memory, and as
much more as its outputs are too few to fill the GPU: thin slices of a tensor-parallel rank and few tokens are
slower for each FLOP. In fp8 its operands are cast first.

A mixture's experts are one product with a weight for each expert that a rank has: as many rows as tokens are
routed to those, the busiest rank's. Layers of several kinds are priced as their mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from seqmesh.planner.cost.recurrent import streamed_by
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.shape import FeedForward


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Seconds of one layer and one micro-batch on one rank."""

    matmul_forward: float
    mlp_forward: float
    """The part of `matmul_forward` in the MLP."""
    matmul_backward: float
    half_forward: float
    """The part of `matmul_forward` that is every second product: k, output, and one of the MLP's."""
    elementwise: float
    """Of the forward: norms, rotary embedding, activation, residuals."""


@dataclass(frozen=True)
class _Product:
    """An (m, k) x (k, n) matrix product; or one of m rows in all, with a matrix for each group of them."""

    m: float
    k: int
    n: int
    groups: int = 1


class Compute:
    """Times of one job's model on one rank."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._of = lru_cache(maxsize=None)(self._layer)
        self.head = lru_cache(maxsize=None)(self._head)

    def layer(self, point: Point) -> LayerTime:
        """A layer of one micro-batch."""
        job = self._job
        return self._of(point.tp, job.tokens(point), point.experts, job.expert_spread(point))

    def streamed(self, moved: float) -> float:
        """Seconds for so many bytes through the GPU's memory."""
        return moved / self._job.memory_rate

    def _matmul(self, product: _Product, *, head: bool = False) -> float:
        """Seconds of a product: one of the layers, or the output head's, which is never in fp8."""
        m, k, n, groups = product.m, product.k, product.n, product.groups
        weights = groups * k * n
        cast = m * k + (0 if self._job.stack.weights_cast_once else weights)
        return self._seconds(2.0 * m * k * n, m * k + weights, m * n, head=head, cast=cast)

    def _matmul_backward(self, product: _Product, *, head: bool = False) -> float:
        """Seconds of the two products of its backward: the gradients of the input and of the weight."""
        m, k, n = product.m, product.k, product.n
        weights = product.groups * k * n
        flops = 2.0 * m * k * n
        # Input and weight were cast for the forward; the output's gradient is, for both.
        of_input = self._seconds(flops, m * n + weights, m * k, head=head, cast=m * n)
        return of_input + self._seconds(flops, k * m + m * n, weights, head=head, cast=0)

    def _seconds(self, flops: float, operands: float, outputs: float, *, head: bool, cast: float) -> float:
        """Seconds of a product.

        Args:
            flops: that it takes.
            operands: numbers that it reads.
            outputs: numbers that it writes.
            head: whether it is the output head's.
            cast: in fp8, numbers that are cast for it.
        """
        job = self._job
        fp8 = job.numerics.fp8_products and not head
        rate = job.product_rate if fp8 else job.peak * job.assumptions.matmul
        idle = 1 + job.assumptions.matmul_half_outputs / outputs
        element = job.numerics.element
        moved = element * outputs + operands * (1 if fp8 else element)
        if fp8:
            moved += job.assumptions.fp8_cast_bytes * cast
        return flops / rate * idle + self.streamed(moved)

    def _layer(self, tp: int, tokens: int, experts: int, spread: float) -> LayerTime:
        m = self._job.model
        a = self._job.assumptions
        *into, out = m.attention_matrices
        attention = [_Product(tokens, matrix.rows, matrix.columns // tp) for matrix in into]
        attention.append(_Product(tokens, out.rows // tp, out.columns))
        mixer = self._mixer(tokens)
        attends, mixes = m.attending / m.layers, m.mixer.layers / m.layers if m.mixer else 0
        forward = attends * sum(map(self._matmul, attention)) + mixes * sum(map(self._matmul, mixer))
        backward = attends * sum(map(self._matmul_backward, attention))
        backward += mixes * sum(map(self._matmul_backward, mixer))
        mlp = mlp_backward = mlp_half = 0.0
        streamed = a.streamed_hidden * m.hidden * (m.norms / (2 * m.layers))
        streamed += mixes * streamed_by(m.mixer) if m.mixer else 0
        for of in m.feed_forwards:
            share = of.layers / m.layers
            products = self._feed_forward(of, tokens, tp, experts, spread)
            mlp += share * sum(map(self._matmul, products))
            mlp_backward += share * sum(map(self._matmul_backward, products))
            mlp_half += share * sum(map(self._matmul, self._half(products)))
            streamed += share * a.streamed_ffn * (of.width + spread * of.active * of.expert_width)
            streamed += share * a.streamed_routed * spread * of.active * m.hidden
        kv = attention[-2] if m.latent else _Product(tokens, m.hidden, m.kv_heads * m.head_dim // tp)
        half = attends * (self._matmul(kv) + self._matmul(attention[-1]))
        return LayerTime(
            matmul_forward=forward + mlp,
            mlp_forward=mlp,
            matmul_backward=backward + mlp_backward,
            half_forward=half + mixes * sum(map(self._matmul, mixer[1::2])) + mlp_half,
            elementwise=self.streamed(self._job.numerics.element * streamed * tokens / tp),
        )

    def _mixer(self, tokens: int) -> list[_Product]:
        """The products of a layer that carries a state; there is no tp where there are such layers."""
        m = self._job.model
        if m.mixer is None:
            return []
        return [_Product(tokens, matrix.rows, matrix.columns) for matrix in m.mixer.matrices(m.hidden)]

    def _feed_forward(
        self, of: FeedForward, tokens: int, tp: int, experts: int, spread: float
    ) -> list[_Product]:
        """The products of a layer's feed-forward networks, in and out of each."""
        m = self._job.model
        gates = 2 if m.gated else 1
        found = []
        if of.width:
            found += [_Product(tokens, m.hidden, gates * of.width // tp)]
            found += [_Product(tokens, of.width // tp, m.hidden)]
        if of.experts:
            rows, here = spread * tokens * of.active, of.experts // experts
            found += [_Product(rows, m.hidden, gates * of.expert_width, here)]
            found += [_Product(rows, of.expert_width, m.hidden, here)]
            found += [_Product(tokens, m.hidden, of.scores)]
        return found

    def _half(self, products: Sequence[_Product]) -> list[_Product]:
        """Every second product of feed-forward networks: a gate's half of those in, or those out."""
        if self._job.model.gated:
            return [replace(one, n=one.n // 2) for one in products[::2]]
        return list(products[1::2])

    def _head(self, tp: int, tokens: int) -> float:
        """Seconds of the output projection and the loss, forward and backward, also in tiles."""
        m = self._job.model
        columns = m.vocabulary // tp
        projection = _Product(tokens, m.hidden, columns)
        both = self._matmul(projection, head=True) + self._matmul_backward(projection, head=True)
        return both + self.streamed(self._job.assumptions.streamed_logit * tokens * columns)
