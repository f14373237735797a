"""Inputs, the float64 reference and the count of device memory, which the GPU's tests share; CuPy is not imported."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest

import cqsa_arrays as cqsa
from cqsa_arrays.comparison import TOLERANCES

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype("f2"), BFLOAT16, np.dtype("f4"), np.dtype("f8")]
# Relative Frobenius error by type; of float32 more is asked than ``compare`` asks by itself.
TOLERANCE = {name: 1e-6 if name == "float32" else bound.frobenius for name, bound in TOLERANCES.items()}
# Steps in which the driver hands out memory.
GRANULARITY = 2 << 20
by_cover = pytest.mark.parametrize("cover", ["cqs", "rectangular"])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)


def coarser(*dtypes: np.dtype) -> np.dtype:
    """The one of them that rounds most."""
    return max(dtypes, key=[DTYPES[index] for index in (3, 2, 0, 1)].index)


def normal(*shape: int, dtype: object = "f4", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def qkv(batch: int, heads: int, queries: int, dim: int, *, keys=None, value_dim=None, dtype="f4", seed=0):
    keys, value_dim = keys or queries, value_dim or dim
    q, k = normal(batch, heads, queries, dim, dtype=dtype, seed=seed), (batch, heads, keys)
    return q, normal(*k, dim, dtype=dtype, seed=seed + 1), normal(*k, value_dim, dtype=dtype, seed=seed + 2)


def host(array) -> np.ndarray:
    """``array`` of NumPy or CuPy as NumPy's."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def exact(q, k, v, *, offset: int | None = None, scale: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp (batch, heads, rows) by the formula in float64; a row without keys is 0 and -inf."""
    rows, keys = np.arange(q.shape[2])[:, None], np.arange(k.shape[2])
    seen = np.ones((len(rows), len(keys)), bool) if offset is None else keys <= rows + offset
    return exact_where(q, k, v, seen, q.shape[3] ** -0.5 if scale is None else scale)


def exact_where(q, k, v, seen: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Likewise, where row r sees key j if ``seen[r, j]``. A NaN reaches the rows that see it, by the formula alone."""
    q, k, v = (host(array).astype("f8") for array in (q, k, v))
    with np.errstate(all="ignore"):
        scores = np.where(seen, scale * (q @ k.swapaxes(2, 3)), -np.inf)
        largest = scores.max(3, initial=-np.inf, keepdims=True)
        weights = np.exp(scores - np.where(largest == -np.inf, 0, largest))
        total = weights.sum(3, keepdims=True)
        # A key of no weight takes no part; where all are of that kind, inf * 0 of the values would make NaN.
        out = np.einsum("bhrk,bhkd->bhrd", weights, np.where(np.isfinite(v), v, 0))
        for b, h, key, column in np.argwhere(~np.isfinite(v)):
            on = weights[b, h, :, key] != 0
            out[b, h, on, column] += weights[b, h, on, key] * v[b, h, key, column]
        out = np.where(total == 0, 0, out / total)
        lse = np.where(total == 0, -np.inf, largest + np.log(total))
    return out, lse[..., 0]


def assert_close(found, expected: np.ndarray, dtype: object = None) -> None:
    """Within the tolerance of ``dtype``, by default that of ``found``; NaN and infinities in the same places."""
    report = cqsa.compare(found, expected, tolerance=TOLERANCE[np.dtype(dtype or found.dtype).name])
    assert report.passed, report


def assert_lse_close(found, expected: np.ndarray) -> None:
    """-inf in the same places, the others within rounding of the state's type."""
    found, bound = host(found), 1e-13 if found.dtype == np.float64 else 5e-6
    empty = np.isneginf(expected)
    assert np.array_equal(np.isneginf(found), empty)
    error = np.abs(found[~empty] - expected[~empty])
    assert (error <= bound * np.maximum(1, np.abs(expected[~empty]))).all(), error.max()


def least_bytes(*operands, **arguments) -> int:
    """The smallest budget that a refusal names."""
    with pytest.raises(cqsa.BudgetError) as caught:
        cqsa.plan(*operands, **{**arguments, "memory": 1})
    return int(re.search(r"Pass memory=(\d+)", str(caught.value))[1])


def as_map(path: str | os.PathLike[str], array: np.ndarray) -> np.memmap:
    """A copy of ``array`` in a mapped file."""
    made = np.memmap(path, array.dtype, "w+", shape=array.shape)
    made[...] = array
    return made


class Midway:
    """Replaces a method of a class: the ``at``-th call raises ``error``."""

    def __init__(self, monkeypatch, owner: type, name: str, error: BaseException, at: int = 5) -> None:
        self.calls, self._at, self._error, self._usual = 0, at, error, getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: self(*given, **named))

    def __call__(self, *given, **named):
        self.calls += 1
        if self.calls >= self._at:
            raise self._error
        return self._usual(*given, **named)


def device_free() -> int:
    """Bytes that the driver says are free, with nothing left in CuPy's pool."""
    cupy = sys.modules["cupy"]
    cupy.cuda.Device().synchronize()
    cupy.get_default_memory_pool().free_all_blocks()
    return int(cupy.cuda.runtime.memGetInfo()[0])


@contextmanager
def device_peak() -> Iterator[Callable[[], int]]:
    """Gives a function: the most bytes that were taken from the device since, by the driver's count."""
    cupy = sys.modules["cupy"]
    device, done, least = cupy.cuda.Device(), threading.Event(), [device_free()]
    before = least[0]

    def watch() -> None:
        with device:
            while not done.is_set():
                least[0] = min(least[0], int(cupy.cuda.runtime.memGetInfo()[0]))
                time.sleep(0.0005)

    thread = threading.Thread(target=watch, name="watch")
    thread.start()
    try:
        yield lambda: before - least[0]
    finally:
        done.set()
        thread.join()
