"""float32 stays as exact over millions of keys as over a hundred thousand.

The keys of a long run are overlapping windows of one random pool, so that float64 needs each of them once, times how
often it came. With SPAN_KEYS = 1 << 60 (one running sum, never restarted) these tests fail: the relative error is then
8.4e-7 at 2^17 keys, 2.0e-6 at 2^20, 4.4e-6 at 2^22 and 9.4e-6 at 2^24, against 4.2e-7, 2.3e-7, 2.9e-7 and 4.5e-7 with
spans.
"""

import functools

import numpy as np
import pytest
from kernel_cases import FULL, TOLERANCE, normal, nothing, relative_error, run_fast

from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.kernels.base import KeyBlock
from cqsa_arrays.kernels.cpu.kernel import CpuKernel

POOL, HEAD_DIM, ROWS = 1 << 17, 16, 48
SCALE = HEAD_DIM**-0.5


def windows(rng, tokens):
    """(first pool key, length) of windows that hold ``tokens`` keys together."""
    while tokens:
        length = min(tokens, int(rng.integers(POOL // 4, POOL)))
        yield int(rng.integers(0, POOL - length + 1)), length
        tokens -= length


@functools.cache
def errors(tokens, mean, calls):
    """Relative error of the output, largest error of the log-sum-exp; the windows in one call, or in several."""
    rng = np.random.default_rng(17)
    queries, keys, values = (normal(rng, 1, 1, n, HEAD_DIM, dtype="float32") for n in (ROWS, POOL, POOL))
    values += np.float32(mean)
    blocks, count, start = [], np.zeros(POOL), 0
    for first, length in windows(rng, tokens):
        part = slice(first, first + length)
        blocks.append(KeyBlock(start, keys[:, :, part], values[:, :, part]))
        count[part] += 1
        start += length
    assert count.sum() == start == tokens
    state = None
    for i in range(min(calls, len(blocks))):
        state = run_fast(queries, 0, blocks[i::calls], diagonal=FULL, scale=SCALE, state=state)
    scores = SCALE * queries[0, 0].astype(np.float64) @ keys[0, 0].T.astype(np.float64)
    m = scores.max(1, keepdims=True)
    weights = np.exp(scores - m) * count
    total = weights.sum(1, keepdims=True)
    wanted, lse = weights @ values[0, 0].astype(np.float64) / total, (m + np.log(total))[:, 0]
    return relative_error(state.output()[0, 0], wanted), np.abs(state.lse()[0, 0] - lse).max()


# Power of two of the keys, mean of the values, calls.
LONG = [(17, 0, 1), (20, 0, 1), (20, 1, 1), (20, 0, 5), (22, 0, 1), (22, 1, 1), (22, 0, 30), (24, 0, 1)]


@pytest.mark.parametrize(("power", "mean", "calls"), LONG, ids=lambda value: str(value))
def test_float32_error_does_not_grow_with_the_number_of_keys(power, mean, calls):
    short, _ = errors(1 << 17, mean, calls)
    long, lse = errors(1 << power, mean, calls)
    assert long <= TOLERANCE["float32"]
    assert long <= 2 * short + 1e-7
    assert lse <= 4e-6  # rounding of log-sum-exps of 12 to 17 is 1e-6 by itself


def test_float64_error_does_not_grow_either():
    rng = np.random.default_rng(3)
    queries, keys, values = (normal(rng, 1, 1, n, 2, dtype="float64") for n in (4, 1 << 19, 1 << 19))
    state = run_fast(queries, 0, [KeyBlock(0, keys, values)], diagonal=FULL, scale=1.0)
    wide = [array[0, 0].astype(np.longdouble) for array in (queries, keys, values)]
    weights = np.exp(wide[0] @ wide[1].T)
    wanted = weights @ wide[2] / weights.sum(1, keepdims=True)
    assert relative_error(state.output()[0, 0], wanted) <= TOLERANCE["float64"]


def test_float32_error_of_a_state_that_is_continued_a_thousand_times():
    """Each call rounds the float32 state once; 8192 calls of 128 keys would be at 2.1e-6."""
    rng, piece = np.random.default_rng(4), 1024
    queries, keys, values = (normal(rng, 1, 1, n, HEAD_DIM, dtype="float32") for n in (ROWS, 1 << 20, 1 << 20))
    state = BlockStatistics.empty((1, 1, ROWS), HEAD_DIM, "float32")
    kernel = CpuKernel("float32", rows=ROWS, head_dim=HEAD_DIM, value_dim=HEAD_DIM, threads=1)
    for start in range(0, 1 << 20, piece):
        block = KeyBlock(start, keys[:, :, start : start + piece], values[:, :, start : start + piece])
        kernel.accumulate(queries, 0, [block], state, diagonal=FULL, scale=SCALE, done=nothing)
    kernel.close()
    total, acc = np.zeros((ROWS, 1)), np.zeros((ROWS, HEAD_DIM))
    for start in range(0, 1 << 20, POOL):
        part = slice(start, start + POOL)
        weights = np.exp(SCALE * queries[0, 0].astype(np.float64) @ keys[0, 0, part].T.astype(np.float64) - 10)
        total += weights.sum(1, keepdims=True)
        acc += weights @ values[0, 0, part].astype(np.float64)
    assert relative_error(state.output()[0, 0], acc / total) <= TOLERANCE["float32"]
