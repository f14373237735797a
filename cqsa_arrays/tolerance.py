"""How much error a correct result may have: the one place that says so.

Three things add up, row by row (docs/design/exactness.md derives them):

- what the element type and the weights of the products round: the tolerance of the dtype, relative to the row's norm;
- what float32 sums round on their way, relative to the largest that they become;
- what rounded scores do to the weights: nothing beside the other two for scores of moderate size, everything for scores
  so large that rounding one decides which key wins.

Rows of which the last alone may be over ``UNDETERMINED`` of the row are not determined by the arithmetic: no kernel of
that precision can be held to a result, and no result of them is ever a pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import ml_dtypes
import numpy as np

from .errors import ArgumentError
from .wording import Choice, Phrase

if TYPE_CHECKING:
    from .reference import ReferenceRows

# The errors of a row's elements are independent roundings, so that a correct row stays within a few times the whole's
# error, while a row that is wholly wrong is off by about 1. Ten times keeps the two far apart.
_ROW_FACTOR = 10.0

UNDETERMINED = 1e-2
"""The change that rounded scores may make to a row, relative to it, above which nothing can be said of the row."""

# What may be left of the roundings of one score, in units of the sizes that are rounded: four standard deviations.
_DEVIATIONS = 4

SCORE_ERROR = {"float32": _DEVIATIONS * 2.0**-24, "float64": 2 * _DEVIATIONS * 2.0**-53}
"""How well a score is known, relative to the sizes that are rounded; in float64 the reference rounds as well."""

Verdict: TypeAlias = Literal["passed", "undetermined", "failed"]

HEADINGS: dict[Verdict, str] = {"passed": "PASSED", "undetermined": "NOT DETERMINED", "failed": "FAILED"}


def worst_verdict(verdicts: Iterable[Verdict]) -> Verdict:
    """That of several reports together.

    >>> worst_verdict(["passed", "undetermined", "passed"])
    'undetermined'
    """
    return max(verdicts, key=list(HEADINGS).index, default="passed")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What still passes: a relative Frobenius error, ``row_factor`` times it for a single row, one of the log-sum-exp.

    The log-sum-exp's error is relative to max(1, abs(lse)).
    """

    frobenius: float
    lse: float = 5e-6
    row_factor: float = _ROW_FACTOR

    def __post_init__(self) -> None:
        for bound in (self.frobenius, self.lse, self.row_factor):
            if not isinstance(bound, Real) or not bound >= 0:
                raise ArgumentError("tolerance", bound, "a number from 0 on", "Leave it out for that of the dtype.")

    @property
    def row(self) -> float:
        return self.row_factor * self.frobenius

    def row_of(self, dim: int) -> float:
        """That of rows of ``dim`` elements: over few elements the roundings of a row do not average."""
        return max(self.row, min(_ROW_FACTOR, self.row_factor * (1 + 2 / dim)) * self.frobenius)


# By the result's dtype: about twice what a correct kernel that holds all scores in memory shows against float64, that
# is 2.7e-4, 2.2e-3, 1e-6 and 2e-14. The log-sum-exp comes from a float32 state, for float64 from a float64 one. In
# bfloat16 a correct row is off by up to 0.7 %, in float16 by 0.1 %, and a row that is off by 1 % must fail.
TOLERANCES = {
    "float16": Tolerance(6e-4, row_factor=5),
    "bfloat16": Tolerance(5e-3, row_factor=1.5),
    "float32": Tolerance(2e-6),
    "float64": Tolerance(5e-14, lse=1e-13),
}


def tolerance_of(dtype: Any) -> Tolerance:
    """The tolerance of ``dtype``, a NumPy dtype or its name; ArgumentError where it has none."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in TOLERANCES:
        remedy = Phrase.of("To compare others pass ", Choice("tolerance", ...), ".")
        raise ArgumentError("dtype", name, f"one of {', '.join(TOLERANCES)}", remedy)
    return TOLERANCES[name]


@dataclass(frozen=True, slots=True, eq=False)
class Allowance:
    """What each row of a result may be off by; all (batch, heads, R) but ``frobenius``.

    ``size`` is the norm that a row's error is relative to. ``row`` and ``lse`` are allowed beside the tolerance:
    relative to ``size``, and to max(1, abs(lse)); ``frobenius`` for all determined rows together, relative to their
    norm. ``out_determined`` and ``lse_determined`` say whose output and log-sum-exp the arithmetic determines.
    """

    size: np.ndarray
    row: np.ndarray
    lse: np.ndarray
    frobenius: float
    out_determined: np.ndarray
    lse_determined: np.ndarray


def allowance(reference: ReferenceRows, dtype: str, tolerance: Tolerance) -> Allowance:
    """What a result in ``dtype`` may be off by in each row of ``reference``, beside ``tolerance``."""
    own = norms(finite(reference.out))
    dim, rounding = reference.out.shape[-1], reference.rounding
    short = tolerance.row_of(dim) - tolerance.row
    if rounding is None:
        none, every = np.zeros(own.shape), np.ones(own.shape, bool)
        return Allowance(row_scale(own), none + short, none, 0.0, every, every)
    natural = np.maximum(own, rounding.spread)  # of a row whose values cancel: what random signs would have left
    sums = min(1.0, TOLERANCES["float32"].frobenius / tolerance_of(dtype).frobenius)  # 16-bit rows are float32 sums
    # The output's rounding is relative to its norm, that of the weights to the spread: of both, the square mean.
    size = np.maximum(np.hypot(own, rounding.spread) / math.sqrt(2), sums * rounding.running)
    size = np.where(np.isfinite(size), size, own)
    lost = rounding.out + np.where(natural > 0, math.sqrt(dim) * _smallest(dtype) / 2, 0.0)
    determined = lost <= UNDETERMINED * natural
    lse_size = np.maximum(1.0, np.abs(finite(reference.lse)))
    scale = np.where(size > 0, size, row_scale(own))
    return Allowance(
        size=scale,
        row=lost / scale + short,
        lse=rounding.lse / lse_size,
        frobenius=_of_all(own[determined], size[determined], lost[determined], tolerance.frobenius),
        out_determined=determined,
        lse_determined=rounding.lse <= UNDETERMINED * lse_size,
    )


def without_scores(reference: ReferenceRows) -> ReferenceRows:
    """``reference`` with nothing allowed for the scores of a row's output."""
    if reference.rounding is None:
        return reference
    return replace(reference, rounding=replace(reference.rounding, out=np.zeros(reference.lse.shape)))


def _of_all(own: np.ndarray, size: np.ndarray, lost: np.ndarray, tolerance: float) -> float:
    """What is allowed beside ``tolerance`` for the error of rows of norms ``own`` together, relative to their norm.

    ``lost`` is as many standard deviations of independent errors as one row may be off by. The sum of their squares
    stays within as many of its own: one row that outweighs all others may be off by all of them, many rows hardly more
    than by one.
    """
    whole = float(norms(own)) if own.size else 0.0
    whole = whole if 0 < whole < math.inf else 1.0
    variance = np.square(lost / whole / _DEVIATIONS)
    scores = math.sqrt(variance.sum() + (_DEVIATIONS**2 - 1) * math.sqrt(np.square(variance).sum()))
    sizes = float(norms(size / whole)) if size.size else 0.0
    return max(0.0, math.hypot(tolerance * sizes, scores) - tolerance)


def row_scale(sizes: np.ndarray) -> np.ndarray:
    """What each row's error is relative to: its norm, or the median of the nonzero ones beside it; 1 if all are 0."""
    ordered = np.sort(np.atleast_1d(sizes), axis=-1)
    zeros = (ordered == 0).sum(axis=-1, keepdims=True)
    middle = np.minimum((zeros + ordered.shape[-1]) // 2, ordered.shape[-1] - 1)
    scale = np.maximum(sizes, np.take_along_axis(ordered, middle, axis=-1)).reshape(sizes.shape)
    return np.where((scale == 0) | np.isinf(scale), 1.0, scale)


def norms(values: np.ndarray) -> np.ndarray:
    """Euclidean norms along the last axis, of any magnitude: scaled so that squares neither overflow nor vanish."""
    largest = np.abs(values).max(axis=-1, keepdims=True)
    scale = np.where((largest == 0) | np.isinf(largest), 1.0, largest)
    with np.errstate(over="ignore"):
        return scale[..., 0] * np.sqrt(np.square(values / scale).sum(axis=-1))


def finite(values: np.ndarray) -> np.ndarray:
    """``values`` with 0 for NaN and infinities."""
    return np.where(np.isfinite(values), values, 0.0)


def _smallest(dtype: str) -> float:
    """The distance of the numbers of ``dtype`` nearest to 0."""
    return float(ml_dtypes.finfo(np.dtype(dtype)).smallest_subnormal)
