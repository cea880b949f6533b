"""The CUDA kernel on a stand-in for PyTorch's operators: windows survive their rewriting, on every mask.

What this cannot show, whether the real operators do as the stand-in does, `seqmesh verify` shows on a GPU.
"""

from dataclasses import replace

import pytest
import torch
from flash_ops import EmulatedFlash, allowed, rewritten, rewritten_by_fa3
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, local_inputs
from ranks import Ranks
from test_attention import MASKS, check
from test_kernels import BANDS, SIZE, local

from seqmesh import Schedule, SequenceMesh, attention, masks
from seqmesh.engine.kernels import Problem, launches_of
from seqmesh.engine.kernels.cuda import CudaFlash, survives, window, windows
from seqmesh.masks import Band, Mask

pytestmark = pytest.mark.fast


def as_rewritten(band: Band) -> torch.Tensor:
    """The pairs that the kernel computes when it is asked for a trimmed band."""
    n, m = band.q_stop - band.q_start, band.k_stop - band.k_start
    return allowed(*rewritten(*window(band), m), n, m)


@given(BANDS)
@settings(max_examples=600, deadline=None)
def test_a_window_survives_exactly_if_rewriting_does_not_change_its_pairs(band: Band) -> None:
    same = torch.equal(as_rewritten(band), torch.from_numpy(local(band)))
    # A right limit of nk itself may be dropped and put back: then the band is cut, though it need not be.
    is_put_back = same and band.lo is not None and window(band).right == band.k_stop - band.k_start
    assert survives(band) == same or is_put_back


@given(BANDS)
@settings(max_examples=600, deadline=None)
def test_a_band_is_cut_into_at_most_three_windows_that_survive(band: Band) -> None:
    pieces = list(windows(band))
    assert len(pieces) <= 3
    count = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    for piece in pieces:
        assert piece == piece.trim()
        assert survives(piece)
        count += torch.from_numpy(Mask(SIZE, SIZE, (piece,)).dense()).long()
    assert torch.equal(count, torch.from_numpy(Mask(SIZE, SIZE, (band,)).dense()).long())
    assert len(pieces) == 1 or not survives(band)


@given(BANDS)
@settings(max_examples=600, deadline=None)
def test_flash_attention_3_bends_no_window_that_it_gets(band: Band) -> None:
    for piece in windows(band):
        n, m = piece.q_stop - piece.q_start, piece.k_stop - piece.k_start
        # alone, and among longer blocks that are packed with it
        for longest in ((n, m), (n + 5, m + 9)):
            pairs = allowed(*rewritten_by_fa3(*window(piece), *longest), n, m)
            expected = Mask(SIZE, SIZE, (piece,)).dense()[piece.q_start : piece.q_stop]
            assert torch.equal(pairs, torch.from_numpy(expected[:, piece.k_start : piece.k_stop]))


@given(st.lists(BANDS, max_size=6))
@settings(max_examples=200, deadline=None)
def test_launches_hold_every_tile_once_one_window_each_and_no_row_twice(bands: list[Band]) -> None:
    kernel = CudaFlash()
    launches = launches_of(kernel, bands)
    tiles = [tile for launch in launches for tile in launch.tiles]
    assert sorted(tiles, key=str) == sorted((t for band in bands for t in kernel.tiles(band)), key=str)
    for launch in launches:
        assert len({window(tile.band) for tile in launch.tiles}) == 1
        rows = [row for start, stop in launch.queries for row in range(start, stop)]
        assert len(rows) == len(set(rows))
        assert rows == [r for tile in launch.tiles for r in range(tile.band.q_start, tile.band.q_stop)]
        keys = [key for start, stop in launch.keys for key in range(start, stop)]
        assert keys == [k for tile in launch.tiles for k in range(tile.band.k_start, tile.band.k_stop)]


EVERY_MESH = [(1, 1), (1, 2), (2, 2), (1, 4), (4, 1)]


@pytest.mark.parametrize("mesh", EVERY_MESH, ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_and_layout_on_the_rewriting_operators(
    ranks: Ranks, name: str, mesh: tuple[int, int]
) -> None:
    mask = MASKS[name]
    layouts = ["contiguous", "zigzag", "striped"] + (["balanced"] if mask.q_len == mask.k_len else [])
    case = Case(mask=mask, ulysses=mesh[0], ring=mesh[1], heads=6, kv_heads=2, kernel=EmulatedFlash())
    check(ranks, [replace(case, layout=layout, batch=1 + n % 2) for n, layout in enumerate(layouts)])


@pytest.mark.parametrize(
    ("mask", "ring", "layout"),
    [
        (masks.sliding_window(512, 100), 2, "balanced"),
        (masks.sliding_window(512, 100), 4, "zigzag"),
        (masks.sliding_window(512, 100, 4), 2, "zigzag"),
        (masks.documents([40, 400, 7, 65]) & masks.sliding_window(512, 150), 2, "zigzag"),
    ],
    ids=["window, balanced", "window, zigzag", "window and sink tokens", "documents and window"],
)
def test_windows_with_more_rows_than_columns_keep_their_limits(
    ranks: Ranks, mask: Mask, ring: int, layout: str
) -> None:
    """Whole, they gave NaN rows and leaked future keys: PyTorch drops a right limit >= the number of keys."""
    check(ranks, [Case(mask=mask, ring=ring, layout=layout, heads=2, kv_heads=1, kernel=EmulatedFlash())])


def test_packed_documents_are_one_launch_forward_and_one_backward() -> None:
    mesh = SequenceMesh.build()
    schedule = Schedule.build(masks.documents([3, 7, 2, 20, 9] * 4), mesh)
    kernel = EmulatedFlash()
    case = Case(mask=schedule.mask, kernel=kernel)
    (q, k, v), weights, _ = local_inputs(case, schedule)
    attention(q, k, v, schedule, kernel=kernel).backward(weights)
    assert kernel.standin.calls == 2


def test_head_dims_that_the_operators_do_not_know_are_padded(ranks: Ranks) -> None:
    for head_dim in (1, 7, 9, 20):
        check(ranks, [Case(mask=masks.causal(19), ring=2, head_dim=head_dim, kernel=EmulatedFlash())])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": "sm75"}, "sm80 or later .* not sm75"),
        ({"gpu": "rocm"}, "ROCm"),
        ({"dtype": torch.float32}, "dtype torch.float32"),
        ({"head_dim": 264}, "head dim 264 is more than 256"),
        ({"head_dim": 64, "value_head_dim": 264}, "head dim 264 is more than 256"),
        ({"head_dim": 200, "gpu": "sm89"}, "up to 192 on sm89, not 200"),
        ({"softcap": 30.0}, "no softcap"),
        ({"device_type": "cpu"}, "not on cpu"),
    ],
    ids=str,
)
def test_what_the_cuda_kernel_cannot_do_it_refuses_with_the_reason(changes: dict, reason: str) -> None:
    able = Problem(device_type="cuda", dtype=torch.bfloat16, head_dim=128, softcap=None, gpu="sm90")
    assert CudaFlash().refusal(able) is None
    assert CudaFlash().refusal(replace(able, gpu="")) is None
    refusal = CudaFlash().refusal(replace(able, **changes))
    assert refusal is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refusal)
