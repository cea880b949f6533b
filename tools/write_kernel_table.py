"""Write the table of docs/kernels.md anew, from what the kernels say.

python tools/write_kernel_table.py
"""

import re
from pathlib import Path

from seqmesh.kernel_table import text

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
GENERATED = re.compile(r"(<!-- from [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)


def written(page: str) -> str:
    """The page with the table between its two markers."""
    table = text(as_markdown=True)
    return GENERATED.sub(lambda marks: f"{marks[1]}\n{table}\n\n{marks[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
