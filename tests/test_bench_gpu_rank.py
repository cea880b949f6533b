"""One rank of a ring, alone: its exact schedule, exchanges as local copies, a table. No time is judged."""

import json
import re
import sys
from math import isqrt
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from torch import Tensor

from seqmesh import Schedule, SequenceMesh, attention, cli, layouts, masks
from seqmesh.bench import gpu_rank
from seqmesh.bench.gpu_rank import RankWork, _predicted, _problem, measure, work_of
from seqmesh.bench.local_copies import NAME, LocalCopies, alone
from seqmesh.layouts import load

ROOT = Path(__file__).parent.parent
SMALL = RankWork(device="cpu", tokens=24, rings=(2, 3), heads=4, kv_heads=2, head_dim=8, repeats=2)


def test_an_exchange_fills_what_is_received_with_what_is_sent() -> None:
    with alone(3, 1) as (_, group):
        sent, received = torch.arange(1.0, 6.0), torch.full((12,), torch.nan)
        group.all_to_all_single(received, sent, [4, 4, 4], [1, 2, 2])
        assert received.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
        group.all_to_all_single(received, sent[:0], [4, 4, 4], [0, 0, 0])
        assert received.tolist() == [0.0] * 12
        assert group.bytes_sent == 5 * 4


def test_two_rings_follow_one_another_in_one_process() -> None:
    for ring in (2, 4):
        with alone(ring, ring - 1) as (mesh, group):
            assert isinstance(group, LocalCopies)
            assert (mesh.ring, mesh.ring_rank, mesh.ring_group) == (ring, ring - 1, NAME)


def rank_alone(ring: int, ring_rank: int) -> tuple[Tensor, Tensor, int]:
    """Output, gradient of q and bytes of one rank, with peers or without: where they do not exist, what it
    would receive is made equal to what it sends."""
    mask, layout = masks.full(8 * ring), layouts.contiguous(8 * ring, ring)
    with alone(ring, ring_rank) as (mesh, group):
        schedule = Schedule.build(mask, mesh, layout)
        return *attended(schedule), group.bytes_sent


def attended(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """The same rows on every rank: then a local copy is what a peer would have sent."""
    q, k, v = (torch.randn(1, 8, 2, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    q.requires_grad_()
    out = attention(q, k, v, schedule, head_chunks=1)
    out.square().sum().backward()
    return out.detach(), q.grad


def real_rank(ring: int) -> tuple[Tensor, Tensor]:
    mesh = SequenceMesh.build(ring=ring)
    return attended(Schedule.build(masks.full(8 * ring), mesh, layouts.contiguous(8 * ring, ring)))


def test_a_rank_alone_computes_what_it_would_among_ranks_that_hold_the_same_rows(ranks: Ranks) -> None:
    for ring_rank, (out, dq) in enumerate(ranks.run(4, real_rank, 4)):
        alone_out, alone_dq, sent = rank_alone(4, ring_rank)
        assert torch.equal(out, alone_out)
        assert torch.equal(dq, alone_dq)
        assert sent > 0


def test_every_mask_and_ring_is_the_busiest_ranks_exact_work() -> None:
    found = list(measure(SMALL))
    assert [(one.mask, one.ring) for one in found] == [
        (name, ring) for name in ("causal", "documents", "window") for ring in (2, 3)
    ]
    for one in found:
        mask, layout = _problem(one.mask, SMALL.tokens, one.ring)
        assert one.pairs == max(load.areas(mask, layout))
        assert one.layout == layout.name
        assert one.blocks >= 1
        assert 0 < one.host_ms <= one.rank_ms
        assert one.call_ms > 0
        assert one.share.least <= one.share.median <= one.share.most
        assert 0 < one.predicted < 2


def test_the_planner_sees_no_loss_where_nothing_is_split() -> None:
    """One rank's causal block is the one call."""
    assert _predicted(masks.causal(1000), "contiguous", 1, 1000) == 1
    shorter = [_predicted(*args) for args in ((masks.causal(s), "zigzag", 4, s // 2) for s in (512, 8192))]
    assert shorter[0] < shorter[1] < 1


def test_what_is_not_finite_is_refused() -> None:
    run = gpu_rank._Run(Schedule.build(masks.causal(8), SequenceMesh.build(), "contiguous"), SMALL)
    run.once()
    run.check_finite()
    with torch.no_grad():
        run._q[0, 3] = torch.nan
    run.once()
    with pytest.raises(RuntimeError, match="not finite"):
        run.check_finite()


def test_the_documented_predictions_are_the_planners() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    rows = re.findall(r"planner, kernel alone \| (.*) \|\n", page)
    for name, row in zip(("causal", "documents", "window"), rows, strict=True):
        wanted = []
        for ring in gpu_rank.RINGS:
            mask, layout = _problem(name, gpu_rank.TOKENS["cuda"], ring)
            side = isqrt(2 * max(load.areas(mask, layout)))
            wanted.append(f"{_predicted(mask, layout.name, ring, side):.2f}")
        assert row.split(" | ") == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "a rank is timed on cuda or cpu"),
        (["--rings", "two"], "write ring degrees with commas"),
        (["--rings", "1", "--device", "cpu"], "use 2 tokens and 2 ranks at least"),
        (["--device", "cpu", "--json", "missing/x.json"], "name a file in an existing folder"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch) == 2
    assert "PyTorch sees no CUDA device here; use --device cpu" in capsys.readouterr().err


def test_the_command_prints_a_table_and_writes_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "shares.json"
    assert command(monkeypatch, "--device", "cpu", "--tokens", "16", "--rings", "2", "--json", str(file)) == 0
    out = capsys.readouterr().out
    rows = [line.split()[0] for line in out.splitlines() if re.match(r"(causal|documents|window) ", line)]
    assert rows == ["causal", "documents", "window"]
    written = json.loads(file.read_text())
    assert "float32, 16 tokens a rank" in written["work"]
    assert written["merges"] == "in plain operations"  # what a GPU does in one launch
    assert [one["mask"] for one in written["shares"]] == rows
    assert all(one["share"]["median"] > 0 for one in written["shares"])


def test_bench_without_a_command_still_measures_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    from seqmesh.bench import report

    asked = []
    monkeypatch.setattr(report, "run_bench", lambda *given: asked.append(given) or 1)
    monkeypatch.setattr(sys, "argv", ["seqmesh", "bench", "--quick", "--json", "x.json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert asked == [(True, Path("x.json"))]


def test_sizes_follow_the_device() -> None:
    assert work_of("cuda", None, None).tokens == 8192
    assert work_of("cuda", None, None).dtype is torch.bfloat16
    assert work_of("cpu", None, "2,8").rings == (2, 8)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`seqmesh bench gpu-rank` in this process: the exit code."""
    monkeypatch.setattr(sys, "argv", ["seqmesh", "bench", "gpu-rank", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)
