"""The CPU kernel: one group of query panels against a list of key pieces, block statistics in, block statistics out."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np

from .intrinsics import (
    block_copy,
    block_mask,
    block_masked_values,
    block_more_scores,
    block_scores,
    block_values,
    block_weights,
    panel_rows,
    tile_columns,
)
from .tiles import ALIGNMENT, BLOCK_KEYS, SEGMENT_DIM, SPAN_KEYS


def signature(dtype: str) -> Any:
    """The compiled signature of ``attend_group`` for "float32" or "float64"."""
    real = nb.from_dtype(np.dtype(dtype))
    queries = nb.types.Array(real, 2, "A", readonly=True)
    pieces = nb.types.Array(nb.int64, 2, "C", readonly=True)
    return nb.void(queries, nb.int64, pieces, nb.int64, nb.float64, real[:, :], real[:], real[:], real[::1])


@nb.njit
def _carve(scratch, panels, head_dim, columns, rows):
    """The parts of the scratch, in the order of ``Tile.scratch_bytes``; each begins on the border of a vector.

    First the totals in float64, then everything in the kernel's arithmetic.
    """
    total = scratch[: panels * (columns + 2) * rows * 8 // scratch.itemsize].view(np.float64)
    rest = scratch[total.size * 8 // scratch.itemsize :]
    ends = np.cumsum(np.array([panels * head_dim, panels * columns, panels, panels, 1, 1, 1, BLOCK_KEYS])) * rows
    packed = rest[: ends[0]].reshape((panels, head_dim, rows))
    span, totals = _state(rest[ends[0] : ends[3]], panels, columns, rows), _state(total, panels, columns, rows)
    maxima, alpha, limits = rest[ends[3] : ends[4]], rest[ends[4] : ends[5]], rest[ends[5] : ends[6]]
    return packed, span, totals, maxima, alpha, limits, rest[ends[6] : ends[7]], rest[ends[7] :]


@nb.njit
def _state(memory, panels, columns, rows):
    """acc (panels, columns, rows), m and l (panels, rows) in ``memory``: no row has seen a key."""
    end = panels * columns * rows
    acc = memory[:end].reshape((panels, columns, rows))
    m = memory[end : end + panels * rows].reshape((panels, rows))
    normalizer = memory[end + panels * rows : end + 2 * panels * rows].reshape((panels, rows))
    _clear((acc, m, normalizer))
    return acc, m, normalizer


@nb.njit
def _pack(queries, scale, packed):
    """Transposed, scaled queries by panel: packed[panel, d, row]; rows past the end are zero."""
    panels, head_dim, rows = packed.shape
    for panel in range(panels):
        for row in range(rows):
            source = panel * rows + row
            for d in range(head_dim):
                packed[panel, d, row] = queries[source, d] * scale if source < queries.shape[0] else 0


@nb.njit
def _clear(state):
    state[0][:], state[1][:], state[2][:] = 0, -np.inf, 0


@nb.njit
def _rebase(m, more_m):
    """The common base of two states of a row, and what each of them weighs on it, in float64."""
    best = max(m, more_m)
    base = best if best != -np.inf else 0.0
    return best, math.exp(m - base), math.exp(more_m - base)


@nb.njit
def _merge_span(total, span):
    """Merge the statistics of one span into the totals, whose float64 keeps the error flat in the number of spans."""
    (acc, m, normalizer), (span_acc, span_m, span_l) = total, span
    panels, columns, rows = acc.shape
    for panel in range(panels):
        for lane in range(rows):
            more_m, more_l = np.float64(span_m[panel, lane]), np.float64(span_l[panel, lane])
            if more_m == -np.inf and more_l == 0:
                continue  # this row saw nothing in this span
            m[panel, lane], old, new = _rebase(m[panel, lane], more_m)
            normalizer[panel, lane] = normalizer[panel, lane] * old + more_l * new
            for column in range(columns):
                acc[panel, column, lane] = acc[panel, column, lane] * old + span_acc[panel, column, lane] * new
    _clear(span)


@nb.njit
def _merge_state(acc, m, normalizer, more):
    """Merge the statistics of this call into the caller's state, row by row.

    Rows that saw nothing keep their bits; what ``acc`` holds for a row that saw nothing before is never read.
    """
    more_acc, more_m, more_l = more
    rows = more_m.shape[1]
    for row in range(m.shape[0]):
        panel, lane = row // rows, row % rows
        if more_m[panel, lane] == -np.inf and more_l[panel, lane] == 0:
            continue
        if m[row] == -np.inf and normalizer[row] == 0:
            m[row], normalizer[row] = more_m[panel, lane], more_l[panel, lane]
            for d in range(acc.shape[1]):
                acc[row, d] = more_acc[panel, d, lane]
            continue
        m[row], old, new = _rebase(np.float64(m[row]), np.float64(more_m[panel, lane]))
        normalizer[row] = normalizer[row] * old + more_l[panel, lane] * new
        for d in range(acc.shape[1]):
            acc[row, d] = acc[row, d] * old + more_acc[panel, d, lane] * new


@nb.njit
def _attend_block(parts, first_row, block, value_dim):
    """All panels against one block of keys; lane r of panel p sees the first ``first_row + p R + r``."""
    packed, (span_acc, span_m, span_l), _, maxima, alpha, limits, scores, _ = parts
    keys_at, key_stride, values_at, value_stride, block_keys = block
    panels, head_dim, rows = packed.shape
    maxima_at, alpha_at, limits_at = maxima.ctypes.data, alpha.ctypes.data, limits.ctypes.data
    scores_at = scores.ctypes.data
    for panel in range(panels):
        seen = first_row + panel * rows
        if seen + rows <= 1:
            continue
        acc_at, m_at, l_at = span_acc[panel].ctypes.data, span_m[panel].ctypes.data, span_l[panel].ctypes.data
        count = min(block_keys, seen + rows - 1)
        part = min(head_dim, SEGMENT_DIM)
        block_scores(scores, packed[panel].ctypes.data, keys_at, key_stride, count, part, scores_at, maxima_at)
        for begin in range(SEGMENT_DIM, head_dim, SEGMENT_DIM):
            part, key = min(head_dim - begin, SEGMENT_DIM), keys_at + begin * scores.itemsize
            block_more_scores(scores, packed[panel, begin:].ctypes.data, key, key_stride, count, part, scores_at)
        if seen < count or head_dim > SEGMENT_DIM:
            for lane in range(rows):
                limits[lane] = min(max(seen + lane, 0), count)
            block_mask(scores, scores_at, count, limits_at, maxima_at)
        block_weights(scores, scores_at, count, maxima_at, m_at, l_at, alpha_at)
        if seen < count:
            block_masked_values(
                scores, scores_at, values_at, value_stride, count, value_dim, alpha_at, limits_at, acc_at
            )
        else:
            block_values(scores, scores_at, values_at, value_stride, count, value_dim, alpha_at, limits_at, acc_at)


@nb.njit
def _attend_pieces(parts, row_start, rows_end, pieces, diagonal, value_dim, copied_stride):
    """All pieces, block by block, into the span; into the totals whenever it is full. Whether that ever happened."""
    span, total, copied, itemsize = parts[1], parts[2], parts[7].ctypes.data, parts[6].itemsize
    span_keys, several = 0, False
    for piece in range(pieces.shape[0]):
        key_at, key_stride, value_at, value_stride, tokens, key_start = pieces[piece]
        tokens = min(tokens, rows_end + diagonal - key_start)
        for start in range(0, tokens, BLOCK_KEYS):
            count = min(BLOCK_KEYS, tokens - start)
            if span_keys + count > SPAN_KEYS:
                _merge_span(total, span)
                span_keys, several = 0, True
            span_keys += count
            values_at = value_at + start * value_stride
            block_copy(parts[6], values_at, value_stride, count, value_dim * itemsize, copied, copied_stride)
            first_row = row_start + diagonal + 1 - key_start - start
            keys = (key_at + start * key_stride, key_stride, copied, copied_stride, count)
            _attend_block(parts, first_row, keys, value_dim)
    return several


def _build(sources):
    """``attend_group``; ``sources`` names the code of the other files that it is compiled from."""

    @nb.njit(nogil=True, cache=True)
    def attend_group(queries, row_start, pieces, diagonal, scale, acc, m, normalizer, scratch):
        """Merge into the state (acc, m, normalizer) the statistics of ``queries`` against ``pieces`` of keys.

        queries (rows, D), its first row being token ``row_start``; pieces (count, 6) int64: key address, key token
        stride in bytes, value address, value token stride, tokens, first token; row r sees the keys
        ``j <= r + diagonal``; acc (rows, Dv), m and normalizer (rows,) are updated in place; scratch: 64-byte aligned,
        ``Tile.scratch_bytes`` long.

        Key blocks are the outer loop and query panels the inner one, so that a block of keys and values stays in the
        first-level cache while all panels of the group pass over it. Values are copied to rows one cache line apart
        from a multiple of 512 bytes: at head dimension 128 their native stride maps a column to a few cache sets. Every
        ``SPAN_KEYS`` keys are accumulated from zero and merged once into float64 totals, and those once into the state.
        """
        assert len(sources) > 0  # Numba's cache on disk sees the change of a closure, but not of another file
        rows, value_dim = panel_rows(scratch), acc.shape[1]
        columns = (value_dim + tile_columns(scratch) - 1) // tile_columns(scratch) * tile_columns(scratch)
        panels = (queries.shape[0] + rows - 1) // rows
        parts = _carve(scratch, panels, queries.shape[1], columns, rows)
        copied_stride = columns * scratch.itemsize + ALIGNMENT
        _pack(queries, scale, parts[0])
        rows_end = row_start + queries.shape[0]
        if _attend_pieces(parts, row_start, rows_end, pieces, diagonal, value_dim, copied_stride):
            _merge_span(parts[2], parts[1])
            _merge_state(acc, m, normalizer, parts[2])
        else:
            _merge_state(acc, m, normalizer, parts[1])

    return attend_group


def _sources() -> str:
    files = ("intrinsics.py", "tiles.py", "vector_ir.py")
    code = b"".join(Path(__file__).with_name(name).read_bytes() for name in files)
    return hashlib.sha256(code).hexdigest()


attend_group = _build(_sources())
