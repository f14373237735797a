"""``run_demo``: noise, windows to a file, attention from file to file, the signal back, and what it took."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import api
from ..errors import ArgumentError
from ..options import Options
from ..planner import Plan
from ..storage import DiskArray
from ..units import parse_bytes
from ..verification import verify
from . import recording
from .nonlocal_means import WINDOW, bandwidth, overlap_average, write_windows
from .peak import PeakMemory
from .report import DemoReport, MemoryReport, SignalReport

NOISE_DB = 10.0
"""Signal-to-noise ratio to which noise is added."""

SMOOTHING_WIDTHS = range(3, 33, 2)
"""Moving averages of which the best is the rival."""

PLOT_NAME = "cqsa_demo.png"


@dataclass(frozen=True, slots=True, eq=False)
class Signals:
    """The recording, with noise, and cleaned in two ways: (n,) float64 each, millivolts at 360 Hz."""

    clean: np.ndarray
    noisy: np.ndarray
    smoothed: np.ndarray
    denoised: np.ndarray


@dataclass(frozen=True, slots=True)
class Measured:
    """What the attention took."""

    plan: Plan
    elapsed_s: float
    peak_bytes: int | None


def run_demo(
    directory: str | os.PathLike[str],
    *,
    samples: int | None = None,
    memory: int | str = "64MiB",
    plot: bool = True,
    keep: bool = False,
    progress: bool = False,
    seed: int = 0,
) -> DemoReport:
    """Add noise to a real electrocardiogram and remove it by comparing every window with every other, in ``memory``.

    The windows go to an HDF5 file below ``directory``, attention runs from file to file, sampled rows are compared with
    float64. ``samples`` uses only the beginning of the 108,000; ``plot`` writes cqsa_demo.png; ``keep`` leaves the HDF5
    files as cqsa_demo_qkv.h5 and cqsa_demo_out.h5, replacing older ones; ``seed`` draws the noise.

    Returns a DemoReport. Raises ArgumentError for a ``directory`` that is none and for ``samples`` out of range,
    BudgetError for too little ``memory``.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ArgumentError("directory", str(directory), "an existing directory", "Make it, or use '.'.")
    clean = recording.load_recording()
    if samples is not None and not WINDOW <= samples <= len(clean):
        raise ArgumentError("samples", samples, f"{WINDOW} to {len(clean)}", "Leave it out for all of them.")
    clean = clean[:samples]
    noisy = recording.add_noise(clean, NOISE_DB, seed)
    with _workspace(directory, keep) as folder:
        inputs, output = folder / "cqsa_demo_qkv.h5", folder / "cqsa_demo_out.h5"
        write_windows(inputs, noisy)
        averaged, measured = _attend(inputs, output, bandwidth(noisy), memory, progress)
        denoised = overlap_average(averaged, noisy)
        error = verify(output, rows=256, seed=seed)
    signals = Signals(clean, noisy, recording.moving_average(noisy, width := _best_width(clean, noisy)), denoised)
    memory_report = _memory_report(measured, parse_bytes(memory, "memory"), len(clean))
    signal_report = _signal_report(signals, width)
    path, notice = _plot(directory / PLOT_NAME, signals, signal_report, memory_report) if plot else (None, None)
    return DemoReport(
        signal=signal_report, memory=memory_report, error=error, elapsed_s=measured.elapsed_s,
        flops=measured.plan.problem.flops, plot=path, notice=notice,
    )  # fmt: skip


@contextmanager
def _workspace(directory: Path, keep: bool) -> Iterator[Path]:
    """The folder of the HDF5 files: ``directory`` itself, or a temporary one in it."""
    if keep:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="cqsa_demo_", dir=directory) as folder:
        yield Path(folder)


def _attend(inputs: Path, output: Path, h: float, memory: int | str, progress: bool) -> tuple[DiskArray, Measured]:
    """Attention over the windows in ``inputs``, from file to file."""
    qkv = [f"{inputs}:/{name}" for name in "qkv"]
    scale, options = 1 / h**2, Options(overwrite=True, progress=progress)
    plan = api.plan(*qkv, scale=scale, memory=memory, out=output, options=options)
    # Compiles the kernel, which is no part of what a job takes.
    api.attention(*np.zeros((3, 1, 1), np.float32), layout="nd", memory=memory)
    start, peak = time.perf_counter(), PeakMemory()
    averaged = api.attention(*qkv, scale=scale, memory=memory, out=output, options=options)
    return averaged, Measured(plan, time.perf_counter() - start, peak.increase_bytes())


def _best_width(clean: np.ndarray, noisy: np.ndarray) -> int:
    """The moving average that comes nearest to ``clean``: more than anybody could know, so as to be fair to it."""
    widths = (width for width in SMOOTHING_WIDTHS if width <= len(noisy))
    return max(widths, key=lambda width: recording.snr_db(clean, recording.moving_average(noisy, width)))


def _signal_report(signals: Signals, width: int) -> SignalReport:
    return SignalReport(
        samples=len(signals.clean),
        sampling_hz=recording.SAMPLING_HZ,
        noisy_db=recording.snr_db(signals.clean, signals.noisy),
        smoothed_db=recording.snr_db(signals.clean, signals.smoothed),
        smoothed_width=width,
        denoised_db=recording.snr_db(signals.clean, signals.denoised),
        noise_mv=recording.noise_level(signals.noisy),
        bandwidth_mv=bandwidth(signals.noisy),
        window=WINDOW,
    )


def _memory_report(measured: Measured, budget_bytes: int, samples: int) -> MemoryReport:
    return MemoryReport(
        budget_bytes=budget_bytes,
        planned_bytes=measured.plan.memory_bytes,
        peak_bytes=measured.peak_bytes,
        score_matrix_bytes=samples * samples * np.dtype(np.float32).itemsize,
    )


def _plot(path: Path, signals: Signals, signal: SignalReport, memory: MemoryReport) -> tuple[str | None, str | None]:
    """The picture's path, or why there is none."""
    from ..plots import PlotError, plot_demo

    try:
        plot_demo(path, signals, signal, memory)
    except PlotError as error:
        return None, str(error)
    except OSError as error:  # what was computed is shown all the same
        return None, f"no plot: {path}: {error.strerror}"
    return str(path), None
