"""The fp32 kernel for CUDA on a stand-in for PyTorch's operators: every mask, layout and number of heads."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from efficient_ops import EmulatedEfficient
from oracle import Case
from ranks import Ranks
from test_attention import MASKS, check

from seqmesh import masks
from seqmesh.engine.kernels import Problem, select
from seqmesh.engine.kernels.efficient import CudaEfficient

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2), (1, 4)], ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_and_layout_on_the_memory_efficient_operators(
    ranks: Ranks, name: str, mesh: tuple[int, int]
) -> None:
    mask = MASKS[name]
    layouts = ["contiguous", "zigzag", "striped"] + (["balanced"] if mask.q_len == mask.k_len else [])
    case = Case(mask=mask, ulysses=mesh[0], ring=mesh[1], heads=6, kv_heads=2, kernel=EmulatedEfficient())
    check(ranks, [replace(case, layout=layout, batch=1 + n % 2) for n, layout in enumerate(layouts)])


def test_long_windows_and_head_dims_of_any_number(ranks: Ranks) -> None:
    """Long enough for causal squares, reversed ones and strips with a dense mask."""
    case = Case(mask=masks.sliding_window(521, 150), ring=2, layout="zigzag", kernel=EmulatedEfficient())
    wide = replace(case, mask=masks.sliding_window(2500, 1100), heads=1, kv_heads=1)
    odd = replace(case, head_dim=5, value_head_dim=13, heads=2, kv_heads=1)
    check(ranks, [case, wide, odd])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": "rocm"}, "ROCm"),
        ({"dtype": torch.float64}, "dtype torch.float64"),
        ({"softcap": 30.0}, "no softcap"),
        ({"device_type": "cpu"}, "not on cpu"),
    ],
    ids=str,
)
def test_what_it_cannot_do_it_refuses_with_the_reason(changes: dict, reason: str) -> None:
    able = Problem(device_type="cuda", dtype=torch.float32, head_dim=20, softcap=None, gpu="sm75")
    assert CudaEfficient().refusal(able) is None
    refusal = CudaEfficient().refusal(replace(able, **changes))
    assert refusal is not None
    assert reason in refusal


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"dtype": torch.float32}, "efficient"),
        ({"dtype": torch.bfloat16}, "cuda"),
        ({"dtype": torch.bfloat16, "head_dim": 320}, "efficient"),
        ({"dtype": torch.float32, "softcap": 2.0}, "reference"),
        ({"dtype": torch.float64}, "reference"),
    ],
)
def test_on_a_gpu_auto_takes_it_for_what_flash_attention_refuses(asked: dict[str, Any], name: str) -> None:
    given = {"device_type": "cuda", "head_dim": 64, "softcap": None, "gpu": "sm90"}
    assert select("auto", Problem(**given | asked)).name == name
