"""`seqmesh verify`: cases are texts, the yardsticks agree with each other, and a wrong number fails."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks

from seqmesh.engine.kernels import available
from seqmesh.layouts import named
from seqmesh.notation import families, family_of, mask_of
from seqmesh.schedule import ring_schedule
from seqmesh.verify.attend import Part, assemble
from seqmesh.verify.cases import DTYPES, FAMILIES, SHAPES, AttentionCase, Support, grid, parse
from seqmesh.verify.judge import LIMIT, LUCK, CaseOutcome, floor_of, judge
from seqmesh.verify.oracle import dense, make, one_device
from seqmesh.verify.ranks import Where, _handler
from seqmesh.verify.ranks import judged as judged_on_ranks
from seqmesh.verify.report import as_json
from seqmesh.verify.support import left_out, supported

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ALL = [
    Support(kernel=kernel, dtype=dtype, device="cpu", softcap=True, value_head_dim=True)
    for kernel in ("a", "b")
    for dtype in DTYPES
]
MESHES = [(2, 2), (1, 4), (4, 1)]


def test_every_case_is_the_text_that_it_prints() -> None:
    for quick in (True, False):
        for case in grid(MESHES, ALL, quick=quick):
            assert parse(str(case)) == case


def test_every_family_of_masks_is_proved() -> None:
    proved = {name for texts in FAMILIES for text in texts for name in family_of(text).split(" & ")}
    assert proved == {*families(), "Mask"}


def test_every_row_meets_every_mesh_layout_and_shape() -> None:
    rows: dict[tuple[str, str, str], list[AttentionCase]] = {}
    for case in grid(MESHES, ALL, quick=False):
        rows.setdefault((case.what, case.dtype, case.kernel), []).append(case)
    assert len(rows) == len(FAMILIES) * len(ALL) + 2 * (2 + 1) + 1
    for (what, _, _), row in rows.items():
        if row[0].mode == "eager":
            layouts = {"auto", "contiguous", "zigzag", "striped", "balanced"}
            assert {case.layout for case in row} >= layouts - ({"balanced"} if what == "cross" else set())
            assert {(case.ulysses, case.ring) for case in row} == set(MESHES)
            assert {(case.kv_heads, case.softcap) for case in row} == {
                (s.kv_heads, s.softcap) for s in SHAPES
            }


def test_a_mesh_of_more_ulysses_ranks_than_heads_gets_heads_that_do_not_divide() -> None:
    for case in grid([(8, 1)], ALL, quick=True):
        assert case.heads >= 8
        assert case.heads % 8


def test_what_a_kernel_has_not_is_left_out() -> None:
    capped = Support(kernel="a", dtype="fp32", device="cuda", softcap=True, value_head_dim=True)
    tried = list(grid([(1, 2)], [capped], quick=False))
    assert any(case.softcap for case in tried)
    assert all("device=cuda" in str(case) for case in tried)
    assert any(case.value_head_dim for case in tried)
    plain = list(grid([(1, 2)], [replace(capped, softcap=False, value_head_dim=False)], quick=False))
    assert len(plain) == len(tried)
    assert not any(case.softcap or case.value_head_dim for case in plain)


def test_on_a_gpu_every_kernel_and_dtype_meets_a_long_sequence_on_every_mesh() -> None:
    on_gpus = [replace(support, device="cuda") for support in ALL]
    long = [case for case in grid(MESHES, on_gpus, quick=False) if case.made_mask().q_len > 2000]
    asked = {(case.ulysses, case.ring, case.kernel, case.dtype) for case in long}
    assert asked == {(*mesh, support.kernel, support.dtype) for mesh in MESHES for support in ALL}
    assert {case.what for case in long} == {"causal", "documents", "sliding_window"}
    for cases in (grid(MESHES, ALL, quick=False), grid(MESHES, on_gpus, quick=True)):
        assert all(case.made_mask().q_len <= 2000 for case in cases)


def test_what_is_not_tried_is_said() -> None:
    found = {(support.kernel, support.dtype, support.softcap) for support in supported("cpu")}
    assert {("reference", dtype, True) for dtype in DTYPES} <= found
    assert any(line.startswith("cuda: ") for line in left_out("cpu"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("causal(9); ring=two", "'ring=two' in a case needs a number"),
        ("causal(9); rings=2", "'rings' is no field; use ulysses, ring, layout"),
        ("causal(9); dtype=int8", "dtype=int8 is unknown; use fp64, fp32"),
        ("causal(9); ring=0", "ring=0 in a case; use at least 1"),
        ("causal(9); heads=3 kv_heads=2", "use a multiple"),
        ("casual(9)", "'casual' is no family of masks"),
    ],
)
def test_a_text_that_is_no_case_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize("texts", FAMILIES, ids=lambda texts: family_of(texts[0]))
def test_one_device_and_the_definition_agree(texts: tuple[str, ...]) -> None:
    """Two formulations, with sinks as a key of their own in the one, in fp64: a few roundings apart."""
    for text in texts:
        for shape in SHAPES:
            case = replace(shape, mask=text, softcap=None, dtype="fp64")
            given = make(case)
            one, right = one_device(case, given, CPU), dense(case, given)
            assert one.keys() == right.keys()
            for name, x in right.items():
                torch.testing.assert_close(one[name], x, rtol=1e-13, atol=1e-13)


CASE = AttentionCase(mask="causal(12)", heads=2, kv_heads=2, dtype="bf16")


def unchanged(got: dict[str, torch.Tensor]) -> None:
    del got


def judged(case: AttentionCase, change: Any) -> CaseOutcome:
    """The verdict on one device's own results after `change(results)`."""
    given = make(case)
    one = one_device(case, given, CPU)
    got = {name: x.clone() for name, x in one.items()}
    change(got)
    return judge(case, got, one, dense(case, given))


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_an_error_passes_up_to_the_limit_and_fails_above(name: str) -> None:
    given = make(CASE)
    largest = dense(CASE, given)[name].norm(dim=-1).max().item()
    one = judged(CASE, unchanged).errors[name]
    unit = max(one.one_device, floor_of(CASE, name))

    def shift(units: float) -> Any:
        def change(got: dict[str, torch.Tensor]) -> None:
            # One row of d numbers, off by that much in one of them; in fp32, so that it is not rounded away.
            got[name] = dense(CASE, given)[name].clone()
            got[name][0, 3, 1, 5] += units * unit * max(largest, CASE.head_dim**0.5)

        return change

    def ratio(units: float) -> float:
        return judged(CASE, shift(units)).errors[name].ratio

    assert ratio(LIMIT - 0.1) == pytest.approx(LIMIT - 0.1, rel=1e-6)
    assert ratio(LIMIT + 0.1) == pytest.approx(LIMIT + 0.1, rel=1e-6)
    assert judged(CASE, unchanged).ok


def test_no_number_and_another_dtype_fail() -> None:
    nan = judged(CASE, lambda got: got["dk"].__setitem__((0, 3, 1, 5), torch.nan))
    assert not nan.ok
    assert nan.ratio == inf
    other = judged(CASE, lambda got: got.__setitem__("out", got["out"].float()))
    assert not other.ok
    assert other.failure == "out is torch.float32, of one device torch.bfloat16 (eager)"


def test_a_yardstick_that_is_wrong_itself_fails_the_case() -> None:
    given = make(CASE)
    right = dense(CASE, given)
    wrong = {name: x.bfloat16() * (1 + 2 * LUCK * floor_of(CASE, "out")) for name, x in right.items()}
    outcome = judge(CASE, {name: x.bfloat16() for name, x in right.items()}, wrong, right)
    assert outcome.failure is not None
    assert "is no yardstick" in outcome.failure


def test_a_token_that_two_ranks_hold_is_no_result() -> None:
    part = Part(queries=torch.arange(12), keys=torch.arange(12), local=dense(CASE, make(CASE)))
    assert assemble(CASE, [part])["out"].shape == (1, 12, 2, 16)
    twice = replace(part, queries=torch.arange(12) % 11)
    with pytest.raises(ValueError, match="the ranks' queries are not the 12 tokens, each once"):
        assemble(CASE, [twice])


def compared(cases: list[AttentionCase]) -> list[CaseOutcome]:
    """On one rank: the outcomes of the cases that it judged."""
    found = [judged_on_ranks(case, turn, CPU) for turn, case in enumerate(cases)]
    return [outcome for outcome in found if outcome is not None]


SPECIAL = replace(CASE, mask="documents([20, 13])", heads=6, kv_heads=2, dtype="fp32", ulysses=2, ring=2)


@pytest.mark.parametrize("mode", ["eager", "checkpoint", "compile"])
def test_a_case_passes_on_a_mesh_however_attention_is_called(ranks: Ranks, mode: str) -> None:
    cases = [replace(SPECIAL, mode=mode, kernel="cpu")]
    if mode != "compile":
        cases += [replace(SPECIAL, mode=mode, dtype="bf16", softcap=2.0, sinks=True)]
    outcomes = [outcome for rank in ranks.run(4, compared, cases) for outcome in rank]
    assert len(outcomes) == len(cases)
    for outcome in outcomes:
        assert outcome.ok, outcome
        assert outcome.errors.keys() >= {"out", "dq", "dk", "dv"}


def test_an_autocast_gives_the_dtypes_that_one_device_gives(ranks: Ranks) -> None:
    case = replace(SPECIAL, mode="autocast", dtype="bf16", kernel="cpu")
    cases = [case, replace(case, kernel="reference", softcap=2.0, sinks=True)]
    for outcome in [outcome for rank in ranks.run(4, compared, cases) for outcome in rank]:
        assert outcome.ok, outcome


def test_what_attention_refuses_is_an_outcome_on_every_rank(ranks: Ranks) -> None:
    cases = [replace(SPECIAL, kernel="cpu", softcap=2.0), SPECIAL]
    refused, fine = [outcome for rank in ranks.run(4, compared, cases) for outcome in rank]
    assert "it has no softcap" in str(refused.failure)
    assert not refused.ok
    assert fine.ok


def test_long_masks_are_there_because_kernels_cut_them() -> None:
    """Short bands are one call of the CPU's kernel: a tile that is lost or turned wrongly would not show."""
    (cpu,) = [kernel for kernel in available() if kernel.name == "cpu"]
    cut = set()
    for texts in FAMILIES:
        for text in texts:
            mask = mask_of(text)
            if mask.q_len == mask.k_len:
                for layout in ("zigzag", "striped", "balanced"):
                    held = named(layout, mask, mask.q_len, 2)
                    for stage in ring_schedule(mask, held, held, 1).stages:
                        if any(len(cpu.tiles(block)) > 1 for block in stage.blocks):
                            cut.add(family_of(text))
    assert cut == {"sliding_window", "documents & sliding_window", "tree", "Mask"}


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Where(device_type="cuda", world=4, place=None)
    own = replace(shared, nccl=True)
    assert (shared.backend, own.backend) == ("gloo", "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="PyTorch sees no CUDA device here"):
        shared.check()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    shared.check()
    replace(own, world=2).check()
    with pytest.raises(ValueError, match="4 ranks would share 2"):
        own.check()
    replace(shared, flash="FA3").check()
    with pytest.raises(ValueError, match="--flash FA9: PyTorch knows FA3, FA4"):
        replace(shared, flash="FA9").check()


def test_flash_attention_is_exchanged_on_every_rank_before_its_first_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    monkeypatch.setattr("seqmesh.verify.ranks.activate_flash_attention_impl", called.append)
    monkeypatch.setattr("seqmesh.verify.ranks._device", torch.device)

    def work(request: str, *_: object) -> None:
        called.append(request)

    _handler(work, Where(device_type="cpu", world=1, place=None, flash="FA3"))((0, "the case"))
    assert called == ["FA3", "the case"]


def test_json_has_no_nan() -> None:
    nan = judged(CASE, lambda got: got["dk"].__setitem__((0, 3, 1, 5), torch.nan))
    record = as_json({}, [nan], [])["cases"][0]
    assert record["errors"]["dk"]["ours"] is None
    assert record["errors"]["dk"]["ratio"] is None
    assert not record["ok"]
    json.dumps(record, allow_nan=False)


RIGHT = """
import sys
from seqmesh import cli
from seqmesh.verify import cases
cases.FAMILIES = cases.FAMILIES[3:4]  # packed documents
"""
WRONG = (
    RIGHT
    + """
from seqmesh import Schedule
from seqmesh.masks import Mask
build = Schedule.build

def off_by_one(mask, *more, **options):
    # Causal documents in which nobody sees itself, but for the first of each.
    strict = [band if band.lo is None else band._replace(lo=1) for band in mask.bands]
    return build(Mask(mask.q_len, mask.k_len, tuple(strict)), *more, **options)

Schedule.build = off_by_one
"""
)


def verify(program: str, *arguments: str, launcher: tuple[str, ...] = (), folder: Path) -> Any:
    """`seqmesh verify` in a process of its own: ranks are forked, which must come before any tensor work."""
    script = folder / "program.py"
    script.write_text(program + f"sys.argv = ['seqmesh', 'verify', *{list(arguments)!r}]\ncli.main()\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [sys.executable, *launcher, str(script)]
    return subprocess.run(
        started, env=environment, capture_output=True, text=True, timeout=180, check=False, cwd=folder
    )


def test_a_quick_run_prints_a_table_and_a_verdict(tmp_path: Path) -> None:
    done = verify(RIGHT, "--quick", "--ulysses", "1", "--ring", "2", folder=tmp_path)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    rows = [line for line in lines if line.startswith("documents ")]
    assert len(rows) == 8  # two kernels, four dtypes
    assert all("PASS" in row for row in rows)
    assert lines[-1].startswith("FAIL" if done.returncode else "PASS")
    unproved = {line.split()[0] for line in lines if "FAIL" in line and "--case" not in line}
    assert unproved <= {"autocast"}


def test_a_wrong_mask_fails_and_its_command_replays_it(tmp_path: Path) -> None:
    mesh = ("--quick", "--ulysses", "1", "--ring", "2")
    done = verify(WRONG, *mesh, "--json", folder=tmp_path)
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["ok"] is False
    assert document["torch"]
    assert document["hardware"]["cores"]
    wrong = [case for case in document["cases"] if case["what"] == "documents" and not case["ok"]]
    assert len(wrong) >= 12  # all but those that are not causal
    first = next(case for case in document["cases"] if not case["ok"])
    assert first["replay"] == f"seqmesh verify --case '{first['case']}'"
    again = verify(WRONG, "--case", first["case"], folder=tmp_path)
    assert again.returncode == 1
    error = first["errors"]["out"]["ours"]
    assert f"out     {error:.1e}" in again.stdout
    assert again.stdout.splitlines()[-1].endswith(first["replay"])
    fixed = verify(RIGHT, "--case", first["case"], folder=tmp_path)
    assert (fixed.returncode, fixed.stderr) == (0, "")
    assert "PASS" in fixed.stdout.splitlines()[-1]


def test_torchruns_ranks_are_joined(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    case = "causal(21); ring=2 layout=zigzag dtype=bf16"
    done = verify(RIGHT, "--case", case, launcher=launcher, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PASS") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "cases run on cpu or cuda"),
        (("--ring", "0"), "a degree is at least 1"),
        (("--nccl",), "--nccl moves CUDA tensors; add --device cuda"),
        (("--flash", "FA3"), "--flash chooses what computes on CUDA; add --device cuda"),
        (("--case", "causal(9); ring=2", "--ring", "2"), "--case has its own mesh"),
        (("--case", "causal(9)", "--device", "cuda"), "--case has its own device, cpu"),
        (("--case", "causal("), "cannot be read as a mask"),
    ],
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = verify(RIGHT, *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
