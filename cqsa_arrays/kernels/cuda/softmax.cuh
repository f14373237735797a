// The online softmax of the kernels for 16-bit elements: scores of a tile become weights, in the registers where products
// leave them.
//
// A warp owns ROW_TILES x 16 rows; each row is shared by a quad of lanes. Weights are 2^(s c - base), and the base of a row
// follows its scores only where they leave a window around it (Zadouri et al., "FlashAttention-4", rescale for growth
// alone):
//
//   weight  2^LEAST ------- 2^TOP ------- 2^MOST
//           a tile whose    largest       a larger one makes
//           largest is      after a       a new base
//           smaller does    new base
//           so, too
//
// float16 weights use their whole range: MOST is just below the largest number. A base that also falls lets the small
// weights of later tiles count: beside the largest of all keys they would be nothing in float16, and many of them may
// be most of the sum. It falls by MOST_FALL at most, for accumulators grow as it does. bfloat16 has the range of float32:
// its weights are so small that a sum of large values stays finite, and its base never falls.
// Defines and constants of the including file: ELEMENT, BLOCK_KEYS, VALUE_DIM, ROW_TILES.
#pragma once
#include "fragment.cuh"
#include "state.cuh"

constexpr int ROWS = 2 * ROW_TILES, SCORE_TILES = BLOCK_KEYS / 8, VALUE_TILES = VALUE_DIM / 8;
constexpr bool FALLS = ELEMENT == FLOAT16;
constexpr float TOP = FALLS ? 12 : -24, MOST = FALLS ? 15.99f : -16, LEAST = -5, MOST_FALL = 64;
// Of the weights of one span, or of several: 2^15 keys.
constexpr float LARGEST_SUM = FALLS ? 0x1p31f : 0x1p-1f;
constexpr float LOWEST = -3.402823466e38f;

// What a thread keeps of its rows: row i of ROWS is row  warp * 16 ROW_TILES + 16 (i / 2) + 8 (i % 2) + lane / 4.
struct Rows {
    float base[ROWS];     // what is subtracted from the row's scores, in powers of 2; LOWEST before any key was seen
    float highest[ROWS];  // that base has been
    float sum[ROWS];      // of this lane's weights
    float acc[ROW_TILES][VALUE_TILES][4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) base[i] = highest[i] = LOWEST, sum[i] = 0;
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t)
            for (int n = 0; n < VALUE_TILES; ++n)
                for (int e = 0; e < 4; ++e) acc[t][n][e] = 0;
    }
};

struct Scores {
    float at[ROW_TILES][SCORE_TILES][4];
};

// Weights of one tile, as A operands: 16 keys each.
struct Weights {
    uint32 at[BLOCK_KEYS / 16][ROW_TILES][4];
};

// Two numbers in one register, the first in the low half.
__device__ __forceinline__ uint32 packed(float low, float high) {
    uint32 both;
    if (ELEMENT == FLOAT16) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    }
    return both;
}

// threadIdx.x where it may not be worked out before the loop: what only rare tiles need would take registers.
__device__ __forceinline__ int thread_now() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

__device__ __forceinline__ int row_of(int thread, int i) {
    return thread / 32 * 16 * ROW_TILES + i / 2 * 16 + i % 2 * 8 + thread % 32 / 4;
}

// Scores of keys that a row does not see become -inf; `first` is the token of the tile's first key.
__device__ __forceinline__ void hide(Scores& scores, const Call& call, int64 block_row, int64 first, int count) {
    int thread = thread_now();
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        Interval seen = visible_keys(call, least(block_row + row_of(thread, i), call.query_tokens - 1));
        int low = int(most(0, least(seen.low - first, BLOCK_KEYS))), high = int(most(0, least(seen.high - first, count)));
        // The same twice, for registers: with few rows one comparison a key, where keys before `low` wrap around.
        uint32 width = max(high - low, 0), before = low - thread % 4 * 2;
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
            for (int e = 0; e < 2; ++e) {
                int key = n * 8 + thread % 4 * 2 + e;
                bool sees = ROW_TILES == 1 ? n * 8 + e - before < width : key >= low && key < high;
                float& score = scores.at[i / 2][n][i % 2 * 2 + e];
                score = sees ? score : negative_infinity(0.0f);
            }
    }
}

// Whether a word of two 16-bit elements holds an infinity or NaN.
__device__ __forceinline__ bool irregular_pair(uint32 pair) {
    constexpr uint32 EXPONENT = ELEMENT == FLOAT16 ? 0x7c00 : 0x7f80;
    return (pair & EXPONENT) == EXPONENT || (pair >> 16 & EXPONENT) == EXPONENT;
}

// The largest plain scores that this lane has of its rows.
__device__ __forceinline__ void best_of_scores(float (&best)[ROWS], const Scores& scores) {
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            float larger = fmaxf(scores.at[i / 2][n][i % 2 * 2], scores.at[i / 2][n][i % 2 * 2 + 1]);
            best[i] = n == 0 ? larger : fmaxf(best[i], larger);
        }
}

// Whether a largest weight of 2^x wants another base.
__device__ __forceinline__ bool outside(float x) { return x > MOST || (FALLS && x < LEAST); }

// Whether a tile with these scores may want one; of a row's lanes each knows some of its scores.
__device__ __forceinline__ bool may_be_outside(const Rows& rows, const float (&best)[ROWS], float c) {
    constexpr float MIDDLE = (MOST + LEAST) / 2, HALF = (MOST - LEAST) / 2;
    bool found = false;
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
        found |= FALLS ? fabsf(fmaf(best[i], c, -(rows.base[i] + MIDDLE))) > HALF : fmaf(best[i], c, -rows.base[i]) > MOST;
    return found;
}

// New bases where they are wanted; sums go over to them by `alpha`, and accumulators have to. The product is rounded once,
// so that the largest score has the weight 2^TOP.
__device__ __forceinline__ void rebase(Rows& rows, float (&best)[ROWS], float (&alpha)[ROWS], float c) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 1));
        best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 2));
        float peak = __fmul_rn(best[i], c), base = rows.base[i];
        if (outside(peak - base) && peak >= LOWEST) base = peak - TOP;
        if (FALLS) base = fmaxf(base, rows.highest[i] - MOST_FALL), rows.highest[i] = fmaxf(rows.highest[i], base);
        alpha[i] = exp2_of(rows.base[i] - base);
        rows.sum[i] *= alpha[i], rows.base[i] = base;
    }
}

__device__ __forceinline__ void rescale(Rows& rows, const float (&alpha)[ROWS]) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int n = 0; n < VALUE_TILES; ++n)
            for (int e = 0; e < 2; ++e) rows.acc[i / 2][n][i % 2 * 2 + e] *= alpha[i];
}

// One step of the online softmax: scores become weights, still as float32. Where some row has a new base,
// `rescale_by(alpha)` is called, after which the accumulators are to be, or will be, rescaled. Weights are summed tile by
// tile, so that a long sum has few terms.
template <typename RescaleBy>
__device__ __forceinline__ void soften(Scores& scores, Rows& rows, float c, RescaleBy rescale_by) {
    float best[ROWS], sum[ROWS];
    best_of_scores(best, scores);
    if (__builtin_expect(__any_sync(~0u, may_be_outside(rows, best, c)), 0)) {
        float alpha[ROWS];
        rebase(rows, best, alpha, c);
        rescale_by(alpha);
    }
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            float* pair = &scores.at[i / 2][n][i % 2 * 2];
            pair[0] = exp2_of(fmaf(pair[0], c, -rows.base[i])), pair[1] = exp2_of(fmaf(pair[1], c, -rows.base[i]));
            sum[i] = n == 0 ? pair[0] + pair[1] : sum[i] + (pair[0] + pair[1]);
        }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) rows.sum[i] += sum[i];
}

__device__ __forceinline__ void pack(Weights& weights, const Scores& scores) {
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            weights.at[n / 2][i / 2][n % 2 * 2 + i % 2] =
                packed(scores.at[i / 2][n][i % 2 * 2], scores.at[i / 2][n][i % 2 * 2 + 1]);
}

// What the spans of a launch have come to so far, from zero. It lies in local memory, of which the driver keeps some for
// every thread that can be resident anyway, and is touched once a span: it takes neither registers nor memory of the plan.
struct Totals {
    float base[ROWS], sum[ROWS], acc[ROW_TILES * VALUE_TILES * 4];

    // Who gives its address away keeps it in memory.
    __device__ __forceinline__ Totals() { asm volatile("" ::"l"(this) : "memory"); }
};

// A span ends: `rows` have it together with those before, if there are any. Where more follow, `totals` take it over, and
// `rows` begin anew.
__device__ __forceinline__ void close_span(Rows& rows, Totals& totals, bool first, bool last) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        rows.sum[i] += __shfl_xor_sync(~0u, rows.sum[i], 1);
        rows.sum[i] += __shfl_xor_sync(~0u, rows.sum[i], 2);
        if (!first) {
            float base = fmaxf(rows.base[i], totals.base[i]);
            float fresh = exp2_of(rows.base[i] - base), old = exp2_of(totals.base[i] - base);
            float sum = fmaf(rows.sum[i], fresh, totals.sum[i] * old);
            if (sum > LARGEST_SUM) base += 1, fresh *= 0.5f, old *= 0.5f, sum *= 0.5f;
            rows.base[i] = base, rows.sum[i] = sum;
#pragma unroll
            for (int n = 0; n < VALUE_TILES; ++n)
                for (int e = 0; e < 2; ++e) {
                    float& acc = rows.acc[i / 2][n][i % 2 * 2 + e];
                    acc = fmaf(acc, fresh, totals.acc[(i * VALUE_TILES + n) * 2 + e] * old);
                }
        }
        if (last) continue;
        totals.base[i] = rows.base[i], totals.sum[i] = rows.sum[i];
#pragma unroll
        for (int n = 0; n < VALUE_TILES; ++n)
            for (int e = 0; e < 2; ++e) totals.acc[(i * VALUE_TILES + n) * 2 + e] = rows.acc[i / 2][n][i % 2 * 2 + e];
    }
    if (!last) rows.clear();
}

// The base of a row's state, from that of its weights.
__device__ __forceinline__ double natural_base(float base) {
    return base == LOWEST ? negative_infinity(0.0) : double(base) * LN2;
}
