"""Paths as people write them in recipes."""

from pathlib import Path


def expanded(path: str, setting: str, option: str) -> Path:
    """A path whose ~ is the home folder that it names.

    Args:
        path: as it was written.
        setting: how an error begins, before the path.
        option: what to write in full.

    Raises:
        ValueError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{setting}{path!r} names a home folder that does not exist; write {option} in full"
        ) from None
