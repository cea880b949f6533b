"""README and docs: every Python snippet runs, the README's under torchrun; every linked file exists."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"(?P<tag><!-- torchrun (?P<ranks>\d+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)


def snippets() -> Iterator[Any]:
    """Every Python snippet of every page, with the number of ranks that it asks for."""
    for page in PAGES:
        text = page.read_text()
        for match in SNIPPET.finditer(text):
            line = text[: match.start()].count("\n") + 1
            yield pytest.param(match["code"], int(match["ranks"] or 1), id=f"{page.name}:{line}")


@pytest.mark.parametrize(("code", "ranks"), list(snippets()))
def test_a_snippet_runs_as_it_stands(code: str, ranks: int, tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(code)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*launcher, str(file)], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_holds_a_placeholder(page: Path) -> None:
    placeholder = r"\b(TODO|FIXME|TBD|XXX|CPUTIME)\b|\bcommit [A-Z]+\b"
    assert not re.findall(placeholder, page.read_text())


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_the_readmes_first_screen_says_what_was_proved_and_what_not() -> None:
    first_screen = (ROOT / "README.md").read_text().split("## ")[0]
    assert "make train" in first_screen
    assert "make test" in first_screen
    assert "Proved on CPU" in first_screen
    assert "not run on several GPUs" in first_screen


def test_the_first_example_has_at_most_twelve_lines() -> None:
    (example,) = [code for code, ranks in _codes(ROOT / "README.md") if ranks > 1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12


def _codes(page: Path) -> list[tuple[str, int]]:
    return [(match["code"], int(match["ranks"] or 1)) for match in SNIPPET.finditer(page.read_text())]


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index


def test_the_tree_names_every_module_outside_the_programs() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text()
    for path in [*(ROOT / "seqmesh").glob("*.py"), *(ROOT / "seqmesh").glob("*/")]:
        if not path.name.startswith("__"):
            assert path.name in tree, f"docs/architecture.md does not show {path.name}"
    for folder in ("masks", "layouts", "schedule", "engine"):
        for path in (ROOT / "seqmesh" / folder).glob("*.py"):
            assert path.name == "__init__.py" or path.stem in tree, f"docs/architecture.md lacks {path.name}"
