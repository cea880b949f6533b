"""Kernels: tiles cover each band once, and every kernel equals the maths on every tile.

Selection explains its refusals.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmesh.engine.kernels import (
    Kernel,
    LogitRule,
    Problem,
    Tile,
    TileShape,
    cpu,
    launches_of,
    select,
    tiles,
)
from seqmesh.engine.kernels.cpu import CpuFlash
from seqmesh.engine.kernels.cuda import CudaFlash, window
from seqmesh.engine.kernels.reference import Reference
from seqmesh.masks import Band, Mask
from seqmesh.schedule.pieces import Runs

pytestmark = pytest.mark.fast


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
    monkeypatch.setattr(tiles, "STRIP_WIDTH", 5)
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
        if tile.shape is TileShape.MASKED:
            assert allowed.size <= tiles.MASKED_PAIRS or allowed.shape[0] <= tiles.STRIP_ROWS
        if tile.shape is TileShape.FULL:
            assert allowed.all()
        elif tile.shape is not TileShape.MASKED:
            square = np.ones(allowed.shape)
            triangle = np.tril(square) if tile.shape is TileShape.CAUSAL else np.triu(square)
            assert allowed.shape[0] == allowed.shape[1]
            assert (allowed == triangle).all()
    np.testing.assert_array_equal(count, Mask(SIZE, SIZE, (band,)).dense())


@given(BANDS)
@settings(max_examples=400, deadline=None)
def test_a_band_with_few_pairs_is_one_call(band: Band) -> None:
    sides = (band.q_stop - band.q_start) * (band.k_stop - band.k_start)
    if sides <= tiles.MASKED_PAIRS:
        assert len(tiles.cut(band)) == 1


@given(BANDS)
@settings(max_examples=400, deadline=None)
def test_the_flash_window_of_a_trimmed_band_is_the_band(band: Band) -> None:
    """Flash's rule, lower-right aligned, pair by pair: what we ask for is what the band means."""
    left, right = window(band)
    assert (left == -1) == (band.hi is None)
    assert (right == -1) == (band.lo is None)
    allowed = local(band)
    nq, nk = allowed.shape
    row = np.arange(nq)[:, None] + nk - nq  # the diagonal ends in the lower right corner
    column = np.arange(nk)
    flash = np.ones((nq, nk), bool)
    if left >= 0:
        flash &= column >= row - left
    if right >= 0:
        flash &= column <= row + right
    np.testing.assert_array_equal(flash, allowed)


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band, rule: LogitRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, under autograd in fp64: out (b, h, nq, d) and lse (b, h, nq)."""
    scores = torch.einsum("bgrqd,bgkd->bgrqk", q.unflatten(1, (k.shape[1], -1)), k) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~torch.from_numpy(local(band)), -torch.inf)
    out = torch.einsum("bgrqk,bgkd->bgrqd", scores.softmax(-1), v)
    return out.flatten(1, 2), scores.logsumexp(-1).flatten(1, 2)


@pytest.mark.parametrize("softcap", [None, 1.3])
@given(BANDS, st.sampled_from([(4, 4), (4, 2), (3, 1)]))
@settings(max_examples=60, deadline=None)
def test_each_kernel_equals_the_maths_on_each_of_its_tiles(
    softcap: float | None, band: Band, heads: tuple[int, int]
) -> None:
    problem = Problem(device_type="cpu", dtype=torch.float64, head_dim=8, softcap=softcap)
    for kernel in (CpuFlash(), Reference()):
        if kernel.refusal(problem):
            continue
        for tile in kernel.tiles(band):
            check_tile(kernel, tile, heads, LogitRule(scale=0.3, softcap=softcap))


def check_tile(kernel: Kernel, tile: Tile, heads: tuple[int, int], rule: LogitRule) -> None:
    """A kernel's out, lse and gradients of one tile against the definition."""
    random = torch.Generator().manual_seed(0)

    def normal(rows: int, count: int) -> torch.Tensor:
        """(b, heads, rows, d), heads interleaved in memory as the engine's are."""
        return torch.randn(2, rows, count, 8, generator=random, dtype=torch.float64).transpose(1, 2)

    queries = tile.band.q_stop - tile.band.q_start
    keys = tile.band.k_stop - tile.band.k_start
    q, k, v = normal(queries, heads[0]), normal(keys, heads[1]), normal(keys, heads[1])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want, want_lse = dense(*leaves, tile.band, rule)
    grad = torch.randn(want.shape, generator=random, dtype=torch.float64)
    want_grads = torch.autograd.grad(want, leaves, grad)
    out, lse = kernel.forward(q, k, v, tile, rule)
    grads = kernel.backward(grad, q, k, v, out, lse, tile, rule)
    for got, expected in zip((out, lse, *grads), (want, want_lse, *want_grads), strict=True):
        torch.testing.assert_close(got, expected.detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch", [1, 2])
def test_tiles_of_one_launch_are_computed_as_each_of_them_alone(batch: int) -> None:
    """Documents of equal lengths go into one call; those of another length, and large ones, do not."""
    kernel = CpuFlash()
    bands = [Band(start, start + 3, start, start + 3, lo=0) for start in (0, 3, 8)]
    bands += [Band(11, 13, 0, 4), Band(13, 15, 6, 10), Band(6, 8, 0, 3)]
    rows = 15
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad, out = torch.randn(5, batch, 4, rows, 8, dtype=torch.float64, generator=generator)
    k, v = k[:, :2], v[:, :2]
    lse = torch.randn(batch, 4, rows, dtype=torch.float64, generator=generator)
    launches = launches_of(kernel, bands)
    assert sorted(len(launch.tiles) for launch in launches) == [1, 2, 3]
    for launch in launches:
        if len(launch.tiles) == 1:
            continue
        packed_q = [x[:, :, rows_of(launch.queries)] for x in (q, grad, out, lse)]
        packed_k = [x[:, :, rows_of(launch.keys)] for x in (k, v)]
        found = kernel.forward_many(packed_q[0], *packed_k, launch, LogitRule(scale=0.3, softcap=None))
        gradients = kernel.backward_many(
            packed_q[1], packed_q[0], *packed_k, *packed_q[2:], launch, LogitRule(scale=0.3, softcap=None)
        )
        want = [each_alone(kernel, tile, (q, k, v, grad, out, lse)) for tile in launch.tiles]
        for got, parts in zip((*found, *gradients), zip(*want, strict=True), strict=True):
            torch.testing.assert_close(got, torch.cat(parts, 2), rtol=1e-12, atol=1e-12)


def rows_of(runs: Runs) -> list[int]:
    return [row for start, stop in runs for row in range(start, stop)]


def each_alone(kernel: Kernel, tile: Tile, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """out, lse, dq, dk and dv of one tile."""
    band = tile.band
    q, grad, out, lse = (tensors[n][:, :, band.q_start : band.q_stop] for n in (0, 3, 4, 5))
    k, v = (x[:, :, band.k_start : band.k_stop] for x in tensors[1:3])
    rule = LogitRule(scale=0.3, softcap=None)
    return *kernel.forward(q, k, v, tile, rule), *kernel.backward(grad, q, k, v, out, lse, tile, rule)


def test_only_small_tiles_of_one_kind_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BATCHED_PAIRS", 9)
    small = [Band(start, start + 3, start, start + 3) for start in (0, 3, 6)]
    large = [Band(start, start + 2, start, start + 5) for start in (0, 5)]
    overlapping = [Band(0, 3, 0, 3), Band(0, 3, 3, 6)]
    for bands, sizes in ((small, [3]), (large, [1, 1]), (overlapping, [1, 1])):
        assert sorted(len(launch.tiles) for launch in launches_of(CpuFlash(), bands)) == sizes


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
        match=r"cuda: it runs on cuda, not on cpu; efficient: it runs on cuda, not on cpu;"
        r" cpu: dtype torch.int32 .*; reference: dtype torch.int32",
    ):
        select("auto", Problem(device_type="cpu", dtype=torch.int32, head_dim=64, softcap=None))
    with pytest.raises(ValueError, match=r"refused by cpu: it has no softcap"):
        select("cpu", Problem(device_type="cpu", dtype=torch.float32, head_dim=64, softcap=2.0))
    with pytest.raises(
        ValueError, match="kernel='flash3' is unknown; use 'auto', 'cuda', 'efficient', 'cpu', 'reference'"
    ):
        select("flash3", Problem(device_type="cpu", dtype=torch.float32, head_dim=64, softcap=None))
