"""Numbers as people write them: "208K" tokens, "80GiB", "1.23 s", "200 GB/s".

Tokens count in powers of 1024 (208K is 212,992, as in the paper), bytes and rates in powers of 1000; GiB says
so itself.
"""

import math
import re
from fractions import Fraction
from typing import Final

_TOKENS: Final = {"": 1, "K": 1024, "M": 1024**2}
_BYTES: Final = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
_BYTES_1024: Final = {"KIB": 1024, "MIB": 1024**2, "GIB": 1024**3, "TIB": 1024**4}
_NUMBER: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) *([A-Za-z]*)")


def parse_tokens(given: str | int) -> int:
    """Tokens from "8192", "208K" (K = 1024) or "1.5M" (M = 1024²).

    Raises:
        ValueError: anything else, less than one token, or a broken number of tokens.
    """
    remedy = 'write a positive whole number, or one with K (1024) or M (1024²) such as "208K"'
    return _whole("tokens", given, _parse(given, _TOKENS), remedy)


def parse_bytes(given: str | int) -> int:
    """Bytes from "80GiB" (2³⁰), "64GB" (10⁹), "1.5TB" or plain bytes; a broken byte is dropped.

    Raises:
        ValueError: anything else, or less than one byte.
    """
    remedy = 'write a positive amount such as "80GiB" (2³⁰ bytes), "64GB" (10⁹ bytes) or plain bytes'
    amount = _parse(given, _BYTES | _BYTES_1024)
    return _whole("bytes", given, None if amount is None else Fraction(math.floor(amount)), remedy)


def _parse(given: str | int, units: dict[str, int]) -> Fraction | None:
    """The amount exactly, or None if `given` has another form."""
    if isinstance(given, int):
        return None if isinstance(given, bool) else Fraction(given)
    match = _NUMBER.fullmatch(given.strip()) if isinstance(given, str) else None
    unit = units.get(match[2].upper()) if match else None
    return Fraction(match[1]) * unit if match and unit else None


def _whole(what: str, given: str | int, amount: Fraction | None, remedy: str) -> int:
    if amount is None:
        raise ValueError(f"{given!r} is not a number of {what}; {remedy}")
    if amount < 1:
        raise ValueError(f"{given!r} is fewer than one of {what}; {remedy}")
    if amount.denominator != 1:
        raise ValueError(f"{given!r} is not a whole number of {what}; {remedy}")
    return int(amount)


def format_tokens(tokens: int) -> str:
    """As `parse_tokens` reads it back exactly: 212992 -> "208K", 1048576 -> "1M", 30000 -> "30000"."""
    if tokens == 0 or tokens % 1024:
        return str(tokens)
    return f"{tokens // 1024**2}M" if tokens % 1024**2 == 0 else f"{tokens // 1024}K"


def about_tokens(tokens: int) -> str:
    """Two decimals from a million on, for reading: 8912896 -> "8704K (8.5M)"."""
    exact = format_tokens(tokens)
    return f"{exact} ({tokens / 1024**2:.3g}M)" if tokens > 1024**2 and tokens % 1024**2 else exact


def format_bytes(amount: float) -> str:
    """Three digits in decimal units: 81_604_378_624 -> "81.6 GB"."""
    return _prefixed(amount, "B")


def format_rate(per_s: float, unit: str = "B") -> str:
    """Three digits per second: 2e11 -> "200 GB/s"; with unit "FLOP", 1.4726e14 -> "147 TFLOP/s"."""
    return f"{_prefixed(per_s, unit)}/s"


def format_count(count: float) -> str:
    """Three digits: 8030261248 -> "8.03B" (10⁹), 1316928 -> "1.32M"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.9995 * scale:
            return f"{_digits(count / scale)}{unit}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """Three digits below a minute, then the two largest units: "56.0 µs", "1.23 s", "2 min 5 s"."""
    sign, left = _split_sign(seconds)
    if not math.isfinite(left) or left == 0:
        return f"{sign}{left:.0f} s"
    if left < 59.95:  # 60.0 s would be a minute
        return f"{sign}{_short(left)}"
    if round(left) < 3600:
        minutes, rest = divmod(round(left), 60)
        return f"{sign}{minutes} min {rest} s"
    if round(left / 60) < 24 * 60:
        hours, rest = divmod(round(left / 60), 60)
        return f"{sign}{hours} h {rest} min"
    days, rest = divmod(round(left / 3600), 24)
    return f"{sign}{days} d {rest} h"


def _short(seconds: float) -> str:
    """Below a minute; the limits are where three digits would round up to the next unit."""
    if seconds >= 0.9995:
        return f"{_digits(seconds / 1.0)} s"
    if seconds >= 0.9995e-3:
        return f"{_digits(seconds / 1e-3)} ms"
    return f"{_digits(seconds / 1e-6)} µs"


def _split_sign(amount: float) -> tuple[str, float]:
    return ("-", -amount) if amount < 0 else ("", amount)


def _prefixed(amount: float, unit: str) -> str:
    sign, left = _split_sign(amount)
    if not math.isfinite(left) or left == 0:
        return f"{sign}{left:.0f} {unit}"
    power = next((n for n in range(5) if left / 1000**n < 999.5), 5)
    prefix = ("", "K", "M", "G", "T", "P")[power]
    return f"{sign}{_digits(left / 1000**power)} {prefix}{unit}"


def _digits(value: float) -> str:
    """About three significant digits, never an exponent."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
