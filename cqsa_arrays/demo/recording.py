"""The recording of the demonstration, noise of known strength for it, and how strong the noise left over is.

Source: record 208 of the MIT-BIH Arrhythmia Database, see data/README.md.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

RECORDING = "ecg_mitdb_208.npz"
SAMPLING_HZ = 360.0
COUNTS_AT_ZERO, COUNTS_PER_MV = 1024, 200.0


def data_file(name: str) -> Traversable:
    """A file of the installed package ``cqsa_arrays.data``, or of the folder ``data`` of a checkout."""
    if find_spec("cqsa_arrays.data") is not None:
        return files("cqsa_arrays.data") / name
    return Path(__file__).parents[2] / "data" / name


def load_recording() -> np.ndarray:
    """(108000,) float64, millivolts at 360 Hz: five minutes of an electrocardiogram."""
    with data_file(RECORDING).open("rb") as file, np.load(file) as arrays:
        return (arrays["samples"].astype(np.float64) - COUNTS_AT_ZERO) / COUNTS_PER_MV


def add_noise(clean: np.ndarray, snr_db: float, seed: int) -> np.ndarray:
    """``clean`` (n,) with white normal noise, its signal-to-noise ratio about ``snr_db``; equal seeds, equal noise."""
    level = clean.std() / 10 ** (snr_db / 20)
    return clean + np.random.default_rng(seed).normal(0.0, level, clean.shape)


def snr_db(clean: np.ndarray, estimate: np.ndarray) -> float:
    """Signal-to-noise ratio of ``estimate`` in decibels: the variance of ``clean`` over the mean squared error."""
    return float(10 * np.log10(clean.var() / np.square(estimate - clean).mean()))


def noise_level(signal: np.ndarray) -> float:
    """Standard deviation of the white noise in ``signal``, in its unit, without knowing the clean signal.

    Second differences cancel what is locally straight and have 6 times the noise's variance; their median magnitude
    ignores the few samples in steep waves (Donoho and Johnstone's rule, with differences in place of wavelets).
    """
    return float(np.median(np.abs(np.diff(signal, 2))) / (0.6745 * np.sqrt(6)))


def moving_average(signal: np.ndarray, width: int) -> np.ndarray:
    """Mean of the ``width`` (odd) samples around each sample of ``signal`` (n,); the ends are mirrored."""
    padded = np.pad(signal, width // 2, mode="reflect")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")
