"""Kernels: tiles cover each band once, every kernel equals the maths on every tile, and selection explains
its refusals.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmesh.engine.kernels import Problem, select, tiles
from seqmesh.engine.kernels.cpu import CpuFlash
from seqmesh.engine.kernels.cuda import CudaFlash, window
from seqmesh.engine.kernels.reference import Reference
from seqmesh.engine.kernels.tiles import Shape
from seqmesh.masks import Band, Mask

SIZE = 14
BOUND = st.one_of(st.none(), st.integers(-SIZE, SIZE))
SIDE = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda x: (x[0], min(SIZE, x[0] + x[1])))
BANDS = st.builds(lambda q, k, lo, hi: Band(*q, *k, lo, hi).trim(), SIDE, SIDE, BOUND, BOUND).filter(
    lambda band: band is not None
)


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small limits, so that small bands reach every way of cutting."""
    monkeypatch.setattr(tiles, "MASKED_PAIRS", 9)
    monkeypatch.setattr(tiles, "STRIP_ROWS", 4)
    tiles.cut.cache_clear()
    yield
    tiles.cut.cache_clear()


def local(band: Band) -> np.ndarray:
    return Mask(SIZE, SIZE, (band,)).dense()[band.q_start : band.q_stop, band.k_start : band.k_stop]


@given(BANDS)
@settings(max_examples=400, deadline=None)
def test_tiles_cover_a_band_once_and_have_the_shape_they_claim(band: Band) -> None:
    count = np.zeros((SIZE, SIZE), int)
    for tile in tiles.cut(band):
        count += Mask(SIZE, SIZE, (tile.band,)).dense()
        allowed = local(tile.band)
        assert allowed.any(1).all(), "a row without a key would make flash return a log-sum-exp of 0"
        assert len(tiles.cut(tile.band)) == 1
        if tile.shape is Shape.FULL:
            assert allowed.all()
        elif tile.shape is not Shape.MASKED:
            want = (
                np.tril(np.ones(allowed.shape))
                if tile.shape is Shape.CAUSAL
                else np.triu(np.ones(allowed.shape))
            )
            assert allowed.shape[0] == allowed.shape[1]
            assert (allowed == want).all()
    np.testing.assert_array_equal(count, Mask(SIZE, SIZE, (band,)).dense())


@given(BANDS)
@settings(max_examples=400, deadline=None)
def test_the_flash_window_of_a_trimmed_band_is_the_band(band: Band) -> None:
    """Flash's rule, lower-right aligned, evaluated pair by pair: what the CUDA kernel asks for is what the
    band means.
    """
    left, right = window(band)
    assert (left == -1) == (band.hi is None)
    assert (right == -1) == (band.lo is None)
    allowed = local(band)
    nq, nk = allowed.shape
    flash = np.array(
        [
            [
                (left < 0 or j >= i + nk - nq - left) and (right < 0 or j <= i + nk - nq + right)
                for j in range(nk)
            ]
            for i in range(nq)
        ]
    )
    np.testing.assert_array_equal(flash, allowed)


def dense(q, k, v, band: Band, scale: float, softcap: float | None):
    """The definition, under autograd in fp64."""
    logits = torch.einsum("bgrqd,bgkd->bgrqk", q.unflatten(1, (k.shape[1], -1)), k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~torch.from_numpy(local(band)), -torch.inf)
    return torch.einsum("bgrqk,bgkd->bgrqd", logits.softmax(-1), v).flatten(1, 2), logits.logsumexp(
        -1
    ).flatten(1, 2)


@pytest.mark.parametrize("softcap", [None, 1.3])
@given(BANDS, st.sampled_from([(4, 4), (4, 2), (3, 1)]))
@settings(max_examples=60, deadline=None)
def test_each_kernel_equals_the_maths_on_each_of_its_tiles(
    softcap: float | None, band: Band, heads: tuple[int, int]
) -> None:
    problem = Problem(device_type="cpu", dtype=torch.float64, head_dim=8, softcap=softcap)
    make = torch.Generator().manual_seed(0)
    for kernel in (CpuFlash(), Reference()):
        if kernel.refusal(problem):
            continue
        for tile in kernel.tiles(band):
            shapes = [
                (2, n, h, 8)
                for n, h in zip(
                    (tile.q_stop - tile.q_start, *(tile.k_stop - tile.k_start,) * 2),
                    (heads[0], *heads[1:] * 2),
                    strict=True,
                )
            ]
            q, k, v = (
                torch.randn(*s, generator=make, dtype=torch.float64).transpose(1, 2).requires_grad_()
                for s in shapes
            )
            want, want_lse = dense(q, k, v, tile, 0.3, softcap)
            grad = torch.randn(want.shape, generator=make, dtype=torch.float64)
            grads = torch.autograd.grad(want, (q, k, v), grad)
            args = [x.detach() for x in (q, k, v)]
            out, lse = kernel.forward(*args, tile, 0.3, softcap)
            got = kernel.backward(grad, *args, out, lse, tile, 0.3, softcap)
            for a, b in zip((out, lse, *got), (want, want_lse, *grads), strict=True):
                torch.testing.assert_close(a, b.detach(), rtol=1e-11, atol=1e-11)


def test_auto_takes_flash_and_falls_to_the_reference_only_for_what_flash_refuses() -> None:
    plain = Problem(device_type="cpu", dtype=torch.float32, head_dim=64, softcap=None)
    assert isinstance(select("auto", plain), CpuFlash)
    assert isinstance(
        select("auto", Problem(device_type="cpu", dtype=torch.float32, head_dim=64, softcap=30.0)), Reference
    )
    half = Problem(device_type="cuda", dtype=torch.bfloat16, head_dim=128, softcap=None)
    assert isinstance(select("auto", half), CudaFlash)


def test_a_selection_that_finds_none_lists_every_refusal() -> None:
    with pytest.raises(
        ValueError,
        match=r"cuda: it runs on cuda, not on cpu; cpu: dtype torch.int32 .*; reference: dtype torch.int32",
    ):
        select("auto", Problem(device_type="cpu", dtype=torch.int32, head_dim=64, softcap=None))
    with pytest.raises(ValueError, match=r"refused by cpu: it has no softcap"):
        select("cpu", Problem(device_type="cpu", dtype=torch.float32, head_dim=64, softcap=2.0))
    with pytest.raises(
        ValueError, match="kernel='flash3' is unknown; use 'auto', 'cuda', 'cpu', 'reference'"
    ):
        select("flash3", Problem(device_type="cpu", dtype=torch.float32, head_dim=64, softcap=None))
