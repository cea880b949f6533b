"""The measured profile: what it makes of measurements, and that the planner reads it."""

from pathlib import Path

import pytest

from seqmesh.bench.profile import BLOCKS, MESSAGES, RankRates, link, long_block_rate, to_toml, write_profile
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.numerics import Numerics
from seqmesh.planner.inputs.request import assumptions_for

FP32 = Numerics(element=4, gradient=4, optimizer=8)


def rates(endless: float, half: float) -> tuple[float, float]:
    """FLOP/s at the two block lengths of a kernel that reaches `endless`, and half of it at `half` rows."""
    short, long = (endless / (1 + half / rows) for rows in BLOCKS)
    return short, long


def test_block_rates_and_link_rates_are_recovered_from_their_two_measurements() -> None:
    assert long_block_rate(rates(5e10, 40.0)) == pytest.approx((40.0, 5e10))
    small, large = (3e-3 + size / 1e9 for size in MESSAGES)
    assert link((small, large)) == pytest.approx((3e-3, 1e9))


def test_a_profile_is_read_by_the_planner_with_its_rates_as_shares_of_the_fastest(tmp_path: Path) -> None:
    measured = RankRates(
        matmul=5e10,
        forward=rates(4e10, 40.0),
        backward=rates(6e10, 30.0),
        copy=1e10,
        exchange=(3.1e-3, 1.1e-2),
        memory=6 << 30,
    )
    file = tmp_path / "machine.toml"
    file.write_text(to_toml(measured, 4))
    gpu = load_gpu("measured", [file])
    assumed = assumptions_for(gpu, ())
    assert gpu.measured
    assert gpu.peak_flops_per_s(4) == pytest.approx(6e10, rel=1e-3)
    peaks = (assumed.matmul, assumed.attention_forward, assumed.attention_backward)
    assert [share * gpu.peak_flops_per_s(4) for share in peaks] == pytest.approx([5e10, 4e10, 6e10], rel=2e-3)
    assert assumed.attention_half_rows == pytest.approx(40, rel=1e-2)
    model = load_model("llama3.2-1b")
    cluster = Cluster(gpu=gpu, nodes=1, gpus_per_node=4)
    job = Job(model=model, cluster=cluster, seq_len=8192, numerics=FP32)
    assert job.peak == pytest.approx(6e10, rel=1e-3)
    refusal = r"has no tflops, so bf16 cannot be priced; add it, or use --precision fp32"
    with pytest.raises(ValueError, match=refusal):
        Job(model=model, cluster=cluster, seq_len=8192)


def test_a_profile_needs_ranks_and_a_place_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use at least 2"):
        write_profile(tmp_path / "p.toml", 1)
    with pytest.raises(ValueError, match="cannot write"):
        write_profile(tmp_path / "no" / "p.toml", 2)
