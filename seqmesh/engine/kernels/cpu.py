"""The CPU kernel: PyTorch's flash attention for CPU.

It returns the log-sum-exp and has a block-wise backward.

It computes full blocks and square causal blocks (its `is_causal` is aligned to the top left). Other bands are
cut by tiles.py; an upper triangle is a causal one with the order of queries and keys reversed; slivers go
with a small dense mask. Small tiles of one shape, such as the strips of a narrow window, go in one call as a
batch.

Fact sheet: fp64, fp32, bf16, fp16; grouped queries natively; no softcap. It knows one head dim: where values
have another, the narrower side is padded with zeros, which change neither logits nor outputs. An empty block
would kill the process, and a fully masked row would return lse 0: tiles have neither.
Source: aten::_scaled_dot_product_flash_attention_for_cpu and its backward, PyTorch 2.11 and later.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from seqmesh.engine.kernels.kernel import Launch, LogitRule, Problem, disjoint
from seqmesh.engine.kernels.prepare import (
    Kind,
    dense_mask,
    is_causal,
    kind_of,
    of_one_head_dim,
    oriented,
    unpadded,
)
from seqmesh.engine.kernels.tiles import Tile, cut
from seqmesh.masks import Band

BATCHED_PAIRS = 256 * 256
"""Tiles of up to this many pairs are batched: of larger ones each call has work enough."""


class CpuFlash:
    """Flash attention on CPU."""

    name = "cpu"

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot compute a problem, or None."""
        if problem.device_type != "cpu":
            return f"it runs on cpu, not on {problem.device_type}"
        if problem.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"dtype {problem.dtype} is not float64, float32, bfloat16 or float16"
        if problem.softcap is not None:
            return "it has no softcap"
        return None

    def tiles(self, block: Band) -> Sequence[Tile]:
        """Full, square causal, reversed causal and small masked pieces."""
        return cut(block)

    def launches(self, tiles: Sequence[Tile]) -> Sequence[Launch]:
        """Small tiles of one kind in a batch, each large one alone."""
        kinds: dict[Kind, list[Tile]] = defaultdict(list)
        launches = []
        for tile in tiles:
            kind = kind_of(tile)
            if kind.queries * kind.keys > BATCHED_PAIRS:
                launches.append(Launch.of([tile]))
            else:
                kinds[kind].append(tile)
        return launches + [Launch.of(group) for alike in kinds.values() for group in disjoint(alike)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, rule: LogitRule) -> tuple[Tensor, Tensor]:
        """See Kernel.forward."""
        assert rule.softcap is None
        value_head_dim = v.shape[3]
        q, k, v = (oriented(x, tile) for x in of_one_head_dim([q, k, v]))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal(tile), attn_mask=dense_mask(tile, q), scale=rule.scale
        )
        return oriented(unpadded(out, value_head_dim), tile), oriented(lse, tile)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: Tile,
        rule: LogitRule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel.backward."""
        assert rule.softcap is None
        head_dim, value_head_dim = q.shape[3], v.shape[3]
        tensors = of_one_head_dim([grad_out, q, k, v, out.to(q.dtype)])
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(oriented(x, tile) for x in tensors),
            oriented(lse, tile),
            0.0,
            is_causal(tile),
            attn_mask=dense_mask(tile, q),
            scale=rule.scale,
        )
        dq, dk, dv = unpadded(dq, head_dim), unpadded(dk, head_dim), unpadded(dv, value_head_dim)
        return oriented(dq, tile), oriented(dk, tile), oriented(dv, tile)

    def forward_many(
        self, q: Tensor, k: Tensor, v: Tensor, launch: Launch, rule: LogitRule
    ) -> tuple[Tensor, Tensor]:
        """See BatchKernel.forward_many."""
        count = len(launch.tiles)
        q, k, v = (_as_batch(x, count) for x in (q, k, v))
        out, lse = self.forward(q, k, v, launch.tiles[0], rule)
        return _as_rows(out, count), _as_rows(lse.unsqueeze(-1), count).squeeze(-1)

    def backward_many(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        launch: Launch,
        rule: LogitRule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See BatchKernel.backward_many."""
        count = len(launch.tiles)
        grad_out, q, k, v, out = (_as_batch(x, count) for x in (grad_out, q, k, v, out))
        lse = _as_batch(lse.unsqueeze(-1), count).squeeze(-1)
        dq, dk, dv = self.backward(grad_out, q, k, v, out, lse, launch.tiles[0], rule)
        return _as_rows(dq, count), _as_rows(dk, count), _as_rows(dv, count)


def _as_batch(x: Tensor, count: int) -> Tensor:
    """(b, heads, count x n, dim) -> (count x b, heads, n, dim); a view for b = 1."""
    b, heads, rows, dim = x.shape
    tiles: Tensor = x.unflatten(2, (count, rows // count))
    return tiles.permute(2, 0, 1, 3, 4).reshape(count * b, heads, rows // count, dim)


def _as_rows(x: Tensor, count: int) -> Tensor:
    """The inverse: (count x b, heads, n, dim) -> (b, heads, count x n, dim)."""
    _, heads, n, dim = x.shape
    b = x.shape[0] // count
    tiles: Tensor = x.unflatten(0, (count, b))
    return tiles.permute(1, 2, 0, 3, 4).reshape(b, heads, count * n, dim)
