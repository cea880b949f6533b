r"""The CUDA kernel: the flash attention inside PyTorch (aten), dense and windowed, one block or many a call.

Flash aligns windows to the lower right: row i of nq may see columns i + (nk - nq) - left ... i + (nk - nq) +
right. A trimmed band lo <= i - j <= hi is therefore the window left = hi + nk - nq, right = nq - nk - lo, and
neither is ever negative.

PyTorch rewrites a window before the kernel sees it, which is harmless for as many columns as rows and wrong
for fewer: a limit >= nk on either side becomes open, and an open side opposite a closed one becomes nk. So a
band with more rows than columns is cut by rows, where its edges end (`windows`), into windows that survive:

    4 columns, 8 rows       \ . . .      rows until the lower edge has reached the last column
                            # \ . .
                            # # \ .
                            # # # \
                            # # # #      rows that see every column
                            # # # #
                            \ # # #      rows from where the upper edge begins
                            . \ # #

Blocks with one window, such as packed documents, go in one call: the variable-length form.

Fact sheet: fp16 and bf16 on sm80 and later, head dims up to 256 (padded to the wider of keys' and values',
and to a multiple of 8), grouped queries natively, no softcap. FA3 and FA4 replace the same aten ops when they
are activated (`torch.nn.attention.activate_flash_attention_impl`). Deterministic if
`torch.use_deterministic_algorithms(True)` is set: its backward adds dq with atomics otherwise.
Status: proved on an H200 (docs/gpu.md). On CPU every mask and layout runs through this file with a stand-in
for the ops that obeys their contract, rewriting included (tests/flash_ops.py).
Source: aten::_flash_attention_forward and _flash_attention_backward, PyTorch 2.11 and later; the rewriting is
in its flash_api.cpp.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqmesh.engine.kernels.kernel import Launch, LogitRule, Problem, disjoint
from seqmesh.engine.kernels.prepare import of_one_head_dim, unpadded
from seqmesh.engine.kernels.tiles import Tile, TileShape
from seqmesh.masks import Band

WIDEST_HEAD_DIM = 256
ALIGNED = 8
"""Head dims are padded to a multiple of this."""
NO_WIDE_BACKWARD = ("sm86", "sm89", "sm120", "sm121")
"""Architectures whose shared memory is too small for the backward of head dims above 192."""


class Window(NamedTuple):
    """Flash's window: columns to the left and right of a row's last one; -1 leaves a side open."""

    left: int
    right: int


class Packed(NamedTuple):
    """Where each of several blocks begins and ends among packed rows."""

    q_offsets: Tensor
    """(blocks + 1,) int32 on the device."""
    k_offsets: Tensor
    most_queries: int
    most_keys: int


class CudaFlash:
    """Flash attention on CUDA devices."""

    name = "cuda"

    def __init__(self, ops: Any = None) -> None:
        """`ops` has the two operators; default: PyTorch's."""
        self._ops = torch.ops.aten if ops is None else ops

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot compute a problem, or None."""
        if problem.device_type != "cuda":
            return f"it runs on cuda, not on {problem.device_type}"
        if problem.gpu == "rocm":
            return "it is written for NVIDIA GPUs: on ROCm the same operator knows no windows"
        if problem.gpu and int(problem.gpu.removeprefix("sm")) < 80:
            return f"it needs a GPU of sm80 or later (A100), not {problem.gpu}"
        if problem.dtype not in (torch.float16, torch.bfloat16):
            return f"dtype {problem.dtype} is not float16 or bfloat16"
        widest = problem.widest_head_dim
        if widest > WIDEST_HEAD_DIM:
            return f"head dim {widest} is more than {WIDEST_HEAD_DIM}"
        if widest > 192 and problem.gpu in NO_WIDE_BACKWARD:
            return f"its backward has head dims up to 192 on {problem.gpu}, not {widest}"
        if problem.softcap is not None:
            return "it has no softcap"
        return None

    def tiles(self, block: Band) -> Sequence[Tile]:
        """The windows of the trimmed block."""
        trimmed = block.trim()
        return () if trimmed is None else [Tile(band, TileShape.BAND) for band in windows(trimmed)]

    def launches(self, tiles: Sequence[Tile]) -> Sequence[Launch]:
        """Tiles of one window in one launch, if no query row is in two of them."""
        alike: dict[Window, list[Tile]] = defaultdict(list)
        for tile in tiles:
            alike[window(tile.band)].append(tile)
        return [Launch.of(group) for same in alike.values() for group in disjoint(same)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, rule: LogitRule) -> tuple[Tensor, Tensor]:
        """See Kernel.forward."""
        e = v.shape[3]
        tensors = [
            x.transpose(1, 2) for x in of_one_head_dim([q, k, v], ALIGNED)
        ]  # (b, heads, n, dim) -> (b, n, heads, dim)
        out, lse = self._forward(tensors, None, window(tile.band), rule)
        return unpadded(out.transpose(1, 2), e), lse

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
        d, e = q.shape[3], v.shape[3]
        tensors = [x.transpose(1, 2) for x in of_one_head_dim([grad_out, q, k, v, out.to(q.dtype)], ALIGNED)]
        grads = self._backward(tensors, lse.contiguous(), None, window(tile.band), rule)
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return unpadded(dq, d), unpadded(dk, d), unpadded(dv, e)

    def forward_many(
        self, q: Tensor, k: Tensor, v: Tensor, launch: Launch, rule: LogitRule
    ) -> tuple[Tensor, Tensor]:
        """See BatchKernel.forward_many."""
        b, e = q.shape[0], v.shape[3]
        tensors = [_packed_rows(x) for x in of_one_head_dim([q, k, v], ALIGNED)]
        out, lse = self._forward(tensors, _packed(launch, b, q.device), window(launch.tiles[0].band), rule)
        return unpadded(_batch_of_rows(out, b), e), lse.unflatten(1, (b, -1)).transpose(0, 1)

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
        b, d, e = q.shape[0], q.shape[3], v.shape[3]
        tensors = [_packed_rows(x) for x in of_one_head_dim([grad_out, q, k, v, out.to(q.dtype)], ALIGNED)]
        packed_lse = lse.transpose(0, 1).flatten(1).contiguous()  # (b, h, t) -> (h, b t)
        packed = _packed(launch, b, q.device)
        grads = self._backward(tensors, packed_lse, packed, window(launch.tiles[0].band), rule)
        dq, dk, dv = (_batch_of_rows(x, b) for x in grads)
        return unpadded(dq, d), unpadded(dk, d), unpadded(dv, e)

    def _forward(
        self, tensors: list[Tensor], packed: Packed | None, window: Window, rule: LogitRule
    ) -> tuple[Tensor, Tensor]:
        """The operator, of q, k and v (b, n, heads, dim): out and lse (b, h, n).

        If they are packed (t, heads, dim), so is out, and lse is (h, t).
        """
        assert rule.softcap is None
        q, k, v = tensors
        out, lse, *_ = self._ops._flash_attention_forward(
            q,
            k,
            v,
            *_offsets_and_lengths(q, k, packed),
            0.0,
            False,
            False,
            scale=rule.scale,
            window_size_left=window.left,
            window_size_right=window.right,
        )
        return out, lse

    def _backward(
        self, tensors: list[Tensor], lse: Tensor, packed: Packed | None, window: Window, rule: LogitRule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The operator's transpose, of grad_out, q, k, v and the *global* out, and of the global lse."""
        assert rule.softcap is None
        grad_out, q, k, v, out = tensors
        # Without dropout the random state is not read, but the op wants tensors there.
        no_state = torch.zeros(2, dtype=torch.int64, device=q.device)
        dq, dk, dv = self._ops._flash_attention_backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            *_offsets_and_lengths(q, k, packed),
            0.0,
            False,
            no_state,
            no_state,
            scale=rule.scale,
            window_size_left=window.left,
            window_size_right=window.right,
        )
        return dq, dk, dv


def window(band: Band) -> Window:
    """Flash's window of a trimmed band."""
    shift = (band.k_stop - band.k_start) - (band.q_stop - band.q_start)
    offset = band.q_start - band.k_start  # i - j of the band's first row and column
    left = -1 if band.hi is None else band.hi - offset + shift
    right = -1 if band.lo is None else offset - band.lo - shift
    return Window(left, right)


def survives(band: Band) -> bool:
    """Whether the window of a trimmed band still means the band after PyTorch has rewritten it.

    A limit >= nk is dropped: to the left it excludes nothing, as row i sees columns from i - nq + nk - left <
    0 on; to the right it does. And an open side opposite a closed one becomes nk: to the left that excludes
    nothing, to the right row 0 sees columns up to 2 nk - nq only.
    """
    rows = band.q_stop - band.q_start
    columns = band.k_stop - band.k_start
    if band.lo is not None:
        return window(band).right < columns
    return band.hi is None or rows <= columns + 1


def windows(band: Band) -> Iterator[Band]:
    """A trimmed band in pieces of its rows whose windows survive: itself, or at most three."""
    if survives(band):
        yield band
        return
    q_start, q_stop, k_start, k_stop, lo, hi = band
    # Rows until the lower edge has reached the last column, and from where the upper edge begins.
    lower_ends = q_start if lo is None else min(q_stop, k_stop + lo)
    upper_begins = q_stop if hi is None else max(lower_ends, k_start + hi + 1)
    for start, stop in ((q_start, lower_ends), (lower_ends, upper_begins), (upper_begins, q_stop)):
        piece = band.within(start, stop, k_start, k_stop)
        if piece is not None:
            yield piece


def _packed_rows(x: Tensor) -> Tensor:
    """(b, heads, t, dim) -> (b t, heads, dim), the operator's packed form; a view for b = 1."""
    return x.transpose(1, 2).flatten(0, 1)


def _batch_of_rows(x: Tensor, b: int) -> Tensor:
    """The inverse: (b t, heads, dim) -> (b, heads, t, dim)."""
    sequences: Tensor = x.unflatten(0, (b, -1))
    return sequences.transpose(1, 2)


def _offsets_and_lengths(q: Tensor, k: Tensor, packed: Packed | None) -> tuple[Any, ...]:
    """The operators' arguments that say which rows are whose."""
    return (None, None, q.shape[1], k.shape[1]) if packed is None else packed


@lru_cache(maxsize=256)
def _packed(launch: Launch, b: int, device: torch.device) -> Packed:
    """Offsets of the launch's blocks in b sequences, one after the other."""
    queries = [tile.band.q_stop - tile.band.q_start for tile in launch.tiles]
    keys = [tile.band.k_stop - tile.band.k_start for tile in launch.tiles]

    def offsets(lengths: list[int]) -> Tensor:
        ends = torch.tensor([0, *lengths * b]).cumsum(0)
        return ends.to(device=device, dtype=torch.int32)

    return Packed(offsets(queries), offsets(keys), max(queries), max(keys))
