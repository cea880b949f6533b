"""Where a figure comes from: machine, versions, commit and command. A number without them means nothing."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        cpu = next(models, cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(), **versions()}


def versions() -> dict[str, str]:
    """Of what a run computes with."""
    packages = {package: _version(package) for package in ("seqmesh", "torch", "transformers")}
    return {"python": platform.python_version(), **packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # of a source tree on the path
        return "not installed"


def commit() -> str | None:
    """Of the source tree this package runs from; None for an installed package."""
    try:
        asked = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode != 0:
        return None
    return asked.stdout.strip() or None


def this_command() -> str:
    """How this process was started, without the folder of its executable."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
