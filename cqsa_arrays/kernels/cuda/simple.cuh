// The plain version: one warp a row, 32 keys at a time, a fused multiply-add for every term, nothing clever.
//
// The fast kernels are tested against it, and hand it the rows of a block whose keys or values hold infinities or NaN
// where these must not reach every row: here a key that a row does not see is never multiplied. It is also what computes
// head dimensions above those of the fast kernels, and scales that are not positive.
#pragma once
#include "state.cuh"

// Value columns that one pass over the keys accumulates; more columns take more passes.
constexpr int SIMPLE_COLUMNS = 256;

template <int KIND, typename REAL>
__device__ REAL simple_score(const Call& call, const Piece& piece, const Place& place, int64 row, int64 key) {
    int64 q = element_of(call.query_strides, place, row), k = element_of(call.key_strides, place, key);
    REAL sum = 0;
    // In parts of 256: a longer running sum loses digits.
    for (int begin = 0; begin < call.head_dim; begin += 256) {
        REAL part = 0;
        for (int d = begin; d < min(begin + 256, call.head_dim); ++d)
            part = fma(load_element<KIND, REAL>(call.queries, q + d), load_element<KIND, REAL>(piece.keys, k + d), part);
        sum += part;
    }
    return sum;
}

template <typename REAL>
struct SimpleRow {
    REAL m, l, acc[SIMPLE_COLUMNS / 32];  // of lane's columns: begin + lane, begin + lane + 32, ...
};

// One row against keys first .. first + count - 1 (count <= 32) of a piece; m is the plain maximum of the scores.
template <int KIND, typename REAL>
__device__ void simple_keys(
    const Call& call, const Piece& piece, const Place& place, int64 row, int64 first, int count, int begin,
    SimpleRow<REAL>& state) {
    const REAL nothing = negative_infinity(REAL(0));
    int lane = threadIdx.x % 32;
    Interval seen = visible_keys(call, row);
    int64 token = piece.start + first + lane;
    bool visible = lane < count && token >= seen.low && token < seen.high;
    REAL score = nothing;
    if (visible) score = simple_score<KIND, REAL>(call, piece, place, row, first + lane) * REAL(call.scale);
    REAL best = score;
    for (int offset = 16; offset; offset >>= 1) {
        REAL other = __shfl_xor_sync(~0u, best, offset);
        best = best > other ? best : other == other ? other : best;  // a NaN is left to its weight
    }
    REAL m = best > state.m ? best : state.m;
    REAL base = m == nothing ? REAL(0) : m;
    REAL weight = visible ? exp_of(score - base) : REAL(0), alpha = state.m == nothing ? REAL(0) : exp_of(state.m - base);
    state.m = m;
    state.l *= alpha;
    for (int i = 0; i < SIMPLE_COLUMNS / 32; ++i) state.acc[i] *= alpha;
    uint32 seen_by = __ballot_sync(~0u, visible);
    for (int j = 0; j < count; ++j) {
        REAL w = __shfl_sync(~0u, weight, j);
        if (!(seen_by >> j & 1)) continue;
        state.l += w;
        int64 v = element_of(call.value_strides, place, first + j);
        for (int i = 0; i < SIMPLE_COLUMNS / 32; ++i) {
            int column = begin + lane + 32 * i;
            if (column < call.value_dim)
                state.acc[i] = fma(w, load_element<KIND, REAL>(piece.values, v + column), state.acc[i]);
        }
    }
}

// Rows block.row .. block.row + ROWS - 1 from `walk` on to the end of the keys, span by span, by THREADS threads.
// `first`: whether the state is empty where the walk begins, which is where a span begins.
template <int KIND, typename REAL, int ROWS, int TILE, int THREADS>
__device__ __forceinline__ void simple_rows_here(
    const Call& call, Place block, const BlockView& view, Walk<TILE> walk, bool first) {
    const REAL nothing = negative_infinity(REAL(0));
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int64 row = block.row + warp; row < least(block.row + ROWS, call.query_tokens); row += THREADS / 32) {
        Walk<TILE> at = walk;
        SpanEnds ends = {first, false};
        do {
            Walk<TILE> span = at;
            RowEnd<REAL> end;
            for (int begin = 0; begin < call.value_dim; begin += SIMPLE_COLUMNS) {
                SimpleRow<REAL> state = {nothing, 0, {}};
                at = span;
                for (int keys = 0; keys < call.span_keys && at.more(call); keys += TILE, at.step(call, view)) {
                    for (int part = 0; part < at.count(call); part += 32)
                        simple_keys<KIND, REAL>(
                            call, call.pieces[at.piece], block, row, at.offset + part, min(at.count(call) - part, 32),
                            begin, state);
                }
                ends.last = !at.more(call);
                if (begin == 0)
                    end = end_of_span<REAL>(call, block, row, double(state.m), state.l, ends, true, lane == 0);
                for (int i = 0; i < SIMPLE_COLUMNS / 32; ++i) {
                    int column = begin + lane + 32 * i;
                    if (column < call.value_dim)
                        end_element<REAL>(call, block, row, column, end, ends.last, state.acc[i]);
                }
            }
            ends.first = false;
        } while (at.more(call));
    }
}

// The same as a function of its own, which takes no registers from the loop that calls it.
template <int KIND, typename REAL, int ROWS, int TILE, int THREADS>
__device__ __noinline__ void simple_rows(const Call& call, Place block, const BlockView& view, Walk<TILE> walk, bool first) {
    simple_rows_here<KIND, REAL, ROWS, TILE, THREADS>(call, block, view, walk, first);
}
