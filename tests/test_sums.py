"""Sums that no random data shows, through ``attention``: one body for NumPy and, where there is a GPU, CuPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cqsa_arrays as cqsa
from cqsa_arrays import devices

DTYPES = {
    "float16": (np.dtype("f2"), 2.7e-4),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), 2.2e-3),
    "float32": (np.dtype("f4"), 1e-6),
    "float64": (np.dtype("f8"), 2e-14),
}
by_dtype = pytest.mark.parametrize("name", DTYPES)
# Of a GPU some more: the longest launches of the fast kernels.
KEYS = [1 << 12, 1 << 16, 1 << 18]


@pytest.fixture(params=["numpy", "cupy"])
def xp(request: pytest.FixtureRequest):
    """The module of arrays; CuPy where there is a GPU."""
    if request.param == "numpy":
        return np
    if not devices.gpus():
        pytest.skip("no GPU")
    return pytest.importorskip("cupy")


def attended(xp, q, k, v) -> np.ndarray:
    """Attention of arrays (tokens, D) with scale 1 in the state's precision, as float64."""
    wide = "float64" if q.dtype == np.float64 else "float32"
    out = cqsa.attention(*(xp.asarray(array) for array in (q, k, v)), scale=1.0, dtype=wide)
    return np.asarray(out if xp is np else out.get(), dtype=np.float64)


def error(found: np.ndarray, expected) -> float:
    expected = np.broadcast_to(np.asarray(expected, "f8"), found.shape)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@by_dtype
@pytest.mark.parametrize("keys", KEYS)
def test_constants_and_nonnegative_values(xp, name, keys):
    dtype, tolerance = DTYPES[name]
    rng = np.random.default_rng(0)
    q, k = np.zeros((130, 8), dtype), np.zeros((keys, 8), dtype)
    columns = np.array([0.1, 0.3, 0.7, 1.09166372, 1.9999, 1.3333334, 0.25, 3], dtype)
    found = attended(xp, q, k, np.ascontiguousarray(np.broadcast_to(columns, (keys, 8))))
    assert max(error(column, constant) for column, constant in zip(found.T, columns.astype("f8"), strict=True)) <= (
        tolerance
    )
    values = rng.random((keys, 8)).astype(dtype)
    assert error(attended(xp, q, k, values), values.astype(np.longdouble).mean(0)) <= tolerance


@by_dtype
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
@pytest.mark.parametrize("score", [4, 12, 18, 24, 60])
def test_mass_in_many_small_weights(xp, name, score, place):
    """One key of score 0 and value 0 among 2^16 of score -s and value 1."""
    (dtype, tolerance), keys = DTYPES[name], 1 << 16
    at = int(place * (keys - 1))
    q, k, v = np.zeros((130, 8), dtype), np.zeros((keys, 8), dtype), np.ones((keys, 8), dtype)
    q[:, 0], k[:, 0], k[at], v[at] = 1, -score, 0, 0
    small = (keys - 1) * np.exp(-float(score))
    if name == "float16" and score > 24:
        pytest.skip("weights of float16 do not reach that far")
    # float16 loses those in the tile of the largest.
    allowed = tolerance + score * np.finfo("f8" if name == "float64" else "f4").eps + (3e-3 if name == "float16" else 0)
    assert error(attended(xp, q, k, v), small / (1 + small)) <= allowed


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("keys", [1000, 1 << 16])
def test_the_mean_of_large_values_is_finite(xp, name, keys):
    dtype, _ = DTYPES[name]
    large = 0.99 * float(np.finfo("f8" if name == "float64" else "f4").max)
    values = np.full((keys, 8), large).astype(dtype)
    found = attended(xp, np.zeros((130, 8), dtype), np.zeros((keys, 8), dtype), values)
    np.testing.assert_allclose(found, float(values[0, 0]), rtol=1e-5)
