"""Files of a checkpoint: their sizes and checksums, and the description that has them.

Whatever is not as it was saved is one line that names the file.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

PROGRESS = "progress.json"
METADATA = ".metadata"
"""PyTorch's description of what is where."""
_CHUNK_BYTES = 1 << 24
"""Of a file that is checksummed."""


def checksums_of(folder: Path, rank: int | None = None) -> dict[str, tuple[int, int]]:
    """Size in bytes and CRC-32 of the files that a rank wrote, or of their description."""
    paths = [folder / METADATA] if rank is None else list(folder.glob(f"__{rank}_*"))
    return {path.name: (path.stat().st_size, _crc32(path)) for path in paths}


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def check_size(path: Path, size: int) -> None:
    """Raise ValueError for a file of another size than was saved."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from None
    if found != size:
        raise damaged(path, f"has {found} bytes where {size} were saved")


def check_sum(path: Path, checksum: int) -> None:
    """Raise ValueError for a file of another CRC-32 than was saved. Reads all of it."""
    try:
        found = _crc32(path)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from None
    if found != checksum:
        raise damaged(path, "has another checksum than what was saved")


def damaged(path: Path, what: str) -> ValueError:
    """The error of a file that is not what was saved, with what is wrong and what to do."""
    return ValueError(
        f"{str(path)!r} {what}; restore the file, or remove its folder to use the checkpoint before it"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; ValueError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from None
    except ValueError:
        raise damaged(path, "is not what was saved") from None
    if not isinstance(found, dict):
        raise damaged(path, "is not what was saved")
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object, on disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
