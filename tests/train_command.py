"""The real `seqmesh train` in a process of its own, for the tests of the command."""

import os
import subprocess
import sys
from pathlib import Path

TINY = ("--hidden=32", "--layers=2", "--heads=4", "--kv-heads=2", "--intermediate", "64", "--seq_len", "256")
TIMEOUT_S = 120
ROOT = Path(__file__).parent.parent
TEXT = "".join(f"line {n}: the quick brown fox jumps over the lazy dog, {n * n} times.\n" for n in range(400))


def command(*arguments: str) -> list[str]:
    """Without a trace before the start, which takes seconds, unless it is asked for."""
    says_so = any(argument.startswith(("--trace", "--dry-run")) for argument in arguments)
    more = ["--trace=false"] if arguments[:1] == ("train",) and not says_so else []
    return [sys.executable, "-c", "from seqmesh.cli import main; main()", *arguments, *more]


def environment() -> dict[str, str]:
    """Without what a launcher sets, and with the checkout importable from any folder."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return inherited | {"PYTHONPATH": str(ROOT)}


def seqmesh_command(*arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return ended(command(*arguments), cwd, **more)


def python_program(program: str, *arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return ended([sys.executable, "-c", program, *arguments], cwd, **more)


def ended(line: list[str], cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A process that has come to its end, with more in its environment."""
    return subprocess.run(
        line,
        cwd=cwd,
        env=environment() | more,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def one_line_error(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The error, after checking that it is one line on stderr and that nothing else was said."""
    assert done.returncode == code, done.stderr + done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("seqmesh: error: ")
    return lines[0]
