// The plain version: one warp a row, 32 keys at a time, a fused multiply-add for every term, nothing clever.
//
// The fast kernels are tested against it, and hand it the rows of a block whose keys or values hold infinities or NaN
// where these must not reach every row: here a key that a row does not see is never multiplied. It is also what computes
// head dimensions above those of the fast kernels, and scales that are not positive.
#pragma once
#include "state.cuh"

// Value columns that one pass over the keys accumulates; more columns take more passes.
constexpr int SIMPLE_COLUMNS = 256;
// The largest weight: that of 2^36 keys, more than a launch has, adds up to 1, so that sums are no larger than values.
constexpr double SIMPLE_UNIT = 0x1p-36;

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

// A sum of many terms in two doubles (Knuth's two-sum), so that its error does not grow with their number.
struct LongSum {
    double high, low;

    __device__ __forceinline__ void add(double x) {
        double sum = high + x, back = sum - high;
        low += (high - (sum - back)) + (x - back), high = sum;
    }
    __device__ __forceinline__ void scale(double by) { high *= by, low *= by; }
    // Beside an infinity the low part is not a number.
    __device__ __forceinline__ double value() const { return isfinite(high) ? high + low : high; }
};

template <typename REAL>
struct SimpleRow {
    REAL m;
    LongSum l, acc[SIMPLE_COLUMNS / 32];  // of lane's columns: begin + lane, begin + lane + 32, ...
};

// One row against keys first .. first + count - 1 (count <= 32) of a piece; m is the plain maximum of the scores. Sums are
// of doubles, those of the 32 keys from zero, whatever REAL is.
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
    double weight = visible ? exp_of(score - base) * SIMPLE_UNIT : 0.0;
    double alpha = state.m == nothing ? 0.0 : exp(double(state.m) - double(base));
    state.m = m;
    state.l.scale(alpha);
    for (LongSum& sum : state.acc) sum.scale(alpha);
    uint32 seen_by = __ballot_sync(~0u, visible);
    double l = 0, acc[SIMPLE_COLUMNS / 32] = {};
    for (int j = 0; j < count; ++j) {
        double w = __shfl_sync(~0u, weight, j);
        if (!(seen_by >> j & 1)) continue;
        l += w;
        int64 v = element_of(call.value_strides, place, first + j);
        for (int i = 0; i < SIMPLE_COLUMNS / 32; ++i) {
            int column = begin + lane + 32 * i;
            if (column < call.value_dim) acc[i] = fma(w, double(load_element<KIND, REAL>(piece.values, v + column)), acc[i]);
        }
    }
    state.l.add(l);
    for (int i = 0; i < SIMPLE_COLUMNS / 32; ++i) state.acc[i].add(acc[i]);
}

// Rows block.row .. block.row + ROWS - 1 against all their keys, by THREADS threads, TILE keys at a time.
template <int KIND, typename REAL, int ROWS, int TILE, int THREADS>
__device__ __forceinline__ void simple_rows_here(const Call& call, Place block, const BlockView& view) {
    const REAL nothing = negative_infinity(REAL(0));
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int64 row = block.row + warp; row < least(block.row + ROWS, call.query_tokens); row += THREADS / 32) {
        RowEnd end;
        for (int begin = 0; begin < call.value_dim; begin += SIMPLE_COLUMNS) {
            SimpleRow<REAL> state = {nothing, {}, {}};
            for (Walk<TILE> at(call, view); at.more(call); at.step(call, view))
                for (int part = 0; part < at.count(call); part += 32)
                    simple_keys<KIND, REAL>(
                        call, call.pieces[at.piece], block, row, at.offset + part, min(at.count(call) - part, 32), begin,
                        state);
            double base = double(state.m) - log(SIMPLE_UNIT);
            if (begin == 0) end = end_of_row<REAL>(call, block, row, base, state.l.value(), true, lane == 0);
            for (int i = 0; i < SIMPLE_COLUMNS / 32; ++i) {
                int column = begin + lane + 32 * i;
                if (column < call.value_dim) end_element<REAL>(call, block, row, column, end, state.acc[i].value());
            }
        }
    }
}

// The same as a function of its own, which takes no registers from the loop that calls it.
template <int KIND, typename REAL, int ROWS, int TILE, int THREADS>
__device__ __noinline__ void simple_rows(const Call& call, Place block, const BlockView& view) {
    simple_rows_here<KIND, REAL, ROWS, TILE, THREADS>(call, block, view);
}
