"""Time of what one rank computes besides attention: matrix products, what streams through memory, the output
head.

A product takes the time of its FLOPs at the assumed rate plus the time of its operands through memory: thin
slices of a tensor-parallel rank are slower for each FLOP, in proportion to how thin they are.
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
    elementwise: float
    """Of the forward: norms, rotary embedding, activation, residuals."""


class Compute:
    """Times of one job's model on one rank."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.layer = lru_cache(maxsize=None)(self._layer)
        self.head = lru_cache(maxsize=None)(self._head)

    def streamed(self, moved: float) -> float:
        """Seconds for so many bytes through the GPU's memory."""
        return moved / self._job.memory_rate

    def matmul(self, m: int, k: int, n: int) -> float:
        """Seconds of an (m, k) x (k, n) product."""
        rate = self._job.peak * self._job.assumptions.matmul
        return 2.0 * m * k * n / rate + self.streamed(self._job.numerics.element * (m * k + k * n + m * n))

    def _layer(self, tp: int, tokens: int) -> LayerTime:
        m, a = self._job.model, self._job.assumptions
        streamed = a.streamed_hidden * m.hidden + a.streamed_ffn * m.intermediate
        qkv, gates = (
            (m.heads + 2 * m.kv_heads) * m.head_dim // tp,
            (2 if m.gated else 1) * m.intermediate // tp,
        )
        attention = ((tokens, m.hidden, qkv), (tokens, m.heads * m.head_dim // tp, m.hidden))
        mlp = ((tokens, m.hidden, gates), (tokens, m.intermediate // tp, m.hidden))
        in_attention, in_mlp = (sum(self.matmul(*sizes) for sizes in part) for part in (attention, mlp))
        return LayerTime(
            matmul_forward=in_attention + in_mlp,
            mlp_forward=in_mlp,
            matmul_backward=sum(
                self.matmul(x, z, y) + self.matmul(y, x, z) for x, y, z in (*attention, *mlp)
            ),
            elementwise=self.streamed(self._job.numerics.element * streamed * tokens / tp),
        )

    def _head(self, tp: int, tokens: int, tiled: bool) -> float:
        """Seconds of the output projection and the loss, forward and backward; tiled, the projection is
        computed twice.
        """
        m = self._job.model
        columns = m.vocabulary // tp
        one = self.matmul(tokens, m.hidden, columns)
        both = one + self.matmul(tokens, columns, m.hidden) + self.matmul(m.hidden, tokens, columns)
        return (
            both
            + (one if tiled else 0.0)
            + self.streamed(self._job.assumptions.streamed_logit * tokens * columns)
        )
