"""Refuse functions that are too long, counted from `def` to the last line.

python tools/function_length.py FOLDER...
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

LONGEST = 40
"""Lines, signature and docstring included."""


def too_long(path: Path) -> Iterator[str]:
    """A message for each function of a file that is longer."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > LONGEST:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines; split it, {LONGEST} at most"


def main(folders: list[str]) -> int:
    """Print every message; 1 if there is one."""
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
    messages = [message for path in files for message in too_long(path)]
    print("\n".join(messages) or f"{len(files)} files: no function over {LONGEST} lines")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
