"""What a comparison finds: errors, what they may be, and whether they are within it, as text, HTML and JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from .tables import html_of_text
from .tolerance import HEADINGS, UNDETERMINED, Tolerance, Verdict
from .units import counted

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowError:
    """The worst row, (batch, head, row) for attention outputs, its error, and what it may have beside the tolerance.

    ``inherent`` is what rounding its scores can do in any kernel of that precision. The worst row is the one whose
    error is furthest above it.
    """

    index: Index
    error: float
    inherent: float = 0.0


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

    Where the scores are known (``verify``), a row's error is relative to its own norm, or to what it would be without
    cancellation; ``inherent`` is what rounded scores may add to ``frobenius``. ``undetermined`` counts the rows that
    they may change by over 1 % in any kernel of that ``arithmetic``: those are no part of the errors, and never pass.
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
    inherent: float = 0.0
    undetermined: int = 0
    arithmetic: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every row is determined and every error within its tolerance; a NaN error is not."""
        return self.verdict == "passed"

    @property
    def verdict(self) -> Verdict:
        """ "failed" where an error is above its tolerance, "undetermined" where none is but some rows say nothing."""
        within = (
            self.mismatches == 0
            and self.frobenius <= self.tolerance.frobenius + self.inherent
            and self.worst_row.error <= self.tolerance.row + self.worst_row.inherent
            and (self.lse is None or self.lse.error <= self.tolerance.lse + self.lse.inherent)
        )
        if not within:
            return "failed"
        return "undetermined" if self.undetermined else "passed"

    @property
    def allowed(self) -> str:
        """The tolerance of the relative Frobenius error, as text."""
        return _sum(self.tolerance.frobenius, self.inherent)

    @property
    def undetermined_lines(self) -> list[str]:
        """The line that tells of rows that are not determined, where there are any."""
        if not self.undetermined:
            return []
        return [
            f"  not determined by {self.arithmetic}: {self.undetermined} of {self.rows} rows; their scores are so"
            f" large that rounding them may change the result by over {100 * UNDETERMINED:g} % in any kernel"
        ]

    def __str__(self) -> str:
        sampled = "" if self.seed is None else f", sampled with seed {self.seed}"
        row, element = self.worst_row, self.worst_element
        lines = [
            f"{HEADINGS[self.verdict]}: relative Frobenius error {self.frobenius:.3g} "
            f"(tolerance {self.allowed}) "
            f"over {counted(self.rows - self.undetermined, 'row')}{sampled}",
            f"  worst row {row.index}: relative error {row.error:.3g} "
            f"(tolerance {_sum(self.tolerance.row, row.inherent)})",
            f"  worst element {element.index}: off by {element.error:.3g}, got {element.got:.9g}, "
            f"expected {element.expected:.9g}",
            f"  not finite: {self.nans} NaN, {self.infs} inf; {self.mismatches} not as in the reference",
        ]
        if self.lse is not None:
            lse_tolerance = f"(tolerance {_sum(self.tolerance.lse, self.lse.inherent)})"
            lines.append(f"  log-sum-exp, worst at {self.lse.index}: error {self.lse.error:.3g} {lse_tolerance}")
        return "\n".join([*lines, *self.undetermined_lines])

    def __repr__(self) -> str:
        return f"<ErrorReport {str(self).splitlines()[0]}>"

    def _repr_html_(self) -> str:
        return html_of_text(str(self))

    def to_json(self) -> str:
        """One JSON object: the fields, ``passed`` and ``verdict``; errors that are not finite become "nan" or "inf"."""
        fields = {"passed": self.passed, "verdict": self.verdict, **asdict(self)}
        tolerance = self.tolerance
        fields["tolerance"] = {"frobenius": tolerance.frobenius, "row": tolerance.row, "lse": tolerance.lse}
        return json.dumps(_json_safe(fields), allow_nan=False)


def _sum(tolerance: float, inherent: float) -> str:
    """A tolerance, and what scores add to it where that is not little beside it."""
    return f"{tolerance:g} + {inherent:.2g} for its scores" if inherent > tolerance / 2 else f"{tolerance:g}"


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
