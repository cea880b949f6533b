"""Wrong input, for tests of what the planner is told: files to write, and how they are refused."""

import re
from pathlib import Path
from typing import Any

import pytest


def refused(what: str, call: Any, *arguments: Any) -> None:
    """The call ends in one line that holds `what`."""
    with pytest.raises(ValueError, match=re.escape(what)) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), f"no remedy in: {caught.value}"


def toml(folder: Path, text: str, name: str = "lab.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name
