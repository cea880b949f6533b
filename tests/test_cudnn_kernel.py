"""cuDNN's kernel on a stand-in for PyTorch's operators: every mask, layout and number of heads."""

from dataclasses import replace

import pytest
import torch
from cudnn_ops import EmulatedCudnn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case
from ranks import Ranks
from test_attention import MASKS, check
from test_kernels import BANDS, SIZE

from seqmesh import masks
from seqmesh.engine.kernels import Problem, available, launches_of, select
from seqmesh.engine.kernels.cudnn import CudaCudnn
from seqmesh.engine.kernels.tiles import TileShape
from seqmesh.masks import Band, Mask

pytestmark = pytest.mark.fast

ABLE = Problem(device_type="cuda", dtype=torch.bfloat16, head_dim=20, softcap=None, gpu="sm90")


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2), (1, 4)], ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_and_layout_on_the_cudnn_operators(ranks: Ranks, name: str, mesh: tuple[int, int]) -> None:
    mask = MASKS[name]
    layouts = ["contiguous", "zigzag", "striped"] + (["balanced"] if mask.q_len == mask.k_len else [])
    case = Case(mask=mask, ulysses=mesh[0], ring=mesh[1], heads=6, kv_heads=2, kernel=EmulatedCudnn())
    check(ranks, [replace(case, layout=layout, batch=1 + n % 2) for n, layout in enumerate(layouts)])


def test_head_dims_of_any_number_and_values_of_another(ranks: Ranks) -> None:
    case = Case(mask=masks.causal(96), ring=2, layout="zigzag", kernel=EmulatedCudnn(), heads=2, kv_heads=1)
    check(ranks, [replace(case, head_dim=5, value_head_dim=13), replace(case, head_dim=16, value_head_dim=8)])


@given(st.lists(BANDS, max_size=4), st.sampled_from([1, 4, 9]))
@settings(max_examples=200, deadline=None)
def test_tiles_are_the_block_and_cudnn_gets_no_short_one_and_no_window(bands: list[Band], least: int) -> None:
    kernel = CudaCudnn(least_rows=least)
    for band in bands:
        count = torch.zeros(SIZE, SIZE, dtype=torch.int64)
        for tile in kernel.tiles(band):
            q_start, q_stop, k_start, k_stop, lo, hi = tile.band
            assert tile.shape in (TileShape.FULL, TileShape.CAUSAL, TileShape.BAND)
            if tile.shape is not TileShape.BAND:
                assert min(q_stop - q_start, k_stop - k_start) >= least
                assert hi is None
            if tile.shape is TileShape.FULL:
                assert lo is None
            if tile.shape is TileShape.CAUSAL:
                assert q_stop - q_start == k_stop - k_start
                assert lo == q_start - k_start
            count += torch.from_numpy(Mask(SIZE, SIZE, (tile.band,)).dense()).long()
        assert torch.equal(count, torch.from_numpy(Mask(SIZE, SIZE, (band,)).dense()).long())
    tiles = sorted((tile for band in bands for tile in kernel.tiles(band)), key=str)
    assert sorted((t for launch in launches_of(kernel, bands) for t in launch.tiles), key=str) == tiles


def test_causal_blocks_are_cudnns_and_packed_documents_are_one_launch_of_flash() -> None:
    kernel = CudaCudnn()
    assert [t.shape for t in kernel.tiles(Band(0, 4096, 0, 4096, lo=0))] == [TileShape.CAUSAL]
    assert [t.shape for t in kernel.tiles(Band(0, 4096, 0, 1024))] == [TileShape.FULL]
    documents = masks.documents([1000] * 8).bands
    (launch,) = launches_of(kernel, documents)
    assert len(launch.tiles) == 8
    # a window has no long full or causal piece that would be worth cutting it up
    assert [t.shape for t in kernel.tiles(Band(0, 4096, 0, 4096, lo=0, hi=800))] == [TileShape.BAND]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": "rocm"}, "ROCm"),
        ({"dtype": torch.float32}, "dtype torch.float32"),
        ({"softcap": 30.0}, "no softcap"),
        ({"device_type": "cpu", "gpu": ""}, "not on cpu"),
        ({"head_dim": 136, "gpu": "sm80"}, "head dim 136 is more than 128 on sm80"),
        ({"head_dim": 64, "value_head_dim": 264}, "head dim 264 is more than 256 on sm90"),
    ],
    ids=str,
)
def test_what_it_cannot_do_it_refuses_with_the_reason(changes: dict, reason: str) -> None:
    assert CudaCudnn().refusal(ABLE) is None
    assert CudaCudnn().refusal(replace(ABLE, head_dim=256)) is None
    assert CudaCudnn().refusal(replace(ABLE, head_dim=128, gpu="sm80")) is None
    refusal = CudaCudnn().refusal(replace(ABLE, **changes))
    assert refusal is not None
    assert reason in refusal


def test_it_is_refused_where_results_must_repeat() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert "not deterministic" in str(CudaCudnn().refusal(ABLE))
    finally:
        torch.use_deterministic_algorithms(False)


def test_auto_does_not_take_what_no_gpu_has_run_yet() -> None:
    assert select("auto", ABLE).name == "cuda"
    assert select("cudnn", ABLE).name == "cudnn"
    assert "cudnn" in [kernel.name for kernel in available()]
