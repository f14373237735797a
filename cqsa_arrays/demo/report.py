"""What the demonstration found, for people and for JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from ..comparison import HEADINGS, ErrorReport, Verdict
from ..errors import one_line
from ..tables import html_of_text
from ..units import counted, format_bytes, format_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalReport:
    """Signal-to-noise ratios in dB against the recording before noise was added.

    The recording has noise of its own, which counts as error where it is removed. ``smoothed_db`` is that of a moving
    average of ``smoothed_width`` samples, the best width for this recording, chosen with the clean signal. The
    attention sees the noisy signal only, but the constants of nonlocal_means were tried out on this recording, too.
    """

    samples: int
    sampling_hz: float
    noisy_db: float
    smoothed_db: float
    smoothed_width: int
    denoised_db: float
    noise_mv: float
    bandwidth_mv: float
    window: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Bytes: the budget, the plan's bound, the measured increase (None: not measured) and the float32 score matrix."""

    budget_bytes: int
    planned_bytes: int
    peak_bytes: int | None
    score_matrix_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """The result of ``run_demo``: ``print`` shows it, ``to_json`` keeps it.

    ``error`` judges sampled rows of the attention against float64. ``plot`` is the picture's path, or None, and then
    ``notice`` may say why.
    """

    signal: SignalReport
    memory: MemoryReport
    error: ErrorReport
    elapsed_s: float
    flops: int
    plot: str | None
    notice: str | None

    @property
    def passed(self) -> bool:
        """Whether the result is exact, and was made within the budget."""
        return self.verdict == "passed"

    @property
    def verdict(self) -> Verdict:
        """ "failed" where the budget was not kept, else that of the result."""
        peak = self.memory.peak_bytes
        kept = peak is None or peak <= self.memory.budget_bytes
        return self.error.verdict if kept else "failed"

    def to_json(self) -> str:
        """One JSON object: the fields and ``passed``."""
        error = json.loads(self.error.to_json())
        return json.dumps({"passed": self.passed, **asdict(self), "error": error})

    def __str__(self) -> str:
        s, m = self.signal, self.memory
        peak = "not measured here" if m.peak_bytes is None else f"{format_bytes(m.peak_bytes)} measured"
        budgets = counted(max(1, round(m.score_matrix_bytes / m.budget_bytes)), "budget")
        times = budgets if m.score_matrix_bytes >= m.budget_bytes else f"less than {budgets}"
        heading = "passed" if self.error.passed else HEADINGS[self.error.verdict]
        judged = f"float64 over {counted(self.error.rows, 'row')}: {heading}"
        lines = [
            f"Non-local means of an electrocardiogram: {s.samples:,} samples ({s.samples / s.sampling_hz:.0f} s),"
            f" every window of {s.window} against every other",
            f"  signal     {s.noisy_db:.1f} dB noisy, {s.denoised_db:.1f} dB denoised;"
            f" the best moving average ({s.smoothed_width} samples) reaches {s.smoothed_db:.1f} dB",
            f"  bandwidth  h = {s.bandwidth_mv:.3g} mV, from an estimated noise of {s.noise_mv:.3g} mV",
            f"  time       {format_seconds(self.elapsed_s)}, {self.flops / self.elapsed_s / 1e9:.0f} GFLOP/s",
            f"  memory     {peak}, {format_bytes(m.planned_bytes)} planned, budget {format_bytes(m.budget_bytes)};"
            f" the matrix of all scores would take {format_bytes(m.score_matrix_bytes)} ({times})",
            f"  error      {self.error.frobenius:.2g} relative (tolerance {self.error.allowed}), against {judged}",
        ]
        if self.plot is not None:
            lines.append(f"  plot       {one_line(self.plot)}")
        if self.notice is not None:
            lines.append(f"  notice     {self.notice}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        s = self.signal
        passed = "PASSED" if self.passed else "FAILED"
        return (
            f"<DemoReport {passed}: {s.samples:,} samples, {s.noisy_db:.1f} dB noisy, {s.denoised_db:.1f} dB denoised>"
        )

    def _repr_html_(self) -> str:
        return html_of_text(str(self))
