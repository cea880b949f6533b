"""`seqmesh draw`: pictures and text of any mask, layout and mesh; what cannot be drawn is one line."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from seqmesh import cli, layouts, masks
from seqmesh.picture import describe, draw_both, draw_chains, draw_mesh, draw_schedule
from seqmesh.picture.both import BETWEEN
from seqmesh.picture.mesh import mesh_size

pytestmark = pytest.mark.fast

Draw = Callable[..., tuple[int, str, str]]
WINDOWS = "documents([30, 9, 25]) & sliding_window(64, 16)"


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Draw:
    """The command in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["seqmesh", "draw", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return run


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_the_command_draws_what_a_program_would(draw: Draw, ending: str, tmp_path: Path) -> None:
    mask = masks.documents([30, 9, 25]) & masks.sliding_window(64, 16)
    zigzag = layouts.zigzag(64, 4)
    wanted = {
        ("--ulysses", "2", "--ring", "4"): lambda path: draw_mesh(2, 4, path),
        ("--mask", WINDOWS, "--layout", "zigzag", "--ring", "4"): (
            lambda path: draw_schedule(mask, zigzag, path)
        ),
        ("--mask", WINDOWS, "--layout", "zigzag", "--ulysses", "2", "--ring", "4", "--stages", "1"): (
            lambda path: draw_both(mask, zigzag, 2, path, stages=1)
        ),
    }
    pictures = []
    for arguments, call in wanted.items():
        ours, theirs = tmp_path / f"ours{ending}", tmp_path / f"theirs{ending}"
        assert draw(*arguments, "--out", str(ours)) == (0, "", "")
        call(theirs)
        assert ours.read_bytes() == theirs.read_bytes()
        pictures.append(ours.read_bytes())
    assert len(set(pictures)) == 3
    start = b"\x89PNG" if ending == ".png" else b"<?xml"
    assert all(picture.startswith(start) for picture in pictures)


def test_the_mesh_stands_above_the_schedule(tmp_path: Path) -> None:
    """As text in the file: titles of both, and where they stand."""
    draw_both(masks.causal(16), layouts.zigzag(16, 2), 3, tmp_path / "both.svg")
    text = (tmp_path / "both.svg").read_text()

    def inches_down(title: str) -> float:
        (y,) = re.findall(rf"<!-- {title}.*?translate\(\S+ (\S+?)\)", text, re.DOTALL)
        return float(y) / 72

    mesh = inches_down("6 ranks = ulysses 3 x ring 2")
    schedule = inches_down("zigzag layout, ring of 2")
    assert schedule - mesh == pytest.approx(mesh_size(3, 2)[1] + BETWEEN, abs=0.01)
    assert "dc:date" not in text  # equal pictures are equal files


def test_without_a_file_the_schedule_is_text_of_any_size(draw: Draw) -> None:
    code, out, error = draw("--mask", "causal(640)", "--layout", "zigzag", "--ring", "64")
    assert (code, error) == (0, "")
    assert out == describe(masks.causal(640), layouts.zigzag(640, 64)) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask", "__import__('os').getcwd()"], "has no place in a mask; write a family"),
        (["--mask", "causal(8", "--ring", "2"], "cannot be read as a mask"),
        (["--mask", "causal(8)", "--layout", "zigzig"], "layout='zigzig' is unknown; use 'auto'"),
        (["--mask", "causal(90)", "--ring", "9", "--out", "x.png"], "ring=9 does not fit in a picture"),
        (["--mask", "cross(4, 6)", "--layout", "contiguous"], "pictures show self-attention"),
        (["--ring", "0", "--out", "x.png"], "a degree is at least 1"),
        (["--ring", "2", "--out", "x.bmp"], "--out x.bmp: its ending says the format; use .svg, .png, .pdf"),
        (["--ring", "2", "--out", "missing/x.png"], "choose another place"),
        (["--ring", "2"], "nothing to draw: pass --mask"),
        (["--mask", "causal(8)", "--ring", "4", "--stages", "4"], "use 1 (all-gather) to 3 (ring)"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    draw: Draw, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = draw(*arguments)
    assert (code, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_command_says_what_to_install(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, error = draw("--ring", "2", "--out", str(tmp_path / "x.png"))
    assert code == 2
    assert "pip install 'seqmesh[train]'" in error


def test_states_are_drawn_as_a_program_would_and_refused_without_documents(
    draw: Draw, tmp_path: Path
) -> None:
    asked = ("--mask", "documents([44, 20])", "--ring", "4", "--layout", "zigzag", "--states")
    assert draw(*asked, "--out", str(tmp_path / "a.png"))[0] == 0
    draw_chains(masks.documents([44, 20]), layouts.zigzag(64, 4), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    code, _, error = draw(*asked)
    assert (code, "--states is a picture of documents; pass --mask and --out" in error) == (2, True)
    windows = ("--mask", WINDOWS, "--ring", "2", "--states", "--out", str(tmp_path / "c.png"))
    assert "not one of whole causal documents" in draw(*windows)[2]
