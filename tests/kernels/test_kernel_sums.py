"""Sums of many equal or small terms, and of large ones: what no random data shows.

Equal terms are all rounded the same way, so that a long running sum drifts; mass that lies in many small weights is
lost where these are nothing beside the largest; a sum of large values is not finite where their mean is.
"""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import FULL, run_fast, run_simply

from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.kernels.base import KeyBlock

TOLERANCE = {"float32": 1e-6, "float64": 2e-14}
# Some are rounded badly in nearly every addition of a running sum.
AWKWARD = (0.1, 0.3, 0.7, 1.09166372, 1.9999999, 1.3333334)
by_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
by_kernel = pytest.mark.parametrize("run", [run_fast, run_simply], ids=["fast", "simple"])


def mean_of(run, values: np.ndarray, blocks: int = 1) -> np.ndarray:
    """Attention of three rows that see ``values`` (keys, columns) with equal weights, in float64."""
    dtype, size = values.dtype, -(-len(values) // blocks)
    queries, keys = np.zeros((1, 1, 3, 2), dtype), np.ones((1, 1, len(values), 2), dtype)
    state = None
    for start in range(0, len(values), size):
        part = slice(start, start + size)
        block = KeyBlock(start, keys[:, :, part], values[None, None, part])
        given = {} if state is None else {"state": state}
        state = run(queries, 0, [block], diagonal=FULL, scale=1.0, **given)
    return state.output()[0, 0].astype("f8")


def error(found: np.ndarray, expected: np.ndarray) -> float:
    expected = np.broadcast_to(expected.astype("f8"), found.shape)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@by_kernel
@by_dtype
@pytest.mark.parametrize("keys", [96, 1537, 20_000, 1 << 17])
@pytest.mark.parametrize("blocks", [1, 5])
def test_constants_are_their_own_mean(run, dtype, keys, blocks):
    columns = np.array(AWKWARD, dtype)
    found = mean_of(run, np.broadcast_to(columns, (keys, len(columns))).copy(), blocks)
    for column, constant in zip(found.T, columns, strict=True):  # each by itself: none may hide behind the others
        assert error(column, constant) <= TOLERANCE[dtype]


@by_dtype
def test_constants_over_16_million_keys(dtype):
    columns = np.array(AWKWARD[:2], dtype)
    found = mean_of(run_fast, np.broadcast_to(columns, (1 << 24, 2)).copy())
    for column, constant in zip(found.T, columns, strict=True):
        assert error(column, constant) <= TOLERANCE[dtype]


@by_kernel
@by_dtype
def test_nonnegative_values(run, dtype):
    values = np.random.default_rng(0).random((1 << 16, 4)).astype(dtype)
    assert error(mean_of(run, values), values.astype(np.longdouble).mean(0)) <= TOLERANCE[dtype] / 4


@by_dtype
def test_merging_two_thousand_states_as_a_billion_tokens_do(dtype):
    """Launches of half a million keys each; half of them leave the mean where it is, the others move it."""
    rng = np.random.default_rng(0)
    constants = np.concatenate([np.array(AWKWARD), rng.random(58)]).astype(dtype)
    states = [
        BlockStatistics(acc[None], np.array([np.log(1 << 19)], dtype), np.ones(1, dtype))
        for acc in (constants, (constants * 3).astype(dtype))
    ]
    total = states[0]
    for index in range(1, 2048):
        total = total.merge(states[index % 2])
    expected = sum(state.acc[0].astype(np.longdouble) for state in states) / 2  # a running sum would drift
    assert error(total.output()[0].astype("f8"), expected) <= TOLERANCE[dtype]
    assert abs(total.l - 1).max() < 1e-6
    assert abs(total.lse()[0] - np.log(2.0**30)) < 1e-4


def dtype_max(dtype):
    """The largest number less the few units in the last place that a mean may be off."""
    return np.finfo(dtype).max * np.array(1 - 1e-6, dtype)


ORDERS = {"first": 0, "middle": 0.5, "last": 1}


@by_kernel
@by_dtype
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("score", [4, 12, 18, 24, 36, 48])
@pytest.mark.parametrize("keys", [40, 1 << 15])
def test_mass_in_many_small_weights(run, dtype, order, score, keys):
    """One key of score 0 and value 0, the others of score -s and value 1: what densities and denoising do all day."""
    place = int(ORDERS[order] * (keys - 1))
    key, value = np.full((1, 1, keys, 1), -score, dtype), np.ones((1, 1, keys, 1), dtype)
    key[0, 0, place], value[0, 0, place] = 0, 0
    found = run(np.ones((1, 1, 2, 1), dtype), 0, [KeyBlock(0, key, value)], diagonal=FULL, scale=1.0).output()
    small = (keys - 1) * np.exp(-float(score))
    # A weight of exp(-s) has the relative error that its score has.
    assert (
        error(found[0, 0].astype("f8"), np.array(small / (1 + small))) <= TOLERANCE[dtype] + score * np.finfo(dtype).eps
    )


@by_kernel
@by_dtype
@pytest.mark.parametrize("keys", [10, 1000, 5000])
def test_the_mean_of_large_values_is_finite(run, dtype, keys):
    """Of values next to the largest number of the type, also of both signs; another column is as it would be."""
    most = dtype_max(dtype)
    values = np.ones((keys, 3), dtype)
    values[:, 0] = most
    values[:, 1] = np.where(np.arange(keys) % 2, -most, most)
    found = mean_of(run, values)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 0], most, rtol=1e-6)
    assert (np.abs(found[:, 1]) <= 1e-6 * float(most)).all()
    np.testing.assert_allclose(found[:, 2], 1, rtol=1e-6)


@by_dtype
def test_rows_beside_large_values_keep_their_bits(dtype):
    rng = np.random.default_rng(0)
    queries, keys = (rng.standard_normal((1, 1, n, 8)).astype(dtype) for n in (300, 300))
    values = rng.standard_normal((1, 1, 300, 8)).astype(dtype)
    usual = run_fast(queries, 0, [KeyBlock(0, keys, values)], diagonal=0, scale=1.0)
    values[0, 0, 200:] = dtype_max(dtype)
    other = run_fast(queries, 0, [KeyBlock(0, keys, values)], diagonal=0, scale=1.0)
    assert np.isfinite(other.output()).all()
    assert np.array_equal(usual.acc[0, 0, :200], other.acc[0, 0, :200])
