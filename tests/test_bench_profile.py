"""The measured profile: what it makes of measurements, and that the planner reads it."""

import os
from pathlib import Path

import pytest
import torch
from train_command import python_program

from seqmesh.bench import curves, profile
from seqmesh.bench.curves import SIZES, Rates, fitted, of_both_passes
from seqmesh.bench.profile import (
    MESSAGES,
    GpuRates,
    RankRates,
    gpu_toml,
    link,
    slowest,
    to_toml,
    write_profile,
)
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.numerics import Numerics
from seqmesh.planner.inputs.request import assumptions_for

FP32 = Numerics(element=4, gradient=4, optimizer=8)
ROWS = (128, 1024, 8192)


def curve(endless: float, half: float, sizes: tuple[int, ...] = ROWS) -> dict[int, float]:
    """Rates of what reaches `endless`, and half of it at `half`."""
    return {size: endless / (1 + half / size) for size in sizes}


def rates_of(unit: float) -> Rates:
    return Rates(
        products=curve(5 * unit, 1e4, (128**2, 512**2)),
        forward=curve(4 * unit, 40.0),
        backward=curve(6 * unit, 40.0),
        small_head=0.75,
        copy=1e10,
    )


def test_curves_and_links_are_recovered_from_their_measurements() -> None:
    assert fitted(curve(5e10, 40.0)) == pytest.approx((40.0, 5e10))
    assert fitted(curve(5e10, 40.0, (256, 2048))) == pytest.approx((40.0, 5e10))
    small, large = (3e-3 + size / 1e9 for size in MESSAGES)
    assert link((small, large)) == pytest.approx((3e-3, 1e9))


def test_a_curve_that_noise_bends_down_is_flat() -> None:
    half, endless = fitted({128: 6e10, 1024: 5e10, 8192: 4e10})
    assert half == 0
    assert 4e10 < endless < 6e10


def test_the_curve_of_both_passes_is_of_their_flops_over_their_seconds() -> None:
    # One FLOP forward and 2.5 backward, at 4e10 and 6e10 a second.
    assert of_both_passes(rates_of(1e10)) == pytest.approx((40.0, 3.5 / (1 / 4e10 + 2.5 / 6e10)))


def test_a_step_waits_for_the_slowest_rank_in_everything() -> None:
    fast = RankRates(compute=rates_of(2e10), exchange=(1e-3, 5e-3), memory=7)
    slow = RankRates(compute=rates_of(1e10), exchange=(2e-3, 4e-3), memory=9)
    found = slowest([fast, slow])
    assert found.compute == rates_of(1e10)
    assert found.exchange == (2e-3, 5e-3)
    assert found.memory == 7


def test_a_profile_is_read_by_the_planner_with_its_rates_as_shares_of_the_fastest(tmp_path: Path) -> None:
    measured = RankRates(compute=rates_of(1e10), exchange=(3.1e-3, 1.1e-2), memory=6 << 30)
    file = tmp_path / "machine.toml"
    file.write_text(to_toml(measured, 4))
    gpu = load_gpu("measured", [file])
    assumed = assumptions_for(gpu, ())
    assert gpu.measured
    assert gpu.peak_flops_per_s(4) == pytest.approx(6e10, rel=1e-3)
    peaks = (assumed.matmul, assumed.attention_forward, assumed.attention_backward)
    assert [share * gpu.peak_flops_per_s(4) for share in peaks] == pytest.approx([5e10, 4e10, 6e10], rel=2e-3)
    assert assumed.attention_half_rows == pytest.approx(40, rel=1e-2)
    assert assumed.matmul_half_outputs == pytest.approx(1e4, rel=1e-2)
    assert (assumed.small_head, assumed.small_head_rate) == (64, 0.75)
    model = load_model("llama3.2-1b")
    cluster = Cluster(gpu=gpu, nodes=1, gpus_per_node=4)
    job = Job(model=model, cluster=cluster, seq_len=8192, numerics=FP32)
    assert job.peak == pytest.approx(6e10, rel=1e-3)
    refusal = r"has no tflops, so bf16 cannot be priced; add it, or use --precision fp32"
    with pytest.raises(ValueError, match=refusal):
        Job(model=model, cluster=cluster, seq_len=8192)


def test_a_gpus_profile_has_its_own_rates_and_the_links_of_one_like_it(tmp_path: Path) -> None:
    measured = GpuRates(
        name="NVIDIA H200", like="h200-sxm", compute=rates_of(1e14), host_copy=5e10, memory=139 << 30
    )
    file = tmp_path / "gpu.toml"
    file.write_text(gpu_toml(measured))
    gpu, known = load_gpu("measured", [file]), load_gpu("h200-sxm")
    assert gpu.measured
    assert gpu.peak_flops_per_s(2) == pytest.approx(6e14, rel=1e-3)
    assert (gpu.memory_bytes, gpu.reported_bytes) == (139 << 30, 139 << 30)
    assert gpu.memory_bytes_per_s == pytest.approx(1e10)
    assert gpu.pcie_bytes_per_s == pytest.approx(5e10)
    assert gpu.network_bytes_per_s == known.network_bytes_per_s
    assert gpu.scale_up_bytes_per_s == known.scale_up_bytes_per_s
    assert gpu.generation == "hopper"
    assumed = assumptions_for(gpu, ())
    assert (assumed.memory, assumed.host_copy) == (1.0, 1.0)
    assert assumed.attention_forward == pytest.approx(4 / 6, rel=1e-3)


def test_a_device_is_measured_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(curves.LEAST_SECONDS, "cpu", 0.0)
    found = curves.measure("cpu", lambda run: run())
    sizes = SIZES["cpu"]
    assert tuple(found.forward) == tuple(found.backward) == sizes.rows
    assert tuple(found.products) == tuple(n * n for n in sizes.products)
    every = [*found.products.values(), *found.forward.values(), *found.backward.values(), found.copy]
    assert all(rate > 0 for rate in [*every, found.small_head])


TWO_RANKS = """
import sys
from pathlib import Path
from seqmesh.bench import curves, profile

curves.LEAST_SECONDS["cpu"] = 0.0
profile.ROUNDS = 1
profile.write_profile(Path(sys.argv[1]), "cpu", 2)
"""


def test_ranks_measure_themselves_and_share_the_machines_memory(tmp_path: Path) -> None:
    done = python_program(TWO_RANKS, str(tmp_path / "machine.toml"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    gpu = load_gpu("measured", [tmp_path / "machine.toml"])
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert gpu.memory_bytes == pytest.approx(there / 2, rel=1e-4)
    assert "2 ranks of one thread" in gpu.source
    assumed = assumptions_for(gpu, ())
    shares = (assumed.matmul, assumed.attention_forward, assumed.attention_backward)
    assert max(shares) == pytest.approx(1.0, abs=1e-3)
    assert gpu.network_bytes_per_s > 0


def test_a_message_is_what_others_get(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def exchange(received: torch.Tensor, given: torch.Tensor) -> None:
        assert received.shape == given.shape
        sent.append(given.nbytes)

    monkeypatch.setattr(profile.dist, "all_to_all_single", exchange)
    for message in MESSAGES:
        sent.clear()
        assert profile._exchange(message, 5) > 0
        assert {4 * nbytes / 5 for nbytes in sent} == {message}


def test_a_profile_needs_ranks_and_a_place_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use at least 2"):
        write_profile(tmp_path / "p.toml", "cpu", 1)
    with pytest.raises(ValueError, match="cannot write"):
        write_profile(tmp_path / "no" / "p.toml", "cpu", 2)


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    with pytest.raises(ValueError, match="--device tpu: a profile is of cuda or cpu"):
        write_profile(file, "tpu")
    with pytest.raises(ValueError, match="--gpu h100-sxm: CPU ranks have links of their own"):
        write_profile(file, "cpu", like="h100-sxm")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="PyTorch sees no CUDA device here"):
        write_profile(file, "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--ranks 4: a GPU is measured alone"):
        write_profile(file, ranks=4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P4")
    with pytest.raises(ValueError, match="does not know 'Tesla P4', whose links one GPU cannot measure"):
        write_profile(file)
    with pytest.raises(ValueError, match="unknown"):
        write_profile(file, like="p4")
    assert not file.exists()
