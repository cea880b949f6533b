"""Kernels of recurrences: which is taken and why, and packages' forms that take several pieces in a call.

The packages run on GPUs alone. Stand-ins with their arguments, which check what they are given as the
packages do, compute by the definitions, fp64. flash-linear-attention's own run in Triton's interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from oracle import mesh_of
from ranks import Ranks
from recurrences import problem
from test_recurrent import DOCUMENTS, MESHES, errors
from torch import Tensor

from seqmesh import Schedule, SequenceMesh, masks
from seqmesh.engine.recurrent.kernels import (
    GATED_DELTA_RULE,
    KIMI_DELTA_ATTENTION,
    MAMBA2,
    FlaKernel,
    MambaKernel,
    ModelKernel,
    PackedPieces,
    PieceCall,
    RecurrentProblem,
    chosen,
)
from seqmesh.engine.recurrent.layers import recur
from seqmesh.engine.recurrent.rules import Rule
from seqmesh.verify import definitions

ROOT = Path(__file__).parents[1]
TRITON = ROOT / ".venv" / "triton"
CALLS: list[int] = []
"""Pieces that each call of a stand-in was given; of this process."""


class FlaAnywhere(FlaKernel):
    def refusal(self, problem: RecurrentProblem) -> str | None:
        del problem
        return None


class MambaAnywhere(MambaKernel):
    def refusal(self, problem: RecurrentProblem) -> str | None:
        del problem
        return None


def delta_rule_of_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """As fla.ops.gated_delta_rule.chunk_gated_delta_rule and fla.ops.kda.chunk_kda."""
    assert output_final_state
    assert q.shape[0] == 1, "the batch size is expected to be 1 when using cu_seqlens"
    ends = cu_seqlens.tolist()
    assert initial_state is None or len(initial_state) == len(ends) - 1
    assert (ends[0], ends[-1]) == (0, q.shape[1])
    CALLS.append(len(ends) - 1)
    found = []
    for i in range(len(ends) - 1):
        rows = slice(ends[i], ends[i + 1])
        found.append(
            definitions.delta_rule(
                *(x[:, rows] for x in (q, k, v)),
                g=g[:, rows],
                beta=beta[:, rows],
                initial_state=None if initial_state is None else initial_state[i : i + 1],
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )
        )
    return torch.cat([out for out, _ in found], 1), torch.cat([state for _, state in found])


def scan_of_mamba_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    initial_states: Tensor | None,
    seq_idx: Tensor | None = None,
    return_final_states: bool,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """As mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined."""
    del chunk_size
    assert return_final_states
    if seq_idx is None:
        CALLS.append(1)
        return definitions.mamba2(x, dt, A, B, C, initial_states=initial_states, **options)
    assert initial_states is None
    assert seq_idx.dtype == torch.int32
    assert seq_idx.shape == x.shape[:2]
    lengths = torch.unique_consecutive(seq_idx[0], return_counts=True)[1].tolist()
    CALLS.append(len(lengths))
    parts = zip(*(one.split(lengths, 1) for one in (x, dt, B, C)), strict=True)
    found = [definitions.mamba2(*part[:2], A, *part[2:], initial_states=None, **options) for part in parts]
    return torch.cat([out for out, _ in found], 1), found[-1][1]


def gated_delta_rule_of_fla(q: Tensor, k: Tensor, v: Tensor, **gates: Any) -> tuple[Tensor, Tensor]:
    assert gates["g"].ndim == 3, "a gate a head"
    return delta_rule_of_fla(q, k, v, **gates)


def kda_of_fla(q: Tensor, k: Tensor, v: Tensor, **gates: Any) -> tuple[Tensor, Tensor]:
    assert gates["g"].shape == q.shape, "a gate a channel"
    return delta_rule_of_fla(q, k, v, **gates)


STAND_INS = {
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": gated_delta_rule_of_fla},
    "fla.ops.kda": {"chunk_kda": kda_of_fla},
    "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": scan_of_mamba_ssm},
}


def by_stand_ins(rule: Rule, tensors: dict[str, Tensor], schedule: Schedule) -> Tensor:
    """`recur` by the kernels of packages."""
    for path, functions in STAND_INS.items():
        module = ModuleType(path)
        vars(module).update(functions)
        sys.modules[path] = module
    try:
        kernel = FlaAnywhere() if "query" in tensors else MambaAnywhere()
        return recur(rule, tensors, schedule, kernel)
    finally:
        for path in STAND_INS:
            del sys.modules[path]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh[0]}-u{mesh[1]}r{mesh[2]}")
@pytest.mark.parametrize("kind", ["delta", "kimi", "mamba2", "bare mamba2"])
def test_forms_that_take_several_pieces_equal_one_rank_forward_and_backward(
    ranks: Ranks, kind: str, mesh: tuple[str, int, int]
) -> None:
    for lengths in [*DOCUMENTS, [3]]:
        assert max(ranks.run(4, errors, kind, lengths, *mesh, 6, by_stand_ins)) < 1e-10, lengths


def pieces_of_calls(kind: str, lengths: list[int]) -> list[int]:
    mesh = mesh_of(1, 2)
    schedule = Schedule.build(masks.documents(lengths), mesh, layout="zigzag")
    rule, tensors = problem(kind, sum(lengths))
    own = {name: schedule.shard(x, 1) if name in rule.by_token else x for name, x in tensors.items()}
    CALLS.clear()
    by_stand_ins(rule, {name: x.clone().requires_grad_() for name, x in own.items()}, schedule)
    return list(CALLS)


def test_a_phase_is_one_call_of_fla_for_all_its_pieces_and_sequences(ranks: Ranks) -> None:
    # Spans 0-9 and 30-39, 10-29, of documents 0-3, 4-7, 8-31, 32-35, 36-39; two sequences.
    first, second = ranks.run(2, pieces_of_calls, "delta", [4, 4, 24, 4, 4])
    assert first == [2 * 1, 2 * 1, 2 * 4, 2 * 1]  # leaves; scouted at its end; whole; entered
    assert second == [2 * 1, 2 * 1]  # scouted; entered


def test_whole_documents_are_one_call_of_mamba_ssm(ranks: Ranks) -> None:
    first, second = ranks.run(2, pieces_of_calls, "mamba2", [4, 4, 24, 4, 4])
    assert first == [1, 4, 1]
    assert second == [1]


def test_what_tells_pieces_apart_is_made_once_for_all_layers() -> None:
    found = []
    for _ in range(2):
        rows = [torch.zeros(2, n, 3) for n in (4, 2)]
        calls = [PieceCall({"query": x}, None, leaves=True) for x in rows]
        with torch.inference_mode():
            pieces = PackedPieces.of(("query",), calls)
            found.append((pieces.cu_seqlens(), pieces.numbers()))
    (ends, numbers), again = found
    assert again[0] is ends
    assert again[1] is numbers
    assert ends.tolist() == [0, 4, 6, 10, 12]
    assert numbers.tolist() == [[0, 0, 0, 0, 1, 1]] * 2
    assert not ends.is_inference()
    assert not numbers.is_inference()


def asked(**changes: Any) -> RecurrentProblem:
    given = {
        "recurrence": GATED_DELTA_RULE,
        "device_type": "cuda",
        "dtype": torch.bfloat16,
        "head_dim": 128,
    }
    return RecurrentProblem(**given | changes)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqmesh.engine.recurrent.kernels._is_installed", bool)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "fla"),
        ({"recurrence": KIMI_DELTA_ATTENTION}, "fla"),
        ({"recurrence": MAMBA2}, "mamba_ssm"),
        ({"device_type": "cpu"}, "model"),
        ({"recurrence": MAMBA2, "device_type": "cpu"}, "model"),
        ({"dtype": torch.float64}, "model"),
        ({"head_dim": 256}, "fla"),
        ({"head_dim": 257}, "model"),
        ({"recurrence": MAMBA2, "head_dim": 257}, "model"),
    ],
)
def test_auto_takes_the_first_kernel_that_refuses_nothing(changes: dict[str, Any], name: str) -> None:
    assert chosen("auto", asked(**changes)).name == name


def test_a_package_that_is_not_installed_is_not_taken() -> None:
    assert chosen("auto", asked()).name == "model"
    with pytest.raises(ValueError, match="refused by fla: flash-linear-attention is not installed"):
        chosen("fla", asked())
    with pytest.raises(ValueError, match="refused by mamba_ssm: mamba-ssm is not installed"):
        chosen("mamba_ssm", asked(recurrence=MAMBA2))


@pytest.mark.parametrize(
    ("kernel", "changes", "reason"),
    [
        ("fla", {"device_type": "cpu"}, "fla: it runs on cuda, not on cpu"),
        ("fla", {"recurrence": MAMBA2}, "fla: it computes delta rules, not Mamba-2"),
        ("fla", {"dtype": torch.float64}, "fla: dtype torch.float64 is not float32, float16 or bfloat16"),
        ("fla", {"head_dim": 320}, "fla: head dim 320 is more than 256"),
        ("mamba_ssm", {}, "mamba_ssm: it computes Mamba-2, not a gated delta rule"),
        ("mamba_ssm", {"recurrence": MAMBA2, "head_dim": 320}, "mamba_ssm: state size 320 is more than 256"),
        ("flash", {}, "kernel='flash' is unknown; use 'auto', 'fla', 'mamba_ssm', 'model'"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_a_kernel_asked_for_by_name_says_why_it_refuses(
    kernel: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        chosen(kernel, asked(**changes))


def test_a_kernel_of_ones_own_is_taken_and_named_where_an_operator_needs_a_name() -> None:
    own = ModelKernel()
    assert chosen(own, asked()) is own
    schedule = Schedule.build(masks.causal(8), SequenceMesh.build(ulysses=1, ring=1))
    rule, tensors = problem("delta", 8)
    on_meta = {name: x.to("meta") for name, x in tensors.items()}
    with pytest.raises(ValueError, match="pass the name of a kernel, or 'auto'"):
        recur(rule, on_meta, schedule, own)
    assert recur(rule, on_meta, schedule, "model").shape == (2, 8, 6, 5)


@pytest.mark.skipif(not (TRITON / "fla").exists(), reason="fla is not set up: make .venv/triton")
def test_flas_own_kernels_in_tritons_interpreter_are_right_on_two_ranks(tmp_path: Path) -> None:
    path = f"{TRITON}:{ROOT}:{ROOT / 'tests'}"
    found = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fla_interpreted.py"), str(tmp_path / "store")],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    errors_found = [line.split() for line in found.stdout.splitlines()]
    assert sorted(kind for kind, _ in errors_found) == ["delta", "delta", "kimi", "kimi"]
    # fp32, of outputs and gradients of order 1 after 40 tokens
    assert max(float(error) for _, error in errors_found) < 2e-6
