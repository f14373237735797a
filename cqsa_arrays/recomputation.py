"""One device against another: rows of an output computed again elsewhere, and both held against float64."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np

from .api import attention
from .arguments import whole_number
from .comparison import ErrorReport, compare_rows
from .masks import Causal, Mask
from .ranges import Range
from .reference import reference_rows
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
        """Whether both are within the dtype's tolerance and the stored rows are about as exact as the others."""
        bound = _FACTOR * self.again.frobenius + _SHARE * self.stored.tolerance.frobenius
        return self.stored.passed and self.again.passed and self.stored.frobenius <= bound

    def __str__(self) -> str:
        head = (
            f"{'PASSED' if self.passed else 'FAILED'}: rows {self.rows.start} to {self.rows.stop - 1} against float64"
        )
        lines = [f"  {'':<16}{'Frobenius':>12}{'worst row':>12}{'log-sum-exp':>13}{'NaN or inf':>12}"]
        for name, report in (("stored", self.stored), (f"{self.device} again", self.again)):
            lse = f"{report.lse.error:.3g}" if report.lse is not None else "-"
            errors = f"{report.frobenius:>12.3g}{report.worst_row.error:>12.3g}{lse:>13}"
            lines.append(f"  {name:<16}{errors}{report.mismatches:>12}")
        lines.append(f"  tolerance of this dtype {self.stored.tolerance.frobenius:g}")
        return "\n".join([head, *lines])

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(
            {
                "passed": self.passed, "device": self.device, "rows": [self.rows.start, self.rows.stop],
                "stored": json.loads(self.stored.to_json()), "again": json.loads(self.again.to_json()),
            }
        )  # fmt: skip


def compare_with_device(path: str | os.PathLike[str], device: str, *, rows: int = 256, seed: int = 0) -> PathComparison:
    """Compute ``rows`` neighbouring rows of the output file ``path`` again on ``device`` and compare both with float64.

    The rows begin at a token drawn with ``seed``, in every batch and head. Raises as ``verify`` and ``attention`` do.
    """
    rows = whole_number(rows, "rows", 1, "256 find any systematic error.")
    with ExitStack() as stack:
        found = opened_inputs(os.fspath(path))
        q, k, v = (stack.enter_context(closing(array.source())) for array in found.arrays)
        out, lse = opened_outputs(os.fspath(path), q, v)
        tokens = q.shape[2]
        start = int(np.random.default_rng(seed).integers(0, max(1, tokens - rows + 1)))
        chosen = Range(start, min(start + rows, tokens))
        indices = np.arange(chosen.start, chosen.stop)
        reference = reference_rows(q, k, v, indices, mask=found.mask, scale=found.scale)
        queries = np.empty((*q.shape[:2], len(chosen), q.shape[3]), q.dtype)
        q.read(Range(0, q.shape[0]), Range(0, q.shape[1]), chosen, queries)
        again = attention(
            queries, found.arrays[1], found.arrays[2], mask=_shifted(found.mask, start), scale=found.scale,
            device=device, dtype=out.dtype,
        )  # fmt: skip
        dtype = judged_dtype(out.dtype, q.dtype)
        stored_out, stored_lse = (read_rows(array, indices, stack) for array in (out, lse))
        return PathComparison(
            device,
            chosen,
            compare_rows(stored_out, stored_lse[..., 0], reference, dtype, seed=seed),
            compare_rows(again.astype(np.float64), None, reference, dtype, seed=seed),
        )


def _shifted(mask: Mask, start: int) -> Mask:
    """``mask`` for queries of which row ``start`` comes first."""
    return Causal(mask.offset + start) if isinstance(mask, Causal) else mask
