"""What the sections of a recipe share: how pydantic reads them, and how their checks speak."""

import math
from typing import Any

STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}
"""How pydantic reads a section: no unknown key, no conversion between types.

An int is a float, nothing else is anything else.
"""


def require(rule: bool, message: str) -> None:
    """Raise ValueError with the message where a rule is broken."""
    if not rule:
        raise ValueError(message)


def at_least(section: str, config: object, **least: float) -> None:
    """Raise ValueError for the first field of a section that is below its least value, or not a number."""
    for name, bound in least.items():
        value = getattr(config, name)
        # Python's integers have no end, PyTorch's have 64 bits.
        if isinstance(value, int):
            require(
                bound <= value < 2**63,
                f"{section}.{name}={value}: use a value of at least {bound} and below 2^63",
            )
        else:
            require(
                math.isfinite(value) and value >= bound,
                f"{section}.{name}={value}: use a finite value of at least {bound}",
            )
