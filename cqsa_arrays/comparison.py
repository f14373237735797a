"""How far one array is from another, and whether that is close enough.

Two measures are judged together. The relative Frobenius error says how exact the whole is, but one wholly wrong row in
a million changes it by only 0.001; the worst row's relative error finds that row. NaN never passes: a place where one
array is NaN or infinite and the other is not, or not alike, counts as an infinite error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .error_report import ElementError, ErrorReport, Index, RowError
from .errors import ArgumentError
from .ranges import Range
from .reference import ReferenceRows
from .storage import as_array, check_comparable, check_open
from .tolerance import (
    HEADINGS,
    TOLERANCES,
    Allowance,
    Tolerance,
    Verdict,
    allowance,
    finite,
    norms,
    row_scale,
    tolerance_of,
    without_scores,
    worst_verdict,
)

__all__ = [
    "HEADINGS",
    "TOLERANCES",
    "ErrorReport",
    "RowError",
    "Tolerance",
    "Verdict",
    "compare",
    "compare_rows",
    "worst_verdict",
]

# Float64 elements of one block: 8 MiB each for the result, the reference and a few temporaries.
_BLOCK_ELEMENTS = 1 << 20
# What every error is larger than.
_NO_ROW, _NO_ELEMENT = RowError((), -1.0), ElementError((), -1.0, 0.0, 0.0)


def compare(out: Any, reference: Any, *, tolerance: Tolerance | float | None = None) -> ErrorReport:
    """The errors of ``out`` against ``reference``: arrays of one shape, read block by block.

    Takes whatever has a shape and slices to NumPy or CuPy arrays (memory maps and h5py datasets too), and arrays of
    other libraries by DLPack; a row is the last axis. ``tolerance``, a relative Frobenius error, is by default that of
    ``out.dtype`` in ``TOLERANCES``, which is for scores of moderate size: two arrays do not say how large they were,
    ``verify`` knows. Raises ArgumentError for different shapes, empty arrays, masked arrays, data sets of closed files
    or that attributes give another meaning, and dtypes without a default tolerance.

    >>> reference = np.linspace(1, 2, 12).reshape(3, 4)
    >>> compare((reference * (1 + 1e-7)).astype(np.float32), reference).passed
    True
    """
    out, reference = _array(out, "out"), _array(reference, "reference")
    if tolerance is None:
        tolerance = tolerance_of(out.dtype)
    elif not isinstance(tolerance, Tolerance):
        tolerance = Tolerance(float(tolerance))
    return _tally(out, reference).report(tolerance, reference.shape[-1])


def compare_rows(
    out: np.ndarray,
    lse: np.ndarray | None,
    reference: ReferenceRows,
    dtype: Any,
    *,
    seed: int | None = None,
    tolerance: float | None = None,
) -> ErrorReport:
    """The errors of chosen rows, ``out`` (B, H, R, Dv) and ``lse`` (B, H, R) if kept, against ``reference_rows``.

    Judged by the tolerance of ``dtype``, a NumPy dtype or its name, in which the result was stored, and by what
    ``reference.rounding`` allows for large scores; ``tolerance`` takes the place of both for the output. Row indices in
    the report are token numbers. ``seed`` is only reported. Raises ArgumentError as ``compare`` does.

    >>> exact = ReferenceRows(np.array([7]), out=np.ones((1, 1, 1, 4)), lse=np.zeros((1, 1, 1)))
    >>> compare_rows(np.zeros((1, 1, 1, 4)), None, exact, "float32").worst_row
    RowError(index=(0, 0, 7), error=1.0, inherent=0.0)
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    limits = tolerance_of(name)
    if tolerance is not None:
        limits = Tolerance(tolerance, limits.lse)
        reference = without_scores(reference)
    allowed = allowance(reference, name, limits)
    got, expected = np.asarray(_array(out, "out"), dtype=np.float64), reference.out
    _check_shape("out", got.shape, expected.shape)
    difference, mismatch = _difference(got, expected)
    difference = np.where(allowed.out_determined[..., None] | mismatch, difference, 0.0)
    determined, lse_error = allowed.out_determined, None
    if lse is not None:
        lse_error = _lse_error(_array(lse, "lse"), reference, allowed)
        determined = determined & allowed.lse_determined
    row_norms, element = norms(difference), _argmax(difference)
    size = norms(np.where(allowed.out_determined, norms(finite(expected)), 0.0).ravel())
    with np.errstate(over="ignore"):  # beyond float64 is infinitely wrong
        row = _worst_row(row_norms / allowed.size, allowed.row, reference.rows)
    return ErrorReport(
        frobenius=_ratio(float(norms(row_norms.ravel())), float(size)),
        worst_row=row,
        worst_element=ElementError(
            _at_token(element, reference.rows), *(float(array[element]) for array in (difference, got, expected))
        ),
        nans=int(np.isnan(got).sum()),
        infs=int(np.isinf(got).sum()),
        mismatches=int(mismatch.sum()),
        rows=row_norms.size,
        tolerance=limits,
        lse=lse_error,
        seed=seed,
        inherent=allowed.frobenius,
        undetermined=int((~determined).sum()),
        arithmetic=reference.arithmetic,
    )


def _worst_row(errors: np.ndarray, inherent: np.ndarray, rows: np.ndarray) -> RowError:
    """The row whose error is furthest above what it may have, by its token number."""
    worst = _argmax(errors - inherent)
    return RowError(_at_token(worst, rows), float(errors[worst]), float(inherent[worst]))


def _at_token(index: Index, rows: np.ndarray) -> Index:
    batch, head, row, *rest = index
    return batch, head, int(rows[row]), *rest


@dataclass(frozen=True, slots=True)
class _Block:
    """The part of an array at ``leading`` indices and a range of the axis after them."""

    leading: Index
    part: Range

    def of(self, array: Any, argument: str) -> np.ndarray:
        """That part of ``array`` as float64 in NumPy; CuPy arrays must be asked with ``get``.

        Raises ArgumentError, naming ``argument``, where elements are masked, as those of netCDF4's variables may be.
        """
        block = array[(*self.leading, self.part.slice)]
        if np.ma.is_masked(block):
            remedy = "Compare what is not masked, or fill it on purpose."
            raise ArgumentError(argument, "masked elements", "an array of numbers", remedy)
        with np.errstate(invalid="ignore"):  # some NaNs of damaged data
            return np.asarray(block.get() if hasattr(block, "get") else block).astype(np.float64, copy=False)

    def place(self, index: Index) -> Index:
        """Where ``index`` of the block is in the array; the row of a one-dimensional block is () there."""
        return (*self.leading, self.part.start + index[0], *index[1:]) if index else self.leading


def _blocks(shape: Index, leading: Index = ()) -> Iterator[_Block]:
    """Pieces of at most _BLOCK_ELEMENTS, which cut the last axis only where one row is longer than that."""
    inner = math.prod(shape[1:])
    if inner <= _BLOCK_ELEMENTS:
        for part in Range(0, shape[0]).split(_BLOCK_ELEMENTS // inner):
            yield _Block(leading, part)
    else:
        for index in range(shape[0]):
            yield from _blocks(shape[1:], (*leading, index))


def _tally(out: Any, reference: Any) -> _Tally:
    _check_shape("out", out.shape, reference.shape)
    tally = _Tally(rows=math.prod(reference.shape[:-1]))
    for block in _blocks(tuple(reference.shape)):
        tally.add(block, block.of(out, "out"), block.of(reference, "reference"))
    return tally


@dataclass(slots=True)
class _Tally:
    """What the blocks seen so far add up to."""

    rows: int
    difference: float = 0.0
    size: float = 0.0
    nans: int = 0
    infs: int = 0
    mismatches: int = 0
    worst_row: RowError = _NO_ROW
    worst_element: ElementError = _NO_ELEMENT

    def add(self, block: _Block, got: np.ndarray, expected: np.ndarray) -> None:
        difference, mismatch = _difference(got, expected)
        difference_norms, size_norms = norms(difference), norms(finite(expected))
        self.difference = math.hypot(self.difference, float(norms(difference_norms.ravel())))
        self.size = math.hypot(self.size, float(norms(size_norms.ravel())))
        self.nans += int(np.isnan(got).sum())
        self.infs += int(np.isinf(got).sum())
        self.mismatches += int(mismatch.sum())

        with np.errstate(over="ignore"):  # beyond float64 is infinitely wrong
            row_errors = difference_norms / row_scale(size_norms)
        row, element = _argmax(row_errors), _argmax(difference)
        if row_errors[row] > self.worst_row.error:
            self.worst_row = RowError(block.place(row), float(row_errors[row]))
        if difference[element] > self.worst_element.error:
            values = (float(array[element]) for array in (difference, got, expected))
            self.worst_element = ElementError(block.place(element), *values)

    def report(self, tolerance: Tolerance, dim: int) -> ErrorReport:
        return ErrorReport(
            frobenius=_ratio(self.difference, self.size),
            worst_row=replace(self.worst_row, inherent=tolerance.row_of(dim) - tolerance.row),
            worst_element=self.worst_element,
            nans=self.nans,
            infs=self.infs,
            mismatches=self.mismatches,
            rows=self.rows,
            tolerance=tolerance,
        )


def _difference(got: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Absolute differences, inf at mismatches, and where those are: not both finite, not the same NaN or inf."""
    alike = (got == expected) | (np.isnan(got) & np.isnan(expected))
    mismatch = ~alike & ~(np.isfinite(got) & np.isfinite(expected))
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf, replaced here; a difference beyond float64 is inf
        difference = np.where(alike, 0.0, np.abs(got - expected))
    return np.where(mismatch, np.inf, difference), mismatch


def _lse_error(lse: Any, reference: ReferenceRows, allowed: Allowance) -> RowError:
    _check_shape("lse", lse.shape, reference.lse.shape)
    difference, mismatch = _difference(np.asarray(lse, dtype=np.float64), reference.lse)
    difference = np.where(allowed.lse_determined | mismatch, difference, 0.0)
    return _worst_row(difference / np.maximum(1.0, np.abs(finite(reference.lse))), allowed.lse, reference.rows)


def _ratio(error: float, size: float) -> float:
    """Relative error; absolute where the reference is 0, and NaN, which fails, where its norm is beyond float64."""
    if size == 0:
        return error
    return error / size if math.isfinite(size) else math.nan


def _argmax(values: np.ndarray) -> Index:
    return tuple(int(i) for i in np.unravel_index(np.argmax(values), values.shape))


def _array(value: Any, argument: str) -> Any:
    """``value``, which slices, or what can be taken over of it."""
    check_open(value, argument)
    check_comparable(value, argument)
    if hasattr(value, "shape") and isinstance(getattr(value, "dtype", None), np.dtype):
        return value
    return as_array(value, argument) if hasattr(value, "__dlpack__") else np.asarray(value)


def _check_shape(argument: str, shape: Index, expected: Index) -> None:
    if tuple(shape) != tuple(expected):
        raise ArgumentError(argument, f"shape {shape}", f"the reference's shape {expected}", "Compare like with like.")
    if not shape or 0 in shape:
        wanted = "at least one axis and one element"
        raise ArgumentError(argument, f"shape {shape}", wanted, "Nothing compared is not a pass.")
