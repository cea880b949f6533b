"""Bytes and counts as people read them."""


def in_parameters(count: int, trained: int | None = None) -> str:
    """Parameters of a model, and how many of them train if not all do."""
    text = f"{count / 1e6:,.2f} M parameters"
    return text if trained in (None, count) else f"{text}, of which {trained / 1e6:,.2f} M train"


def in_bytes(count: float) -> str:
    """What is sent: decimal units, as networks are rated."""
    return _scaled(count, 1000, ("B", "kB", "MB", "GB", "TB"))


def in_memory(count: float) -> str:
    """What is held: binary units, as memory is sold."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(count: float, step: int, units: tuple[str, ...]) -> str:
    place = 0
    while count >= 999.5 and place < len(units) - 1:
        count /= step
        place += 1
    return f"{count:.3g} {units[place]}"
