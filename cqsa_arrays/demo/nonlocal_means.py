"""Non-local means as exact attention: each window of a signal is averaged with all windows that look like it.

    estimate_i = sum_j exp(-|w_i - w_j|^2 / (2 h^2)) v_j / sum_j exp(-|w_i - w_j|^2 / (2 h^2))

The squared distance is |w_i|^2 - 2 w_i . w_j + |w_j|^2, and |w_i|^2 cancels in the fraction, so that this is softmax
attention with q_i = [w_i, 1], k_j = [w_j, -|w_j|^2 / 2] and scale 1 / h^2. Here w is a window of a lightly smoothed
copy (noise in w blurs what is alike), v the same window of the signal itself, both less their means, so that the slow
drift of the electrodes does not tell beats apart. A sample's estimates from all windows that hold it are averaged.

Sources: Buades, Coll and Morel, "A non-local algorithm for image denoising", CVPR 2005; Tracey and Miller, "Nonlocal
means denoising of ECG signals", IEEE Transactions on Biomedical Engineering 59(9), 2012: a bandwidth in proportion to
the noise level and to the root of the window's length.
"""

from __future__ import annotations

import os

import numpy as np

from ..ranges import Range
from ..storage import DiskArray
from .recording import moving_average, noise_level

WINDOW = 31
"""Samples of a window, 86 ms at 360 Hz: about one QRS complex. With the constant, head_dim is 32."""

PILOT_WIDTH = 5
"""Samples that are averaged in the copy that is compared."""

BANDWIDTH_FACTOR = 0.7
"""h / sqrt(WINDOW) over the noise level of that copy. Like the two above, chosen by trial on this recording."""

_BLOCK_WINDOWS = 4096


def bandwidth(noisy: np.ndarray) -> float:
    """h in the signal's unit, from the noise level that the signal shows."""
    return float(BANDWIDTH_FACTOR * noise_level(noisy) / np.sqrt(PILOT_WIDTH) * np.sqrt(WINDOW))


def centred_windows(signal: np.ndarray, which: Range) -> tuple[np.ndarray, np.ndarray]:
    """Windows (len(which), WINDOW) float32 around these samples less their means, and the means; ends are mirrored."""
    padded = np.pad(signal, WINDOW // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[which.slice]
    means = windows.mean(axis=1, keepdims=True)
    return (windows - means).astype(np.float32), means


def write_windows(path: str | os.PathLike[str], noisy: np.ndarray) -> None:
    """Write /q and /k (n, WINDOW + 1) and /v (n, WINDOW), float32, for ``noisy`` (n,), a block at a time."""
    import h5py

    pilot, samples = moving_average(noisy, PILOT_WIDTH), len(noisy)
    with h5py.File(path, "w") as file:
        for name, dim in (("q", WINDOW + 1), ("k", WINDOW + 1), ("v", WINDOW)):
            file.create_dataset(name, (samples, dim), "f4").attrs["layout"] = "nd"
        for block in Range(0, samples).split(_BLOCK_WINDOWS):
            windows, _ = centred_windows(pilot, block)
            energy = np.square(windows, dtype=np.float64).sum(axis=1, keepdims=True)
            file["q"][block.slice] = np.hstack([windows, np.ones_like(energy)])
            file["k"][block.slice] = np.hstack([windows, -energy / 2])
            file["v"][block.slice], _ = centred_windows(noisy, block)


def overlap_average(averaged: np.ndarray | DiskArray, noisy: np.ndarray) -> np.ndarray:
    """The denoised signal (n,): the mean of a sample's estimates over the windows in ``averaged`` (n, WINDOW).

    ``averaged`` is what attention made of /v: an array or an array on disk. Each window gets its own mean back.
    """
    samples, half = len(noisy), WINDOW // 2
    total, count = np.zeros(samples + WINDOW - 1), np.zeros(samples + WINDOW - 1)
    for block in Range(0, samples).split(_BLOCK_WINDOWS):
        estimates = averaged[block.slice] + centred_windows(noisy, block)[1]
        for j in range(WINDOW):
            total[block.start + j : block.stop + j] += estimates[:, j]
            count[block.start + j : block.stop + j] += 1
    return (total / count)[half : half + samples]
