"""Bytes: written by people as "512MiB", kept by the code as whole bytes."""

from __future__ import annotations

import re
from fractions import Fraction
from numbers import Integral, Real

from .errors import ArgumentError

_FACTORS = {
    "": 1, "B": 1,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_PATTERN = re.compile(r"\s*(\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})\s*([A-Za-z]*)\s*", re.ASCII)

_UNITS_S = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400}
_TIME = re.compile(r"\s*(\d{1,15}(?:\.\d{0,15})?|\.\d{1,15})\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(value: int | str, argument: str) -> int:
    """Whole bytes of ``value``: an int, or text such as "512MiB", "1.5 GiB" or "2GB".

    Raises ArgumentError, naming ``argument``, for anything else and for less than one byte.

    >>> parse_bytes("1.5 KiB", "memory")
    1536
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        if value >= 1:
            return int(value)
    elif isinstance(value, str):
        match = _PATTERN.fullmatch(value)
        factor = _FACTORS.get(match[2].upper()) if match else None
        if match and factor is not None and (size := int(Fraction(match[1]) * factor)) >= 1:
            return size
    raise ArgumentError(
        argument,
        repr(value),
        'a positive number of bytes, as an int or as text with B, KiB, MiB, GiB, TiB, KB, MB, GB or TB ("512MiB")',
        f"Pass for example {argument}='2GiB'.",
    )


def parse_seconds(value: float | str, argument: str) -> float:
    """Seconds of ``value``: a number of at least 0, or text such as "90s", "10min", "8h" or "2d".

    Raises ArgumentError, naming ``argument``, for anything else.

    >>> parse_seconds("1.5h", "max_time")
    5400.0
    """
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match and match[2].lower() in _UNITS_S:
        return float(match[1]) * _UNITS_S[match[2].lower()]
    if isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return float(value)
    expected = 'seconds as a number of at least 0, or text with s, min, h or d ("90s", "8h")'
    raise ArgumentError(argument, repr(value), expected, f"Pass for example {argument}='10min'.")


def format_bytes(size_bytes: float) -> str:
    """``size_bytes`` for people, in binary units.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size_bytes) >= 1023.5 and len(units) > 1:
        size_bytes /= 1024
        units.pop(0)
    unit = units[0]
    return f"{size_bytes:.0f} {unit}" if unit == "B" or size_bytes >= 1000 else f"{size_bytes:.4g} {unit}"


def format_seconds(elapsed_s: float) -> str:
    """``elapsed_s`` for people.

    >>> format_seconds(3725)
    '1 h 2 min'
    """
    if elapsed_s < 59.95:
        return f"{elapsed_s:.3g} s"
    minutes, hours, days = elapsed_s / 60, elapsed_s / 3600, elapsed_s / 86400
    if minutes < 60:
        return f"{int(minutes)} min {int(elapsed_s % 60)} s"
    if hours < 48:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{days:.3g} days"
