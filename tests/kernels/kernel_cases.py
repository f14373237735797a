"""Inputs, the float64 reference and the runs that the kernel tests share.

The reference is the formula of softmax attention, one row at a time, and knows nothing of blocks or states. Every run
poisons what a kernel might read by mistake: the scratch, and the memory around each state array, hold NaN beforehand.
"""

import threading
from itertools import pairwise

import numpy as np

from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.kernels.base import KeyBlock
from cqsa_arrays.kernels.cpu.kernel import CpuKernel
from cqsa_arrays.kernels.cpu.simple import accumulate_simply

FULL = 1 << 62
TOLERANCE = {"float32": 1e-6, "float64": 2e-14}
FIELDS = ("acc", "m", "l")


def nothing(_part):
    """A ``done`` for runs that do not ask."""


def normal(rng, *shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


def blocks_of(keys, values, ends=(), start=0):
    """``keys`` and ``values`` (batch, heads, tokens, width) cut at ``ends`` into blocks, in token order."""
    borders = [0, *ends, keys.shape[2]]
    return [KeyBlock(start + a, keys[:, :, a:b], values[:, :, a:b]) for a, b in pairwise(borders)]


def exact(queries, query_start, blocks, *, diagonal, scale):
    """Output (batch, heads, rows, Dv) and log-sum-exp in float64, row by row; a row that sees no key is 0 and -inf."""
    wide = [KeyBlock(b.start, b.keys.astype(np.float64), b.values.astype(np.float64)) for b in blocks]
    batches, heads, rows, _ = queries.shape
    out, lse = np.zeros((batches, heads, rows, blocks[0].values.shape[3])), np.full((batches, heads, rows), -np.inf)
    for b, h, row in np.ndindex(batches, heads, rows):
        query, last = queries[b, h, row].astype(np.float64), query_start + row + diagonal
        keys = np.concatenate([block.keys[b, h, : max(0, last + 1 - block.start)] for block in wide])
        values = np.concatenate([block.values[b, h, : max(0, last + 1 - block.start)] for block in wide])
        if len(keys):
            scores = scale * (keys @ query)
            weights = np.exp(scores - scores.max())
            out[b, h, row] = weights @ values / weights.sum()
            lse[b, h, row] = scores.max() + np.log(weights.sum())
    return out, lse


class GuardedState:
    """A state inside larger arrays of NaN: its rows are not next to each other, and stray writes are seen."""

    def __init__(self, shape, value_dim, dtype):
        *outer, rows = shape
        self._acc = np.full((*outer, rows + 2, value_dim + 3), np.nan, dtype)
        self._m, self._l = (np.full((*outer, rows + 2), np.nan, dtype) for _ in range(2))
        inside = np.s_[..., 1:-1]
        self.state = BlockStatistics(self._acc[..., 1:-1, 1 : value_dim + 1], self._m[inside], self._l[inside])
        self.state.acc[:], self.state.m[:], self.state.l[:] = 0, -np.inf, 0

    def check(self):
        """Nothing around the state was written."""
        acc, rows = self._acc.copy(), np.stack([self._m, self._l])
        acc[..., 1:-1, 1:-2], rows[..., 1:-1] = np.nan, np.nan
        assert np.isnan(acc).all()
        assert np.isnan(rows).all()


class PoisonedKernel(CpuKernel):
    """A ``CpuKernel`` whose scratch is NaN before every call."""

    def accumulate(self, *arguments, **keywords):
        for scratch in self._scratch:
            scratch[:] = np.nan
        super().accumulate(*arguments, **keywords)


def run_fast(queries, query_start, blocks, *, diagonal, scale, state=None, threads=2, done=nothing):
    """The state of ``CpuKernel``; ``state``, empty by default, is continued and not changed."""
    batches, heads, rows, head_dim = queries.shape
    value_dim = blocks[0].values.shape[3]
    guarded = GuardedState((batches, heads, rows), value_dim, queries.dtype)
    for field in FIELDS if state is not None else ():
        getattr(guarded.state, field)[:] = getattr(state, field)
    kernel = PoisonedKernel(
        queries.dtype.name, rows=max(rows, 1), head_dim=head_dim, value_dim=value_dim, threads=threads
    )
    told, lock = [], threading.Lock()

    def count(part):
        with lock:
            told.append(part)
        done(part)

    try:
        kernel.accumulate(queries, query_start, blocks, guarded.state, diagonal=diagonal, scale=scale, done=count)
    finally:
        kernel.close()
    guarded.check()
    finished = np.zeros(rows, int)
    for part in told:
        finished[part.start - query_start : part.stop - query_start] += 1
    assert (finished == batches * heads).all()
    return guarded.state


def run_simply(queries, query_start, blocks, *, diagonal, scale, state=None):
    """The state of ``accumulate_simply``, likewise."""
    if state is None:
        state = BlockStatistics.empty(queries.shape[:3], blocks[0].values.shape[3], queries.dtype)
    return accumulate_simply(queries, query_start, blocks, state, diagonal=diagonal, scale=scale)


RUNS = {"fast": run_fast, "simple": run_simply}


def same_bits(a, b):
    return all(getattr(a, field).tobytes() == getattr(b, field).tobytes() for field in FIELDS)


def relative_error(out, wanted):
    """Relative Frobenius error; 0 where both are 0 everywhere. NaN on either side gives NaN, which passes no test."""
    error, size = np.linalg.norm((out - wanted).ravel()), np.linalg.norm(wanted.ravel())
    return error if error == 0 else error / size


def check_exact(state, wanted_out, wanted_lse, tolerance=None):
    """Output and log-sum-exp against the reference; rows without a key must agree exactly."""
    tolerance = tolerance or TOLERANCE[state.acc.dtype.name]
    out, lse = state.output().astype(np.float64), state.lse().astype(np.float64)
    empty = wanted_lse == -np.inf
    assert (out[empty] == 0).all()
    assert (lse[empty] == -np.inf).all()
    assert relative_error(out, wanted_out) <= tolerance
    lse_error = np.abs(lse[~empty] - wanted_lse[~empty])
    assert (lse_error <= tolerance * (1 + np.abs(wanted_lse[~empty]))).all()
