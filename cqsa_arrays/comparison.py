"""How far one array is from another, and whether that is close enough.

Two measures are judged together. The relative Frobenius error says how exact the whole is, but one wholly wrong row in
a million changes it by only 0.001; the worst row's relative error finds that row. NaN never passes: a place where one
array is NaN or infinite and the other is not, or not alike, counts as an infinite error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from .errors import ArgumentError
from .ranges import Range
from .reference import ReferenceRows

Index = tuple[int, ...]

# Float64 elements of one block: 8 MiB each for the result, the reference and a few temporaries.
_BLOCK_ELEMENTS = 1 << 20

# The errors of a row's elements are independent roundings, so that a correct row stays within a few times the whole's
# error, while a row that is wholly wrong is off by about 1. Ten times keeps the two far apart in every dtype.
_ROW_FACTOR = 10


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What still passes: a relative Frobenius error, ten times it for a single row, and an error of the log-sum-exp."""

    frobenius: float
    lse: float = 5e-6

    def __post_init__(self) -> None:
        for bound in (self.frobenius, self.lse):
            if not isinstance(bound, Real) or not bound >= 0:
                raise ArgumentError("tolerance", bound, "a number from 0 on", "Leave it out for that of the dtype.")

    @property
    def row(self) -> float:
        return _ROW_FACTOR * self.frobenius


# By the result's dtype: about twice what a correct kernel that holds all scores in memory shows against float64, that
# is 2.7e-4, 2.2e-3, 1e-6 and 2e-14. The log-sum-exp comes from a float32 state, for float64 from a float64 one.
TOLERANCES = {
    "float16": Tolerance(6e-4),
    "bfloat16": Tolerance(5e-3),
    "float32": Tolerance(2e-6),
    "float64": Tolerance(5e-14, lse=1e-13),
}


@dataclass(frozen=True, slots=True)
class RowError:
    """The row with the largest error; ``index`` is (batch, head, row) for attention outputs."""

    index: Index
    error: float


@dataclass(frozen=True, slots=True)
class ElementError:
    """The element with the largest absolute error."""

    index: Index
    error: float
    got: float
    expected: float


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """The errors of a result against a reference.

    ``frobenius`` is the norm of the difference over the norm of the reference. A row's error is the norm of its
    difference over the norm of its reference row, or over the median norm of its neighbours (rows that are not 0, along
    the last axis but one) where that is larger: a row that is small because its values cancel is not wrong for having
    the rounding error of the values. Where the reference is 0 throughout, errors are absolute. ``nans`` and ``infs``
    count the result's elements; ``mismatches`` the places where result and reference are neither both finite nor the
    same NaN or infinity. ``lse`` is the largest error of the log-sum-exp relative to max(1, abs(lse)), None where it
    was not compared; ``seed`` is the one that sampled the rows.
    """

    frobenius: float
    worst_row: RowError
    worst_element: ElementError
    nans: int
    infs: int
    mismatches: int
    rows: int
    tolerance: Tolerance
    lse: RowError | None = None
    seed: int | None = None

    @property
    def passed(self) -> bool:
        """Whether every error is within its tolerance; a NaN error is not."""
        return (
            self.mismatches == 0
            and self.frobenius <= self.tolerance.frobenius
            and self.worst_row.error <= self.tolerance.row
            and (self.lse is None or self.lse.error <= self.tolerance.lse)
        )

    def __str__(self) -> str:
        sampled = "" if self.seed is None else f", sampled with seed {self.seed}"
        row, element = self.worst_row, self.worst_element
        lines = [
            f"{'PASSED' if self.passed else 'FAILED'}: relative Frobenius error {self.frobenius:.3g} "
            f"(tolerance {self.tolerance.frobenius:g}) over {self.rows} rows{sampled}",
            f"  worst row {row.index}: relative error {row.error:.3g} (tolerance {self.tolerance.row:g})",
            f"  worst element {element.index}: off by {element.error:.3g}, got {element.got:.9g}, "
            f"expected {element.expected:.9g}",
            f"  not finite: {self.nans} NaN, {self.infs} inf; {self.mismatches} not as in the reference",
        ]
        if self.lse is not None:
            lse_tolerance = f"(tolerance {self.tolerance.lse:g})"
            lines.append(f"  log-sum-exp, worst at {self.lse.index}: error {self.lse.error:.3g} {lse_tolerance}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """One JSON object: the fields and ``passed``; errors that are not finite become the text "nan" or "inf"."""
        fields = {"passed": self.passed, **asdict(self)}
        fields["tolerance"]["row"] = self.tolerance.row
        return json.dumps(_json_safe(fields), allow_nan=False)


def compare(out: Any, reference: Any, *, tolerance: Tolerance | float | None = None) -> ErrorReport:
    """The errors of ``out`` against ``reference``: arrays of one shape, read block by block.

    Takes whatever has a shape and slices to NumPy or CuPy arrays (memory maps and h5py datasets too); a row is the last
    axis. ``tolerance``, a relative Frobenius error, is by default that of ``out.dtype`` in ``TOLERANCES``. Raises
    ArgumentError for different shapes, empty arrays, and dtypes without a default tolerance.

    >>> reference = np.linspace(1, 2, 12).reshape(3, 4)
    >>> compare((reference * (1 + 1e-7)).astype(np.float32), reference).passed
    True
    """
    out, reference = _array(out), _array(reference)
    if tolerance is None:
        tolerance = _tolerance_of(out.dtype)
    elif not isinstance(tolerance, Tolerance):
        tolerance = Tolerance(float(tolerance))
    return _tally(out, reference).report(tolerance)


def compare_rows(
    out: np.ndarray, lse: np.ndarray | None, reference: ReferenceRows, dtype: Any, *, seed: int | None = None
) -> ErrorReport:
    """The errors of chosen rows, ``out`` (B, H, R, Dv) and ``lse`` (B, H, R) if kept, against ``reference_rows``.

    Judged by the tolerance of ``dtype``, a NumPy dtype or its name, in which the result was stored; row indices in the
    report are token numbers. ``seed`` is only reported. Raises ArgumentError as ``compare`` does.

    >>> exact = ReferenceRows(np.array([7]), out=np.ones((1, 1, 1, 4)), lse=np.zeros((1, 1, 1)))
    >>> compare_rows(np.zeros((1, 1, 1, 4)), None, exact, "float16").worst_row
    RowError(index=(0, 0, 7), error=1.0)
    """
    report = _tally(_array(out), reference.out).report(_tolerance_of(dtype))
    lse_error = None if lse is None else _lse_error(_array(lse), reference.lse)

    def at_token(error: Any) -> Any:
        batch, head, row, *rest = error.index
        return replace(error, index=(batch, head, int(reference.rows[row]), *rest))

    return replace(
        report,
        worst_row=at_token(report.worst_row),
        worst_element=at_token(report.worst_element),
        lse=None if lse_error is None else at_token(lse_error),
        seed=seed,
    )


@dataclass(frozen=True, slots=True)
class _Block:
    """The part of an array at ``leading`` indices and a range of the axis after them."""

    leading: Index
    part: Range

    def of(self, array: Any) -> np.ndarray:
        """That part of ``array`` as float64 in NumPy; CuPy arrays must be asked with ``get``."""
        block = array[(*self.leading, self.part.slice)]
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
        tally.add(block, block.of(out), block.of(reference))
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
    worst_row: RowError = RowError((), -1.0)
    worst_element: ElementError = ElementError((), -1.0, 0.0, 0.0)

    def add(self, block: _Block, got: np.ndarray, expected: np.ndarray) -> None:
        difference, mismatch = _difference(got, expected)
        difference_norms, size_norms = _norms(difference), _norms(_finite(expected))
        self.difference = math.hypot(self.difference, float(_norms(difference_norms.ravel())))
        self.size = math.hypot(self.size, float(_norms(size_norms.ravel())))
        self.nans += int(np.isnan(got).sum())
        self.infs += int(np.isinf(got).sum())
        self.mismatches += int(mismatch.sum())

        with np.errstate(over="ignore"):  # beyond float64 is infinitely wrong
            row_errors = difference_norms / _row_scale(size_norms)
        row, element = _argmax(row_errors), _argmax(difference)
        if row_errors[row] > self.worst_row.error:
            self.worst_row = RowError(block.place(row), float(row_errors[row]))
        if difference[element] > self.worst_element.error:
            values = (float(array[element]) for array in (difference, got, expected))
            self.worst_element = ElementError(block.place(element), *values)

    def report(self, tolerance: Tolerance) -> ErrorReport:
        return ErrorReport(
            frobenius=_ratio(self.difference, self.size),
            worst_row=self.worst_row,
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


def _lse_error(lse: Any, expected: np.ndarray) -> RowError:
    _check_shape("lse", lse.shape, expected.shape)
    difference, _ = _difference(np.asarray(lse, dtype=np.float64), expected)
    error = difference / np.maximum(1.0, np.abs(_finite(expected)))
    worst = _argmax(error)
    return RowError(worst, float(error[worst]))


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, 0.0)


def _norms(values: np.ndarray) -> np.ndarray:
    """Euclidean norms along the last axis, of any magnitude: scaled so that squares neither overflow nor vanish."""
    largest = np.abs(values).max(axis=-1, keepdims=True)
    scale = np.where((largest == 0) | np.isinf(largest), 1.0, largest)
    with np.errstate(over="ignore"):
        return scale[..., 0] * np.sqrt(np.square(values / scale).sum(axis=-1))


def _row_scale(norms: np.ndarray) -> np.ndarray:
    """What each row's error is relative to: its norm, or the median of the nonzero ones beside it; 1 if all are 0."""
    ordered = np.sort(np.atleast_1d(norms), axis=-1)
    zeros = (ordered == 0).sum(axis=-1, keepdims=True)
    middle = np.minimum((zeros + ordered.shape[-1]) // 2, ordered.shape[-1] - 1)
    scale = np.maximum(norms, np.take_along_axis(ordered, middle, axis=-1)).reshape(norms.shape)
    return np.where((scale == 0) | np.isinf(scale), 1.0, scale)


def _ratio(error: float, size: float) -> float:
    """Relative error; absolute where the reference is 0, and NaN, which fails, where its norm is beyond float64."""
    if size == 0:
        return error
    return error / size if math.isfinite(size) else math.nan


def _argmax(values: np.ndarray) -> Index:
    return tuple(int(i) for i in np.unravel_index(np.argmax(values), values.shape))


def _array(value: Any) -> Any:
    return value if hasattr(value, "shape") and hasattr(value, "dtype") else np.asarray(value)


def _check_shape(argument: str, shape: Index, expected: Index) -> None:
    if tuple(shape) != tuple(expected):
        raise ArgumentError(argument, f"shape {shape}", f"the reference's shape {expected}", "Compare like with like.")
    if not shape or 0 in shape:
        wanted = "at least one axis and one element"
        raise ArgumentError(argument, f"shape {shape}", wanted, "Nothing compared is not a pass.")


def _tolerance_of(dtype: Any) -> Tolerance:
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in TOLERANCES:
        raise ArgumentError("dtype", name, f"one of {', '.join(TOLERANCES)}", "Pass tolerance= to compare others.")
    return TOLERANCES[name]


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
