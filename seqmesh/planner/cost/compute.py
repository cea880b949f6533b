"""Time of what one rank computes besides attention: matrix products, streamed elements, the output head.

A product takes the time of its FLOPs at the assumed rate plus the time of its operands through memory, and as
much more as its outputs are too few to fill the GPU: thin slices of a tensor-parallel rank and few tokens are
slower for each FLOP. In fp8 its operands are cast first.
"""

from dataclasses import dataclass
from functools import lru_cache

from seqmesh.planner.inputs.job import Job


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
    """An (m, k) x (k, n) matrix product."""

    m: int
    k: int
    n: int


class Compute:
    """Times of one job's model on one rank."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.layer = lru_cache(maxsize=None)(self._layer)
        self.head = lru_cache(maxsize=None)(self._head)

    def streamed(self, moved: float) -> float:
        """Seconds for so many bytes through the GPU's memory."""
        return moved / self._job.memory_rate

    def _matmul(self, product: _Product, *, head: bool = False, cast: int | None = None) -> float:
        """Seconds of a product: one of the layers, or the output head's, which is never in fp8.

        Args:
            product: its sizes.
            head: whether it is the head's.
            cast: in fp8, numbers that are cast for it; all its operands if it is not said.
        """
        job, m, k, n = self._job, product.m, product.k, product.n
        fp8 = job.numerics.fp8_products and not head
        rate = job.product_rate if fp8 else job.peak * job.assumptions.matmul
        idle = 1 + job.assumptions.matmul_half_outputs / (m * n)
        operands = m * k + k * n
        element = job.numerics.element
        moved: float = element * m * n + operands * (1 if fp8 else element)
        if fp8:
            moved += job.assumptions.fp8_cast_bytes * (operands if cast is None else cast)
        return 2.0 * m * k * n / rate * idle + self.streamed(moved)

    def _matmul_backward(self, product: _Product) -> float:
        """Seconds of the two products of its backward: the gradients of the input and of the weight."""
        of_input = _Product(product.m, product.n, product.k)
        of_weight = _Product(product.k, product.m, product.n)
        # Input and weight were cast for the forward; the output's gradient is, for both.
        return self._matmul(of_input, cast=product.m * product.n) + self._matmul(of_weight, cast=0)

    def _layer(self, tp: int, tokens: int) -> LayerTime:
        m = self._job.model
        a = self._job.assumptions
        q_width = m.heads * m.head_dim // tp
        qkv_width = (m.heads + 2 * m.kv_heads) * m.head_dim // tp
        mlp_width = m.intermediate // tp
        gates_width = (2 if m.gated else 1) * m.intermediate // tp
        attention = (_Product(tokens, m.hidden, qkv_width), _Product(tokens, q_width, m.hidden))
        mlp = (_Product(tokens, m.hidden, gates_width), _Product(tokens, mlp_width, m.hidden))
        attention_forward = sum(self._matmul(product) for product in attention)
        mlp_forward = sum(self._matmul(product) for product in mlp)
        kv_width = m.kv_heads * m.head_dim // tp
        in_mlp = _Product(tokens, m.hidden, mlp_width) if m.gated else mlp[1]
        second = (_Product(tokens, m.hidden, kv_width), attention[1], in_mlp)
        streamed = a.streamed_hidden * m.hidden + a.streamed_ffn * m.intermediate
        return LayerTime(
            matmul_forward=attention_forward + mlp_forward,
            mlp_forward=mlp_forward,
            matmul_backward=sum(self._matmul_backward(product) for product in (*attention, *mlp)),
            half_forward=sum(self._matmul(product) for product in second),
            elementwise=self.streamed(self._job.numerics.element * streamed * tokens / tp),
        )

    def _head(self, tp: int, tokens: int, tiled: bool) -> float:
        """Seconds of the output projection and the loss, forward and backward.

        Tiled, the projection is computed twice: no tile's logits are kept for the backward.
        """
        m = self._job.model
        columns = m.vocabulary // tp
        projection = _Product(tokens, m.hidden, columns)
        forward = self._matmul(projection, head=True)
        both = (
            forward
            + self._matmul(_Product(tokens, columns, m.hidden), head=True)
            + self._matmul(_Product(m.hidden, tokens, columns), head=True)
        )
        again = forward if tiled else 0.0
        return both + again + self.streamed(self._job.assumptions.streamed_logit * tokens * columns)
