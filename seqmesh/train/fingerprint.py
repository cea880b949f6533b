"""Whether two ranks, or two runs, have the same bytes before them, without sending or storing them."""

import hashlib
from collections.abc import Iterable


class Fingerprint:
    """sha256 of parts and their lengths: moving bytes from one part to the next changes it."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def begin(self, length: int) -> None:
        """Begin a part of so many bytes, which `add` then gets."""
        self._digest.update(length.to_bytes(8, "little"))

    def add(self, data: bytes) -> None:
        """Some bytes of the part."""
        self._digest.update(data)

    def part(self, data: bytes) -> None:
        """A whole part."""
        self.begin(len(data))
        self.add(data)

    def hexdigest(self) -> str:
        """Of all that was added."""
        return self._digest.hexdigest()


def fingerprint(parts: Iterable[bytes]) -> str:
    """Of all parts."""
    found = Fingerprint()
    for part in parts:
        found.part(part)
    return found.hexdigest()
