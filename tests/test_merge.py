"""Merging partial attention: the plain version against softmax itself, the fused against the plain one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seqmesh.engine.merge import merge_, merge_plain_, proven

ROOT = Path(__file__).parent.parent
TRITON = Path(sys.prefix) / "triton"
CPU = torch.device("cpu")


def attend(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Output (n, 1, 1, e) and log-sum-exp (1, 1, n) of scores (n, k), (0, -inf) without keys."""
    lse = scores.logsumexp(-1)
    weights = torch.where(lse[:, None] == -torch.inf, 0.0, (scores - lse[:, None]).exp())
    return (weights @ values)[:, None, None], lse[None, None]


@pytest.mark.fast
def test_blocks_merged_one_by_one_are_one_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 8 * torch.randn(30, 40, generator=generator, dtype=torch.float64)
    values = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    scores[::4, :10] = -torch.inf  # nothing in the first block
    scores[::6] = -torch.inf  # nothing at all
    out, lse = attend(scores[:, :10], values[:10])
    for keys in (slice(10, 12), slice(12, 40)):
        merge_(out, lse, *attend(scores[:, keys], values[keys]))
    expected, expected_lse = attend(scores, values)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-13, atol=1e-13)


@pytest.mark.fast
def test_half_precision_blocks_merge_in_pieces_like_wide_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqmesh.engine.merge.PIECE_ELEMENTS", 100)
    generator = torch.Generator().manual_seed(0)
    out, came = torch.randn(2, 37, 2, 3, 8, generator=generator)
    lse, came_lse = torch.randn(2, 2, 3, 37, generator=generator)
    half = came.bfloat16()
    found = out.clone(), lse.clone()
    merge_plain_(*found, half, came_lse)
    merge_plain_(out, lse, half.float(), came_lse)
    assert torch.equal(found[0], out)
    assert torch.equal(found[1], lse)


def _forgets_what_came_before(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    out.copy_(block_out)
    torch.logaddexp(lse, block_lse, out=lse)


def _forgets_the_log_sum_exp(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    merge_plain_(out, lse.clone(), block_out, block_lse)


def _is_wrong_in_fp64(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    merge_plain_(out, lse, block_out, block_lse)
    if out.dtype == torch.float64:
        out.mul_(1 + 1e-7)


def _makes_a_nan_of_two_empty_rows(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    weight = (block_lse - lse).sigmoid().permute(2, 0, 1).unsqueeze(-1)
    torch.logaddexp(lse, block_lse, out=lse)
    out.lerp_(block_out.to(out.dtype), weight)


@pytest.mark.fast
@pytest.mark.parametrize(
    "wrong",
    [
        _forgets_what_came_before,
        _forgets_the_log_sum_exp,
        _is_wrong_in_fp64,
        _makes_a_nan_of_two_empty_rows,
    ],
)
def test_a_merge_that_is_wrong_on_this_device_is_not_used(wrong: object) -> None:
    with pytest.warns(UserWarning, match="the fused merge is wrong on cpu"):
        assert proven(wrong, CPU) is merge_plain_  # type: ignore[arg-type]


@pytest.mark.fast
def test_a_merge_that_is_right_is_used() -> None:
    def same(*arguments: Tensor) -> None:
        merge_plain_(*arguments)

    assert proven(same, CPU) is same


INTERPRETED = """
import itertools
import torch
from seqmesh.engine.fused_merge import fused_merge_
from seqmesh.engine.merge import merge_plain_, proven

assert proven(fused_merge_, torch.device("cpu")) is fused_merge_
generator = torch.Generator().manual_seed(0)

def numbers(*shape, dtype):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

shapes = [(37, 2, 3, 24), (16, 1, 1, 1), (1, 1, 5, 64), (0, 1, 1, 8), (50, 1, 2, 100), (33, 3, 1, 128)]
for dtype, (n, b, h, e) in itertools.product((torch.float32, torch.float64), shapes):
    for block_dtype in (torch.float16, torch.bfloat16, dtype):
        # as the engine has them: rows of a larger buffer, rows-first log-sum-exp, blocks heads-first
        whole, whole_lse = numbers(n + 3, b, h, e, dtype=dtype), numbers(b, n + 3, h, dtype=dtype)
        out, lse = whole[2 : n + 2], whole_lse.transpose(1, 2)[:, :, 1 : n + 1]
        block_out = numbers(b, h, n, e, dtype=block_dtype).permute(2, 0, 1, 3)
        block_lse = 20 * numbers(b, h, n, dtype=dtype)
        for x, x_lse, period in ((out, lse, 5), (block_out, block_lse, 3)):
            x[::period] = 0
            x_lse[:, :, ::period] = -torch.inf
        rest = whole[:2], whole[n + 2 :], whole_lse[:, :1], whole_lse[:, n + 1 :]
        before = [x.clone() for x in rest]
        expected, expected_lse = out.clone(), lse.clone()
        fused_merge_(out, lse, block_out, block_lse)
        merge_plain_(expected, expected_lse, block_out, block_lse)
        # a few roundings: both are short chains of elementary operations
        close = dict(rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
        torch.testing.assert_close(out, expected, **close)
        torch.testing.assert_close(lse, expected_lse, **close)
        assert all(torch.equal(x, y) for x, y in zip(before, rest))
"""


@pytest.mark.fast
@pytest.mark.skipif(not TRITON.exists(), reason="Triton is not set up: make .venv/triton")
def test_the_fused_merge_in_tritons_interpreter_is_the_plain_one() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{TRITON}:{ROOT}"}
    found = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr


COMPILED = """
import itertools
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from seqmesh.engine.fused_merge import ROWS, _merge_rows

names = _merge_rows.arg_names
for wide, block, dim, target in itertools.product(("fp32", "fp64"), ("bf16", "fp32"), (8, 128), (80, 90)):
    signature = dict.fromkeys(names, "i64") | {"out": f"*{wide}", "lse": f"*{wide}"}
    signature |= {"block_out": f"*{block}", "block_lse": f"*{wide}", "ROWS": "constexpr", "DIM": "constexpr"}
    constants = {(names.index("ROWS"),): ROWS, (names.index("DIM"),): dim}
    made = compile(ASTSource(_merge_rows, signature, constants), target=GPUTarget("cuda", target, 32))
    lines = made.asm["ptx"].splitlines()
    barrier = next(i for i, line in enumerate(lines) if "bar.sync" in line)
    assert max(i for i, line in enumerate(lines) if "ld.global" in line) < barrier
    assert barrier < min(i for i, line in enumerate(lines) if "st.global" in line)
"""


@pytest.mark.fast
@pytest.mark.skipif(not TRITON.exists(), reason="Triton is not set up: make .venv/triton")
def test_no_warp_overwrites_what_another_has_yet_to_read(tmp_path: Path) -> None:
    # Compiled for GPUs that are not here. On an H200 the merge was wrong without the barrier.
    environment = os.environ | {"PYTHONPATH": f"{TRITON}:{ROOT}", "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
