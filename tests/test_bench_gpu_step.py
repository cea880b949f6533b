"""A training step of one rank alone: what it runs, what it says, what it refuses. No time is judged."""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqmesh import cli
from seqmesh.bench import gpu_step
from seqmesh.bench.arrivals import arrivals_filled
from seqmesh.bench.gpu_step import LLAMA3_8B_208K, TINY, _cluster, measure
from seqmesh.foresee import known_as
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.of_recipe import nodes_for, of_recipe
from seqmesh.trace.fake_ranks import fake_ranks
from seqmesh.train.config import DataConfig, MeshConfig
from seqmesh.train.recipe import load

ROOT = Path(__file__).parent.parent
SMALL = replace(TINY, data=DataConfig(seq_len=256))


def test_a_rank_of_sixteen_takes_its_step_alone() -> None:
    found = measure(SMALL, _cluster(SMALL, "a100-sxm"), steps=2)
    assert not dist.is_initialized()
    assert (found.ranks, found.tokens) == (16, 256)
    model, pairs = SMALL.model, 256 * 257 // 2
    layer = 2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 128
    matmul = 2 * layer + 512 * 64
    flops = 6 * matmul * 256 + 12 * model.layers * pairs * 64
    assert found.mfu_mask * found.seconds * found.peak_flops_per_s * 16 == pytest.approx(flops)
    assert found.mfu_noncausal > found.mfu_mask
    assert found.spread[0] <= found.seconds <= found.spread[1]
    assert found.peak_flops_per_s == load_gpu("a100-sxm").fp32_flops_per_s
    assert found.bytes_sent > 0
    assert found.predicted_seconds is not None
    assert found.predicted_seconds > 0
    assert found.priced_otherwise == ()


def leaving_it_nan(collective: Callable[..., Any]) -> Callable[..., Any]:
    """As PyTorch 2.11's fake backend leaves what is received, with the worst in it."""

    def called(*args: Any, **kwargs: Any) -> Any:
        found = collective(*args, **kwargs)
        (found if isinstance(found, Tensor) else kwargs.get("output", args[0] if args else None)).fill_(nan)
        return found

    called.default = getattr(collective, "default", None)  # type: ignore[attr-defined]
    return called


def test_numbers_are_finite_where_the_backend_fills_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = torch.ops._c10d_functional
    all_to_all = functional.all_to_all_single
    for owner, names in (
        (functional, ("all_to_all_single", "reduce_scatter_tensor")),
        (dist, ("all_to_all_single", "reduce_scatter_tensor", "reduce_scatter_single")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, leaving_it_nan(getattr(owner, name)))
    shared_norms = replace(
        SMALL, mesh=MeshConfig(tp=2, ulysses=1, ring=2), train=replace(SMALL.train, shard_norms=True)
    )
    for config in (SMALL, shared_norms):
        assert measure(config, None, steps=1).mfu_mask > 0
    with fake_ranks(SMALL), arrivals_filled():
        assert functional.all_to_all_single.default is all_to_all.default  # PyTorch 2.11 asks for it
    with monkeypatch.context() as without:
        without.setattr(gpu_step, "arrivals_filled", nullcontext)
        with pytest.raises(FloatingPointError, match="loss nan"):
            measure(SMALL, None, steps=1)


def test_the_command_prints_and_writes_what_it_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_step, "TINY", SMALL)
    arguments = ["bench", "gpu-step", "--device=cpu", "--steps=1", f"--json={tmp_path / 'step.json'}"]
    monkeypatch.setattr(sys, "argv", ["seqmesh", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "rank 0 of 16 (ring 2 x ulysses 8), 256 tokens a step" in shown
    assert "counting the mask's exact pairs" in shown
    assert "planner" not in shown  # which knows no CPU
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["ranks"] == 16
    assert written["seconds"] > 0
    assert written["predicted_seconds"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device=tpu"], "--device tpu: a rank is timed on cuda or cpu"),
        (["--device=cpu", "--steps=0"], "--steps 0: time one step at least"),
        (["--device=cpu", "--gpu=h900"], "unknown GPU 'h900'"),
        ([str(ROOT / "recipes/mixes/pipeline.toml"), "--device=cpu"], "a stage alone receives nothing"),
        ([], "PyTorch sees no CUDA device here"),
    ],
)
def test_what_cannot_be_timed_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["seqmesh", "bench", "gpu-step", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.fast
def test_a_gpu_is_known_by_its_name_in_pytorch() -> None:
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA A800-SXM4-80GB", "T4"]
    assert [known_as(name) for name in names] == ["h100-sxm", "h200-sxm", "a100-sxm", "a800-sxm", ""]


@pytest.mark.fast
def test_the_default_job_is_the_shipped_recipe() -> None:
    shipped = load(str(ROOT / "recipes" / "llama3-8b-208k.toml"))
    for section in ("mesh", "model", "data"):
        assert getattr(shipped, section) == getattr(LLAMA3_8B_208K, section)
    for key in ("zero", "precision", "checkpointing", "tiling"):
        assert getattr(shipped.train, key) == getattr(LLAMA3_8B_208K.train, key)


@pytest.mark.fast
def test_a_recipe_is_priced_as_what_it_is() -> None:
    cluster = nodes_for(Cluster(gpu=load_gpu("a800-sxm"), nodes=1, gpus_per_node=8), 16)
    assert (cluster.nodes, cluster.gpus_per_node) == (2, 8)
    recipe = replace(
        LLAMA3_8B_208K,
        mesh=MeshConfig(dp_replicate=2, dp_shard=2, ring=2, ulysses=1, tp=2),
        data=DataConfig(seq_len=8192, sequences=8),
    )
    job, point, missing = of_recipe(recipe, cluster, vocabulary=128256)
    assert str(point) == "tp2 u1 r2 dp4 pp1, zero 3, micro-batch 2, checkpointing selective, tiling loss"
    assert (job.seq_len, job.global_batch, job.model.vocabulary) == (8192, 8, 128256)
    assert job.model.parameters == pytest.approx(8.03e9, rel=1e-3)
    assert missing == ("train.shard_norms=false as true", "mesh.dp_replicate=2 as dp_shard")
    assert CostModel(job).estimate(point).gpus == 16
    with pytest.raises(ValueError, match="12 ranks do not fill nodes of 8"):
        nodes_for(cluster, 12)
    assert nodes_for(cluster, 4).gpus_per_node == 4
