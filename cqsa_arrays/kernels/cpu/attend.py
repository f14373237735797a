"""The CPU kernel: one group of query panels against a list of key pieces, block statistics in, block statistics out."""

from __future__ import annotations

import math

import numba as nb
import numpy as np

from .intrinsics import (
    block_masked_values,
    block_mask,
    block_scores,
    block_values,
    block_weights,
    panel_rows,
    tile_columns,
)
from .tiles import BLOCK_KEYS, SPAN_KEYS


def signature(dtype: str) -> nb.core.typing.templates.Signature:
    """The compiled signature of ``attend_group`` for "float32" or "float64"."""
    real = nb.from_dtype(np.dtype(dtype))
    queries = nb.types.Array(real, 2, "A", readonly=True)
    pieces = nb.types.Array(nb.int64, 2, "C", readonly=True)
    return nb.void(queries, nb.int64, pieces, nb.int64, nb.float64, real[:, :], real[:], real[:], real[::1])


def scratch_elements(rows: int, columns: int, panels: int, head_dim: int) -> int:
    """Scratch that ``attend_group`` needs for ``panels`` panels of ``rows`` rows, in elements."""
    return rows * (panels * (head_dim + columns + 2) + BLOCK_KEYS + 3)


@nb.njit
def _pack(queries, scale, rows, packed):  # type: ignore[no-untyped-def]
    """Transposed, scaled queries by panel: packed[panel, d, row]; rows past the end are zero."""
    for panel in range(packed.shape[0]):
        for row in range(rows):
            source = panel * rows + row
            for d in range(packed.shape[1]):
                packed[panel, d, row] = queries[source, d] * scale if source < queries.shape[0] else 0


@nb.njit
def _merge_span(acc, m, normalizer, span_acc, span_m, span_l):  # type: ignore[no-untyped-def]
    """Merge the statistics of one span into the running state, row by row, re-based on the larger maximum."""
    rows = span_m.shape[1]
    for row in range(m.shape[0]):
        panel, lane = row // rows, row % rows
        theirs = span_m[panel, lane]
        best = max(m[row], theirs)
        if best == -np.inf and span_l[panel, lane] == 0:
            continue  # this row saw nothing in this span
        base = best if best != -np.inf else acc.dtype.type(0)
        old, new = math.exp(m[row] - base), math.exp(theirs - base)
        m[row] = best
        normalizer[row] = normalizer[row] * old + span_l[panel, lane] * new
        for d in range(acc.shape[1]):
            acc[row, d] = acc[row, d] * old + span_acc[panel, d, lane] * new


@nb.njit(nogil=True, cache=True)
def attend_group(queries, row_start, pieces, diagonal, scale, acc, m, normalizer, scratch):  # type: ignore[no-untyped-def]
    """Merge into the state (acc, m, normalizer) the statistics of ``queries`` against ``pieces`` of keys and values.

    queries (rows, D), its first row being token ``row_start``; pieces (count, 6) int64: key address, key token stride in bytes,
    value address, value token stride, tokens, first token; row r sees the keys ``j <= r + diagonal``; acc (rows, Dv), m and
    normalizer (rows,) are updated in place; scratch: 64-byte aligned, ``scratch_elements`` long.

    Key blocks are the outer loop, query panels the inner one, so that a block of keys and values stays in the first-level cache
    while all panels of the group pass over it. Every ``SPAN_KEYS`` keys are accumulated from zero and merged once.
    """
    rows, head_dim, value_dim = panel_rows(scratch), queries.shape[1], acc.shape[1]
    columns = (value_dim + tile_columns(scratch) - 1) // tile_columns(scratch) * tile_columns(scratch)
    panels = (queries.shape[0] + rows - 1) // rows
    sizes = (panels * head_dim, panels * columns, panels, panels, BLOCK_KEYS, 1, 1)
    packed = scratch[: sizes[0] * rows].reshape((panels, head_dim, rows))
    end = sizes[0] * rows
    span_acc = scratch[end : end + sizes[1] * rows].reshape((panels, columns, rows))
    end += sizes[1] * rows
    span_m = scratch[end : end + sizes[2] * rows].reshape((panels, rows))
    end += sizes[2] * rows
    span_l = scratch[end : end + sizes[3] * rows].reshape((panels, rows))
    end += sizes[3] * rows
    scores = scratch[end : end + BLOCK_KEYS * rows].ctypes.data
    end += BLOCK_KEYS * rows
    maxima, alpha, limits = scratch[end:].ctypes.data, scratch[end + rows :].ctypes.data, scratch[end + 2 * rows :]
    last_row = row_start + queries.shape[0] - 1
    itemsize = scratch.itemsize

    _pack(queries, scale, rows, packed)
    _clear(span_acc, span_m, span_l)
    span_keys = 0
    for piece in range(pieces.shape[0]):
        key_address, key_stride, value_address, value_stride, tokens, key_start = pieces[piece]
        tokens = min(tokens, last_row + diagonal + 1 - key_start)
        for start in range(0, tokens, BLOCK_KEYS):
            count = min(BLOCK_KEYS, tokens - start)
            if span_keys + count > SPAN_KEYS:
                _merge_span(acc, m, normalizer, span_acc, span_m, span_l)
                _clear(span_acc, span_m, span_l)
                span_keys = 0
            span_keys += count
            keys, values = key_address + start * key_stride, value_address + start * value_stride
            for panel in range(panels):
                # Lane r of the panel sees the first ``seen + r`` keys of this block.
                seen = row_start + panel * rows + diagonal + 1 - key_start - start
                if seen + rows <= 1:
                    continue
                queries_at = packed.ctypes.data + panel * head_dim * rows * itemsize
                acc_at = span_acc.ctypes.data + panel * columns * rows * itemsize
                m_at, l_at = span_m[panel].ctypes.data, span_l[panel].ctypes.data
                block_scores(scratch, queries_at, keys, key_stride, count, head_dim, scores, maxima)
                if seen < count:
                    for lane in range(rows):
                        limits[lane] = min(max(seen + lane, 0), count)
                    block_mask(scratch, scores, count, limits.ctypes.data, maxima)
                block_weights(scratch, scores, count, maxima, m_at, l_at, alpha)
                if seen < count:
                    block_masked_values(
                        scratch, scores, values, value_stride, count, value_dim, alpha, limits.ctypes.data, acc_at
                    )
                else:
                    block_values(
                        scratch, scores, values, value_stride, count, value_dim, alpha, limits.ctypes.data, acc_at
                    )
    _merge_span(acc, m, normalizer, span_acc, span_m, span_l)


@nb.njit
def _clear(span_acc, span_m, span_l):  # type: ignore[no-untyped-def]
    span_acc[:], span_m[:], span_l[:] = 0, -np.inf, 0
