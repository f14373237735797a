"""Values of options as people write them; which of them can be used is for the library to say."""

from __future__ import annotations

import argparse
import math

from ..errors import ArgumentError
from ..units import parse_count, parse_seconds

DTYPE_NAMES = {
    "half": "float16", "f2": "float16", "fp16": "float16", "bf16": "bfloat16", "single": "float32", "f4": "float32",
    "fp32": "float32", "double": "float64", "f8": "float64", "fp64": "float64",
}  # fmt: skip

LOCKING: dict[str, bool | str] = {"on": True, "off": False, "best-effort": "best-effort"}


def whole(text: str) -> int:
    """A whole number, also one like "10k" or "1e5"."""
    try:
        return parse_count(text)
    except ValueError as error:
        expected = "expected a whole number, such as 512, 10k or 1e5"
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}; {expected}") from error


def rows(text: str) -> int | None:
    """A number of rows; None for "all"."""
    try:
        return None if text == "all" else parse_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text!r}: expected a whole number or "all"') from error


def seconds(text: str) -> float:
    """A time such as "90s" or "8h"."""
    try:
        return parse_seconds(text, "time")
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(f"found {error.found}; expected {error.expected}") from error


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, such as 0.125 or 1e-3") from error


def tolerance(text: str) -> float:
    """A number of at least 0, or infinity: then only the report is wanted."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not found >= 0:  # NaN, too
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, at least 0, such as 1e-6")
    return found


def dtype(text: str) -> str:
    """An element type by the name that it has here, if it is one."""
    return DTYPE_NAMES.get(text.lower(), text)


def locking(text: str) -> bool | str:
    """Whether HDF5 files are locked."""
    if text not in LOCKING:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {', '.join(LOCKING)}")
    return LOCKING[text]
