"""Capabilities are what the kernels say, and the documentation holds them."""

import json
import sys
from pathlib import Path

import pytest

import seqmesh
from seqmesh import cli
from seqmesh.engine.kernels import Problem, available, select
from seqmesh.kernel_table import DTYPES, Capability, capabilities, refusals, table, text

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent


def test_the_page_of_the_documentation_is_up_to_date() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    from write_kernel_table import PAGE, written

    page = PAGE.read_text()
    assert text(as_markdown=True) in page, "run python tools/write_kernel_table.py"
    assert written(page) == page


def test_a_capability_is_what_a_selection_does() -> None:
    """Asked for by name: what is refused raises with that reason, what is not is taken."""
    for one in capabilities():
        if one.device == "cpu" and one.feature in ("attention", "softcap"):
            softcap = 30.0 if one.feature == "softcap" else None
            problem = Problem(device_type="cpu", dtype=DTYPES[one.dtype], head_dim=64, softcap=softcap)
            if one.refusal is None:
                assert select(one.kernel, problem).name == one.kernel
            else:
                with pytest.raises(ValueError, match="no kernel computes") as refused:
                    select(one.kernel, problem)
                assert one.refusal in str(refused.value)


def test_every_kernel_has_a_row_where_it_computes_and_reasons_where_not() -> None:
    header, *rows = table()
    assert {row[0] for row in rows} == {kernel.name for kernel in available()}
    assert all(len(row) == len(header) for row in rows)
    assert "cuda: it runs on cuda, not on cpu" in refusals()


class Picky:
    """A kernel of one dtype, one device and one head dim."""

    name = "picky"

    def refusal(self, problem: Problem) -> str | None:
        if problem.device_type != "cpu":
            return "no cpu"
        if problem.dtype is not DTYPES["fp32"]:
            return "not fp32"
        return None if problem.head_dim == 64 else "not 64"

    def tiles(self, block: object) -> list[object]:
        return [block] * 3


def test_a_kernel_of_your_own_can_be_asked() -> None:
    found = capabilities([Picky()])
    asked = Capability(kernel="picky", device="cpu", dtype="fp32", feature="head dim 64", refusal=None)
    assert asked in found
    assert {one.refusal for one in found} == {None, "no cpu", "not fp32", "not 64"}
    _, row = table([Picky()])
    assert row[:4] == ("picky", "cpu", "fp32", "64")
    assert row[-1] == "3 calls"


def test_the_function_is_public_whatever_is_imported_first() -> None:
    assert seqmesh.capabilities is capabilities


@pytest.mark.parametrize("form", ["", "--json", "--markdown"])
def test_the_command_prints_all_forms(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["seqmesh", "capabilities", *form.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    out = capsys.readouterr().out
    if form == "--json":
        assert len(json.loads(out)["capabilities"]) == len(capabilities())
    else:
        assert out == text(as_markdown=bool(form)) + "\n"
        assert "reference" in out
