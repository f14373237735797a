"""Amounts as people write them: bytes "512MiB" or "1G", counts "10k" or "1e5", seconds "90s"; and as they read them."""

from __future__ import annotations

import re
from fractions import Fraction
from numbers import Integral, Real

from .errors import ArgumentError
from .wording import Choice, Phrase

# A letter alone is binary, as to dd, docker, java and SLURM.
_FACTORS = {"": 1, "B": 1} | {
    f"{letter}{rest}": 10 ** (3 * power) if rest == "B" else 1 << (10 * power)
    for power, letter in enumerate("KMGT", start=1)
    for rest in ("", "I", "IB", "B")
}
_PATTERN = re.compile(r"\s*(\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})\s*([A-Za-z]*)\s*", re.ASCII)

_COUNT = re.compile(
    r"\s*([+-]?)(\d{1,3}(?:_\d{3}){0,12}|\d{1,40})(\.\d{1,30})?(?:e\+?(\d{1,2}))?\s*([kMGT]?)\s*",
    re.ASCII | re.IGNORECASE,
)
_THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

_UNITS_S = {"": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "hr": 3600, "d": 86400}
_TIME = re.compile(r"\s*(\d{1,15}(?:\.\d{0,15})?|\.\d{1,15})\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(value: int | str, argument: str) -> int:
    """Whole bytes of ``value``: an int, or text such as "512MiB", "1.5 GiB" or "2GB"; "1G" and "1Gi" are "1GiB".

    Raises ArgumentError, naming ``argument``, for anything else and for less than one byte.

    >>> parse_bytes("1.5 KiB", "memory"), parse_bytes("1K", "memory"), parse_bytes("1KB", "memory")
    (1536, 1024, 1000)
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
        "a positive number of bytes, as an int or as text with B, KiB, MiB, GiB, TiB (or K, M, G, T), KB, MB, GB or TB"
        ' ("512MiB")',
        Phrase.of("Pass for example ", Choice(argument, "2GiB"), "."),
    )


def parse_count(text: str) -> int:
    """The whole number that ``text`` says: "100000", "100_000", "1e5", "100k" or "0.1M". ValueError for other text.

    >>> parse_count("1e5"), parse_count("10k"), parse_count("-3"), parse_count("1.5M")
    (100000, 10000, -3, 1500000)
    """
    if match := _COUNT.fullmatch(text):
        sign, whole, part, power, letter = match.groups(default="")
        number = Fraction(whole.replace("_", "") + part) * 10 ** int(power or 0) * _THOUSANDS[letter.upper()]
        if number.denominator == 1:
            return -int(number) if sign == "-" else int(number)
    raise ValueError(f"not a whole number: {text!r}")


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
    remedy = Phrase.of("Pass for example ", Choice(argument, "10min"), ".")
    raise ArgumentError(argument, repr(value), expected, remedy)


def counted(count: int, what: str) -> str:
    """``count`` and ``what``, in the plural where it must be.

    >>> counted(1, "budget"), counted(2048, "task")
    ('1 budget', '2,048 tasks')
    """
    return f"{count:,} {what}{'s' * (count != 1)}"


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
