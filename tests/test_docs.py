"""README and docs: every Python snippet runs, every linked file exists, and the README's example runs under
torchrun.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"(?P<tag><!-- torchrun (?P<ranks>\d+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
SNIPPETS = [
    pytest.param(
        match["code"],
        int(match["ranks"] or 1),
        id=f"{page.name}:{page.read_text()[: match.start()].count(chr(10)) + 1}",
    )
    for page in PAGES
    for match in SNIPPET.finditer(page.read_text())
]


@pytest.mark.parametrize(("code", "ranks"), SNIPPETS)
def test_a_snippet_runs_as_it_stands(code: str, ranks: int, tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(code)
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else [sys.executable]
    )
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
    assert not re.findall(r"\b(TODO|FIXME|TBD|COMMIT|XXX|CPUTIME)\b", page.read_text())


def test_the_readme_example_has_at_most_twelve_lines() -> None:
    (example,) = [
        match["code"] for match in SNIPPET.finditer((ROOT / "README.md").read_text()) if match["ranks"]
    ]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
