"""The benchmark of a training step: that both sides train the same, and that it prints. No time is judged."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seqmesh import cli
from seqmesh.bench import train_step
from seqmesh.bench.train_step import HELD, QUICK, TIMED, _plain_loop, _text, measure_memory
from seqmesh.parallel import ParallelDims
from seqmesh.train.config import DataConfig, ModelConfig
from seqmesh.train.trainer import Trainer

TINY = ModelConfig(hidden=64, layers=2, heads=8, kv_heads=8, intermediate=128)


def test_the_plain_loop_trains_what_one_rank_trains() -> None:
    config = replace(TIMED, model=TINY, data=DataConfig(seq_len=64))
    ours = Trainer(config, _text(config), ParallelDims().build(), peak_flops_per_s=1.0)
    plain = _plain_loop(config)
    losses = []
    for _ in range(3):
        seen: list[float] = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(train_step, "clocked", lambda run, seen=seen: seen.append(run()))
            plain(None)
        losses.append((ours.step().loss, seen[0]))
    for a, b in losses:
        assert a == pytest.approx(b, rel=1e-5)
    assert losses[0] != losses[2]


def test_memory_of_a_rank_falls_with_ranks() -> None:
    """What is whole on every rank (a layer's weights, a tile of logits) is all that is left over."""
    torch.manual_seed(0)
    config = replace(HELD, model=replace(TINY, hidden=128, intermediate=352), data=DataConfig(seq_len=2048))
    peaks = [figure.values["peak_bytes"] for figure in measure_memory(config)]
    assert peaks == sorted(peaks, reverse=True)
    for ranks, peak in zip((1, 2, 4, 8), peaks, strict=True):
        assert 1 <= peak * ranks / peaks[0] < 1.5


def test_the_command_prints_and_writes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(
        QUICK,
        timed=replace(TIMED, model=TINY, data=DataConfig(seq_len=64)),
        held=replace(HELD, model=TINY, data=DataConfig(seq_len=128)),
    )
    monkeypatch.setattr(train_step, "QUICK", tiny)
    monkeypatch.setattr(
        sys, "argv", ["seqmesh", "bench", "train-step", "--quick", f"--json={tmp_path / 'f'}"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    assert "time / plain loop's" in capsys.readouterr().out
    figures = json.loads((tmp_path / "f").read_text())["figures"]
    assert [figure["ok"] for figure in figures] == [None] * 7
    assert all(figure["values"].get("wall_ratio_median", 1) > 0 for figure in figures)
