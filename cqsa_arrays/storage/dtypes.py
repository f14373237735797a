"""The four element types of attention arrays, and which arrays are refused for theirs."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ..errors import ArgumentError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SUPPORTED = {dtype.name: dtype for dtype in (np.dtype("f2"), BFLOAT16, np.dtype("f4"), np.dtype("f8"))}
NAMES = ", ".join(SUPPORTED)

PIECE_BYTES = 1 << 20
"""The most bytes that are converted at a time, so that a change of type never needs a large temporary."""


def element_dtype(dtype: np.dtype, argument: str) -> np.dtype:
    """``dtype`` itself if attention can be computed from arrays of it.

    Raises ArgumentError, naming ``argument``, for integers, booleans, complex numbers, objects and big-endian floats.

    >>> element_dtype(np.dtype("float32"), "q")
    dtype('float32')
    """
    if SUPPORTED.get(dtype.name) == dtype:
        return dtype
    if dtype.newbyteorder("=") in SUPPORTED.values():
        remedy = f"Convert it once: {argument}.astype({argument}.dtype.newbyteorder('='))."
        raise ArgumentError(argument, f"{dtype.newbyteorder('=')} of the other byte order ({dtype.str})", NAMES, remedy)
    if dtype == np.uint16:
        remedy = f"If it holds bfloat16 bits, pass {argument}.view(ml_dtypes.bfloat16)."
    else:
        remedy = f"Convert it on purpose, for example {argument}.astype('float32')."
    raise ArgumentError(argument, f"dtype {dtype}", NAMES, remedy)


def check_widening(stored: np.dtype, compute: np.dtype, label: str) -> None:
    """Raise ArgumentError where reading ``stored`` elements as ``compute`` would lose digits."""
    if not np.can_cast(stored, compute, "safe"):
        remedy = f"Compute in {stored}, or convert the input on purpose."
        raise ArgumentError(label, f"{stored} elements read as {compute}", "a compute type at least as wide", remedy)


def copy_elements(out: np.ndarray, block: np.ndarray) -> None:
    """Copy ``block`` to ``out``, of the same kind: NaN are data like others, of which a signalling one would warn."""
    with np.errstate(invalid="ignore"):
        np.copyto(out, block, casting="same_kind")


def piece_rows(row_bytes: int) -> int:
    """How many rows of ``row_bytes`` one conversion piece holds: at least one.

    >>> piece_rows(256)
    4096
    """
    return max(1, PIECE_BYTES // max(1, row_bytes))
