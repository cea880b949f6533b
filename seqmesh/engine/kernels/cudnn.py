"""cuDNN's attention for long full and square causal blocks, the flash kernel for all others. For Hopper.

    a block       >= 1,024 rows and columns, full or square causal     cuDNN
                  any other band, and short blocks                     the cuda kernel, in its own calls

cuDNN plans an execution for every new shape, which takes milliseconds, and knows no windows. So it gets the
few long blocks of which causal sequences consist; packed documents stay with the flash kernel, in one launch.

Fact sheet: fp16 and bf16, grouped queries natively, head dims of keys and values apart (both padded to a
multiple of 8), up to 256 on Hopper and 128 elsewhere; no softcap; not deterministic, so it is refused under
`torch.use_deterministic_algorithms(True)`. Its backward takes a log-sum-exp that is given, as the flash
operators do.
Status: on an H200 right, and 1.7 times as fast as flash attention 2, in all that was tried; long blocks on a
ring were not, so `auto` does not take it: ask for kernel="cudnn" (docs/gpu.md). On CPU every mask and layout
runs through this file with a stand-in for the operators (tests/cudnn_ops.py).
Source: aten::_scaled_dot_product_cudnn_attention and its backward, PyTorch 2.11 and later; what it accepts is
in its sdp_utils.cpp.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqmesh.engine.kernels.cuda import CudaFlash
from seqmesh.engine.kernels.kernel import Launch, LogitRule, Problem, one_by_one
from seqmesh.engine.kernels.prepare import is_causal, unpadded
from seqmesh.engine.kernels.tiles import Tile, TileShape, cut
from seqmesh.masks import Band

ALIGNED = 8
"""Head dims are padded to a multiple of this."""
WIDEST_HEAD_DIM = 128
WIDEST_ON_HOPPER = 256
LEAST_ROWS = 1024
"""Shorter blocks are not worth a plan of their own."""


class CudaCudnn:
    """cuDNN attention on CUDA devices, with the flash kernel for what it lacks."""

    name = "cudnn"

    def __init__(self, ops: Any = None, flash: CudaFlash | None = None, least_rows: int = LEAST_ROWS) -> None:
        """Of the default operators and sizes, unless told otherwise.

        Args:
            ops: has the two operators; default: PyTorch's.
            flash: computes the other blocks.
            least_rows: rows and columns of the shortest block that cuDNN gets.
        """
        self._ops = torch.ops.aten if ops is None else ops
        self._flash = CudaFlash() if flash is None else flash
        self._least_rows = least_rows

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot compute a problem, or None."""
        if problem.device_type == "cuda" and torch.are_deterministic_algorithms_enabled():
            return "it is not deterministic, which torch.use_deterministic_algorithms(True) asks for"
        widest = WIDEST_ON_HOPPER if problem.gpu == "sm90" else WIDEST_HEAD_DIM
        if problem.gpu.startswith("sm") and problem.widest_head_dim > widest:
            return f"head dim {problem.widest_head_dim} is more than {widest} on {problem.gpu}"
        # Whatever the mask is, some of its blocks are the flash kernel's.
        return self._flash.refusal(problem)

    def tiles(self, block: Band) -> Sequence[Tile]:
        """Long full and square causal pieces, and the windows of the others."""
        found: list[Tile] = []
        for tile in cut(block):
            found += [tile] if self._is_ours(tile) else self._flash.tiles(tile.band)
        # Nothing for cuDNN: the block as a whole, in fewer pieces.
        return found if any(map(self._is_ours, found)) else self._flash.tiles(block)

    def launches(self, tiles: Sequence[Tile]) -> Sequence[Launch]:
        """A launch for each of cuDNN's tiles, and the flash kernel's."""
        ours = [tile for tile in tiles if self._is_ours(tile)]
        others = [tile for tile in tiles if not self._is_ours(tile)]
        return [*one_by_one(ours), *self._flash.launches(others)]

    def _is_ours(self, tile: Tile) -> bool:
        band = tile.band
        shorter = min(band.q_stop - band.q_start, band.k_stop - band.k_start)
        return tile.shape in (TileShape.FULL, TileShape.CAUSAL) and shorter >= self._least_rows

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, rule: LogitRule) -> tuple[Tensor, Tensor]:
        """See Kernel.forward."""
        if not self._is_ours(tile):
            return self._flash.forward(q, k, v, tile, rule)
        out, lse, *_ = self._ops._scaled_dot_product_cudnn_attention(
            _aligned(q), _aligned(k), _aligned(v), None, True, 0.0, is_causal(tile), scale=rule.scale
        )
        return unpadded(out, v.shape[3]), lse.view(q.shape[:3])  # its last dim, if there is one, is 1

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
        if not self._is_ours(tile):
            return self._flash.backward(grad_out, q, k, v, out, lse, tile, rule)
        no_state = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, of which there is none
        dq, dk, dv = self._ops._scaled_dot_product_cudnn_attention_backward(
            *(_aligned(x) for x in (grad_out, q, k, v, out.to(q.dtype))),
            lse.contiguous().unsqueeze(-1),
            no_state,
            no_state,
            None,  # no bias, and rows are not packed
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            is_causal(tile),
            scale=rule.scale,
        )
        return unpadded(dq, q.shape[3]), unpadded(dk, k.shape[3]), unpadded(dv, v.shape[3])

    def forward_many(
        self, q: Tensor, k: Tensor, v: Tensor, launch: Launch, rule: LogitRule
    ) -> tuple[Tensor, Tensor]:
        """See BatchKernel.forward_many: the flash kernel's."""
        return self._flash.forward_many(q, k, v, launch, rule)

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
        """See BatchKernel.backward_many: the flash kernel's."""
        return self._flash.backward_many(grad_out, q, k, v, out, lse, launch, rule)


def _aligned(x: Tensor) -> Tensor:
    """(b, heads, n, dim), dim padded to a multiple: zeros change neither logits nor outputs."""
    return pad(x, (0, -x.shape[3] % ALIGNED)) if x.shape[3] % ALIGNED else x
