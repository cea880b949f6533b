"""`seqmesh plan` in this process, for the tests of the command."""

import json
import sys
from typing import Any

import pytest

from seqmesh import cli

JOB = [
    "--model", "llama3-8b", "--gpu", "a800-sxm", "--nodes", "2", "--gpus-per-node", "8",
    "--seq-len", "208K", "--global-batch", "1",
]  # fmt: skip
KERNEL = [
    "--kernel", "--heads", "32", "--kv-heads", "8", "--head-dim", "128",
    "--gpu", "l20", "--gpus-per-node", "8",
]  # fmt: skip


class Run:
    """`seqmesh plan` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["seqmesh", "plan", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = self._capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    def json(self, *arguments: str) -> Any:
        code, out, error = self(*arguments, "--json")
        assert (code, error) == (0, "")
        return json.loads(out)
