"""The CPU kernel: one group of query panels against a list of key pieces, block statistics in, block statistics out."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numba as nb
import numpy as np

from ...compiled import kept_on_disk
from .intrinsics import (
    block_copy,
    block_mask,
    block_masked_values,
    block_more_scores,
    block_scores,
    block_totals,
    block_values,
    block_weights,
    panel_rows,
    tile_columns,
)
from .tiles import ALIGNMENT, BLOCK_KEYS, MARGIN, SEGMENT_DIM, SPAN_KEYS


@lru_cache(maxsize=2)
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
    exact = scratch.itemsize == 8
    total_rows = panels * (2 * columns + 4 if exact else columns + 3) + 2
    total = scratch[: total_rows * rows * 8 // scratch.itemsize].view(np.float64)
    rest = scratch[total.size * 8 // scratch.itemsize :]
    sizes = np.array([panels * head_dim, panels * columns, panels, panels, panels, 1, 1, 1, BLOCK_KEYS])
    ends = np.cumsum(sizes) * rows
    packed = rest[: ends[0]].reshape((panels, head_dim, rows))
    span, totals = _state(rest[ends[0] : ends[3]], panels, columns, rows), _totals(total, panels, columns, rows, exact)
    margins = rest[ends[3] : ends[4]].reshape((panels, rows))
    margins[:] = 0
    maxima, alpha, limits = rest[ends[4] : ends[5]], rest[ends[5] : ends[6]], rest[ends[6] : ends[7]]
    return packed, span, totals, margins, maxima, alpha, limits, rest[ends[7] : ends[8]], rest[ends[8] :]


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
def _totals(memory, panels, columns, rows, exact):
    """What the spans have come to: sums (panels, columns + 1, rows), l being the last of them, and their low parts.

    m and the unit of the sums, a power of 2, are (panels, rows), factors (2, rows). Low parts are empty unless
    ``exact``.
    """
    low_columns = columns + 1 if exact else 0
    sizes = np.array([panels * (columns + 1), panels * low_columns, panels, panels, 2]) * rows
    ends = np.cumsum(sizes)
    high = memory[: ends[0]].reshape((panels, columns + 1, rows))
    low = memory[ends[0] : ends[1]].reshape((panels, low_columns, rows))
    m = memory[ends[1] : ends[2]].reshape((panels, rows))
    unit = memory[ends[2] : ends[3]].reshape((panels, rows))
    totals = high, low, m, unit, memory[ends[3] : ends[4]].reshape((2, rows))
    _clear_totals(totals)
    return totals


@nb.njit
def _clear_totals(totals):
    totals[0][:], totals[1][:], totals[2][:], totals[3][:] = 0, 0, -np.inf, 1


@nb.njit
def _set_margins(sums, margins, count, margin):
    """Give ``margin`` to those of the first ``count`` rows of which a sum (panels, columns, rows) is not finite.

    Whether there are any. Times 0, infinities and NaN leave NaN.
    """
    panels, rows = margins.shape
    for panel in range(panels):
        for column in range(sums.shape[1]):
            for lane in range(rows):
                margins[panel, lane] += sums[panel, column, lane] * 0
    found = False
    for row in range(panels * rows):
        panel, lane = row // rows, row % rows
        if np.isnan(margins[panel, lane]):
            margins[panel, lane] = margin if row < count else 0.0
            found |= row < count
    return found


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
def _factors(totals, span, panel):
    """What the totals and the span of each row of a panel weigh on their common base.

    The joint sum is 1 at most: where it would be more, all is halved, which is exact, and so is the unit.
    """
    (high, _, m, unit, factors), (_, span_m, span_l) = totals, span
    for lane in range(m.shape[1]):
        more, best = np.float64(span_m[panel, lane]), m[panel, lane]
        joint = more if more > best else best
        old = 1.0 if joint == best else math.exp(best - joint)
        new = (1.0 if joint == more else math.exp(more - joint)) * unit[panel, lane]
        while high[panel, -1, lane] * old + span_l[panel, lane] * new > 1:
            old, new, unit[panel, lane] = 0.5 * old, 0.5 * new, 0.5 * unit[panel, lane]
        m[panel, lane], factors[0, lane], factors[1, lane] = joint, old, new


@nb.njit
def _merge_span(scratch, totals, span):
    """Merge the statistics of one span into the totals, whose digits keep the error flat in the number of spans."""
    (high, low, _, _, factors), (acc, span_m, normalizer) = totals, span
    panels, columns, rows = acc.shape
    factors_at, row_bytes = factors.ctypes.data, rows * scratch.itemsize
    for panel in range(panels):
        _factors(totals, span, panel)
        at = panel * (columns + 1) * rows * 8
        high_at, low_at = high.ctypes.data + at, low.ctypes.data + at
        last = columns * rows * 8
        acc_at, l_at = acc.ctypes.data + panel * columns * row_bytes, normalizer.ctypes.data + panel * row_bytes
        block_totals(scratch, acc_at, high_at, low_at, factors_at, columns)
        block_totals(scratch, l_at, high_at + last, low_at + last, factors_at, 1)
    span_m[:] = -np.inf


@nb.njit
def _merge_row(m, normalizer, row, base, total):
    """m and l of a row of the state together with a sum ``total`` on ``base``, and the factors of both ``acc``.

    l is near 1 then, and ``acc`` a mean of values, which is finite where they are. What is rounded off m and l goes
    into the factors.
    """
    old, new, top, exact = 0.0, 1.0, base, total
    if not (m[row] == -np.inf and normalizer[row] == 0):
        top = max(np.float64(m[row]), base)
        old, new = math.exp(m[row] - top), math.exp(base - top)
        exact = normalizer[row] * old + total * new
    m[row], normalizer[row] = top, exact
    if exact > 0 and exact < np.inf and top < np.inf:
        m[row] = top + math.log(exact)
        moved = math.exp(top - m[row])
        normalizer[row] = exact * moved
        moved = normalizer[row] / exact
        old, new = old * moved, new * moved
    return old, new


@nb.njit
def _merge_state(acc, m, normalizer, parts, several):
    """Merge the statistics of this call, the totals or the only span, into the caller's state, row by row.

    Rows that saw nothing keep their bits; what ``acc`` holds for a row that saw nothing before is never read.
    """
    (span_acc, span_m, span_l), (high, low, total_m, units, _) = parts[1], parts[2]
    rows = span_m.shape[1]
    for row in range(m.shape[0]):
        panel, lane = row // rows, row % rows
        base, total, unit = np.float64(span_m[panel, lane]), np.float64(span_l[panel, lane]), 1.0
        if several:
            base, total, unit = total_m[panel, lane], high[panel, -1, lane], 1 / units[panel, lane]
        if base == -np.inf and total == 0:
            continue
        fresh = m[row] == -np.inf and normalizer[row] == 0
        old, new = _merge_row(m, normalizer, row, base, total * unit)
        new *= unit
        for d in range(acc.shape[1]):
            more = np.float64(span_acc[panel, d, lane])
            if several:
                more = high[panel, d, lane]
                if low.shape[1] and np.isfinite(more):
                    more += low[panel, d, lane]
            acc[row, d] = more * new if fresh else acc[row, d] * old + more * new


@nb.njit
def _attend_block(parts, first_row, block, value_dim, with_margins):
    """All panels against one block of keys; lane r of panel p sees the first ``first_row + p R + r``.

    Weights are relative to the largest score, and the row's margin more where there are some.
    """
    packed, (span_acc, span_m, span_l), _, margins, maxima, alpha, limits, scores, _ = parts
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
        if with_margins:
            maxima += margins[panel]
        block_weights(scores, scores_at, count, maxima_at, m_at, l_at, alpha_at)
        if seen < count:
            block_masked_values(
                scores, scores_at, values_at, value_stride, count, value_dim, alpha_at, limits_at, acc_at
            )
        else:
            block_values(scores, scores_at, values_at, value_stride, count, value_dim, alpha_at, limits_at, acc_at)


@nb.njit
def _attend_pieces(parts, row_start, rows_end, pieces, diagonal, value_dim, copied_stride, with_margins):
    """All pieces, block by block, into the span; into the totals whenever it is full. Whether that ever happened."""
    span, total, copied, itemsize = parts[1], parts[2], parts[8].ctypes.data, parts[7].itemsize
    span_keys, several = 0, False
    for piece in range(pieces.shape[0]):
        key_at, key_stride, value_at, value_stride, tokens, key_start = pieces[piece]
        tokens = min(tokens, rows_end + diagonal - key_start)
        for start in range(0, tokens, BLOCK_KEYS):
            count = min(BLOCK_KEYS, tokens - start)
            if span_keys + count > SPAN_KEYS:
                _merge_span(parts[7], total, span)
                span_keys, several = 0, True
            span_keys += count
            values_at = value_at + start * value_stride
            block_copy(parts[7], values_at, value_stride, count, value_dim * itemsize, copied, copied_stride)
            first_row = row_start + diagonal + 1 - key_start - start
            keys = (key_at + start * key_stride, key_stride, copied, copied_stride, count)
            _attend_block(parts, first_row, keys, value_dim, with_margins)
    if several:
        _merge_span(parts[7], total, span)
    return several


@kept_on_disk
@nb.njit(nogil=True)
def attend_group(queries, row_start, pieces, diagonal, scale, acc, m, normalizer, scratch):
    """Merge into the state (acc, m, normalizer) the statistics of ``queries`` against ``pieces`` of keys.

    queries (rows, D), its first row being token ``row_start``; pieces (count, 6) int64: key address, key token
    stride in bytes, value address, value token stride, tokens, first token; row r sees the keys
    ``j <= r + diagonal``; acc (rows, Dv), m and normalizer (rows,) are updated in place; scratch: 64-byte aligned,
    ``Tile.scratch_bytes`` long.

    Key blocks are the outer loop and query panels the inner one, so that a block of keys and values stays in the
    first-level cache while all panels of the group pass over it. Values are copied to rows one cache line apart
    from a multiple of 512 bytes: at head dimension 128 their native stride maps a column to a few cache sets. Every
    ``SPAN_KEYS`` keys are accumulated from zero, merged once into float64 totals (in two parts where the arithmetic is
    float64), and those once into the state. Rows with a sum that is not finite are computed once more, with smaller
    weights: it may have been a sum of large values.
    """
    rows, value_dim = panel_rows(scratch), acc.shape[1]
    columns = (value_dim + tile_columns(scratch) - 1) // tile_columns(scratch) * tile_columns(scratch)
    panels = (queries.shape[0] + rows - 1) // rows
    parts = _carve(scratch, panels, queries.shape[1], columns, rows)
    copied_stride = columns * scratch.itemsize + ALIGNMENT
    _pack(queries, scale, parts[0])
    rows_end = row_start + queries.shape[0]
    several = _attend_pieces(parts, row_start, rows_end, pieces, diagonal, value_dim, copied_stride, False)
    # What is not finite with a margin either is so by itself, and its row has the bits that it has beside others.
    for margin in (MARGIN, 0.0):
        if several:
            found = _set_margins(parts[2][0], parts[3], queries.shape[0], margin)
        else:
            found = _set_margins(parts[1][0], parts[3], queries.shape[0], margin)
        if not found:
            break
        _clear(parts[1])
        _clear_totals(parts[2])
        _attend_pieces(parts, row_start, rows_end, pieces, diagonal, value_dim, copied_stride, True)
    _merge_state(acc, m, normalizer, parts, several)
