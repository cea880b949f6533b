"""The CUDA kernel: the flash attention inside PyTorch (aten), dense and windowed. Any band is native to it.

Flash aligns windows to the lower right: row i of nq may see columns i + (nk - nq) - left ... i + (nk - nq) +
right. A trimmed band lo <= i - j <= hi is therefore the window left = hi + nk - nq, right = nq - nk - lo, and
neither is ever negative.

Fact sheet: fp16 and bf16, head dim a multiple of 8 up to 256, grouped queries natively, no softcap. FA3 and
FA4 replace the same aten ops when they are activated (`torch.nn.attention.activate_flash_attention_impl`).
Deterministic if `torch.use_deterministic_algorithms(True)` is set: its backward adds dq with atomics
otherwise.
Status: not run on hardware yet. The window arithmetic is tested on CPU against the dense mask.
Source: aten::_flash_attention_forward and _flash_attention_backward, PyTorch 2.11 and later.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqmesh.engine.kernels.kernel import LogitRule, Problem
from seqmesh.engine.kernels.tiles import Tile, TileShape
from seqmesh.masks import Band


class CudaFlash:
    """Flash attention on CUDA devices. Not run on hardware yet."""

    name = "cuda"

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot compute a problem, or None."""
        if problem.device_type != "cuda":
            return f"it runs on cuda, not on {problem.device_type}"
        if problem.dtype not in (torch.float16, torch.bfloat16):
            return f"dtype {problem.dtype} is not float16 or bfloat16"
        if problem.head_dim > 256 or problem.head_dim % 8:
            return f"head dim {problem.head_dim} is not a multiple of 8 up to 256"
        if problem.softcap is not None:
            return "it has no softcap"
        return None

    def tiles(self, block: Band) -> Sequence[Tile]:
        """Every trimmed band is one window."""
        trimmed = block.trim()
        return () if trimmed is None else (Tile(trimmed, TileShape.BAND),)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, rule: LogitRule) -> tuple[Tensor, Tensor]:
        """See Kernel.forward."""
        assert rule.softcap is None
        left, right = window(tile.band)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *_rows_second(q, k, v),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            False,
            False,
            scale=rule.scale,
            window_size_left=left,
            window_size_right=right,
        )
        return out.transpose(1, 2), lse

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
        left, right = window(tile.band)
        # Without dropout the random state is not read, but the op wants tensors there.
        no_state = torch.zeros(2, dtype=torch.int64, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *_rows_second(grad_out, q, k, v, out.to(q.dtype)),
            lse.contiguous(),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            False,
            no_state,
            no_state,
            scale=rule.scale,
            window_size_left=left,
            window_size_right=right,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def window(band: Band) -> tuple[int, int]:
    """Flash's (left, right) window of a trimmed band; -1 leaves a side open."""
    shift = (band.k_stop - band.k_start) - (band.q_stop - band.q_start)
    offset = band.q_start - band.k_start  # i - j of the band's first row and column
    left = -1 if band.hi is None else band.hi - offset + shift
    right = -1 if band.lo is None else offset - band.lo - shift
    return left, right


def _rows_second(*tensors: Tensor) -> list[Tensor]:
    """(b, h, n, d) -> (b, n, h, d), flash's order: a view."""
    return [x.transpose(1, 2) for x in tensors]
