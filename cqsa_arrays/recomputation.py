"""One device against another: rows of an output computed again elsewhere, and both held against float64."""

from __future__ import annotations

import json
import math
import os
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np

from .api import attention
from .arguments import compute_dtype, whole_number
from .comparison import HEADINGS, ErrorReport, Verdict, compare_rows, worst_verdict
from .masks import Causal, Mask
from .ranges import Range
from .reference import reference_rows
from .storage import Locking
from .tables import html_of_text
from .verification import judged_dtype, opened_inputs, opened_outputs, read_rows

# How many times the error of the other path a result may have, and the share of its tolerance that is always allowed:
# two correct kernels differ in the order of their sums and in what they round, not by more.
_FACTOR = 5.0
_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class PathComparison:
    """The errors, against float64, of rows as they are stored and as ``device`` computes them in the same precision."""

    device: str
    rows: Range
    stored: ErrorReport
    again: ErrorReport

    @property
    def passed(self) -> bool:
        """Whether both pass against float64 and the stored rows are about as exact as the others."""
        return self.verdict == "passed"

    @property
    def verdict(self) -> Verdict:
        """ "failed", "undetermined" or "passed"; what scores lose is another in every path, and not held against it."""
        tolerance = self.stored.tolerance.frobenius
        scores = math.sqrt(max(0.0, (tolerance + self.stored.inherent) ** 2 - tolerance**2))
        bound = math.hypot(_FACTOR * self.again.frobenius + _SHARE * tolerance, scores)
        if not self.stored.frobenius <= bound:
            return "failed"
        return worst_verdict([self.stored.verdict, self.again.verdict])

    def __str__(self) -> str:
        head = f"{HEADINGS[self.verdict]}: rows {self.rows.start} to {self.rows.stop - 1} against float64"
        lines = [f"  {'':<16}{'Frobenius':>12}{'worst row':>12}{'log-sum-exp':>13}{'NaN or inf':>12}"]
        for name, report in (("stored", self.stored), (f"{self.device} again", self.again)):
            lse = f"{report.lse.error:.3g}" if report.lse is not None else "-"
            errors = f"{report.frobenius:>12.3g}{report.worst_row.error:>12.3g}{lse:>13}"
            lines.append(f"  {name:<16}{errors}{report.mismatches:>12}")
        lines.append(f"  tolerance {self.stored.allowed}")
        lines += self.stored.undetermined_lines
        return "\n".join([head, *lines])

    def __repr__(self) -> str:
        return f"<PathComparison {str(self).splitlines()[0]}>"

    def _repr_html_(self) -> str:
        return html_of_text(str(self))

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(
            {
                "passed": self.passed, "verdict": self.verdict, "device": self.device,
                "rows": [self.rows.start, self.rows.stop],
                "stored": json.loads(self.stored.to_json()), "again": json.loads(self.again.to_json()),
            }
        )  # fmt: skip


def compare_with_device(
    path: str | os.PathLike[str], device: str, *, rows: int = 256, seed: int = 0, locking: Locking = None
) -> PathComparison:
    """Compute ``rows`` neighbouring rows of the output file ``path`` again on ``device`` and compare both with float64.

    The rows begin at a token drawn with ``seed``, in every batch and head. Raises as ``verify`` and ``attention`` do.
    """
    rows = whole_number(rows, "rows", 1, "256 find any systematic error.")
    seed = whole_number(seed, "seed", 0, "Leave it out for 0.")
    with ExitStack() as stack:
        found = opened_inputs(os.fspath(path), locking)
        q, k, v = (stack.enter_context(closing(array.source())) for array in found.arrays)
        out, lse = opened_outputs(os.fspath(path), q, v, locking)
        tokens = q.shape[2]
        start = int(np.random.default_rng(seed).integers(0, max(1, tokens - rows + 1)))
        chosen = Range(start, min(start + rows, tokens))
        indices = np.arange(chosen.start, chosen.stop)
        arithmetic = compute_dtype(q.dtype)
        reference = reference_rows(q, k, v, indices, mask=found.mask, scale=found.scale, arithmetic=arithmetic)
        queries = np.empty((*q.shape[:2], len(chosen), q.shape[3]), q.dtype)
        q.read(Range(0, q.shape[0]), Range(0, q.shape[1]), chosen, queries)
        again = attention(
            queries, found.arrays[1], found.arrays[2], mask=_shifted(found.mask, start), scale=found.scale,
            device=device, dtype=out.dtype,
        )  # fmt: skip
        stored_as, again_as = (judged_dtype(out.dtype, q.dtype, where) for where in (found.device, device))
        stored_out, stored_lse = (read_rows(array, indices, stack) for array in (out, lse))
        return PathComparison(
            device,
            chosen,
            compare_rows(stored_out, stored_lse[..., 0], reference, stored_as, seed=seed),
            compare_rows(again.astype(np.float64), None, reference, again_as, seed=seed),
        )


def _shifted(mask: Mask, start: int) -> Mask:
    """``mask`` for queries of which row ``start`` comes first."""
    return Causal(mask.offset + start) if isinstance(mask, Causal) else mask
