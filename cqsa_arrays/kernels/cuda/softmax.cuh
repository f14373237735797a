// The online softmax of the kernels for 16-bit elements: scores of a tile become weights, in the registers where products
// leave them.
//
// A warp owns ROW_TILES x 16 rows; each row is shared by a quad of lanes. The base of a row follows its largest score only
// where that grew much: weights may be as large as 2^GROWTH (Zadouri et al., "FlashAttention-4").
// Defines and constants of the including file: ELEMENT, BLOCK_KEYS, VALUE_DIM, ROW_TILES.
#pragma once
#include "fragment.cuh"
#include "state.cuh"

constexpr int ROWS = 2 * ROW_TILES, SCORE_TILES = BLOCK_KEYS / 8, VALUE_TILES = VALUE_DIM / 8;
// Weights may grow to 2^GROWTH before their base follows the maximum; float16 holds them with room to spare.
constexpr float GROWTH = 8;
constexpr float LOWEST = -3.402823466e38f;

// What a thread keeps of its rows: row i of ROWS is row  warp * 16 ROW_TILES + 16 (i / 2) + 8 (i % 2) + lane / 4.
struct Rows {
    float best[ROWS];  // this lane's largest plain score
    float base[ROWS];  // what is subtracted from the row's scores, in powers of 2; LOWEST before any key was seen
    float sum[ROWS];   // of this lane's weights
    float acc[ROW_TILES][VALUE_TILES][4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) best[i] = negative_infinity(0.0f), base[i] = LOWEST, sum[i] = 0;
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

__device__ __forceinline__ void best_of_scores(Rows& rows, const Scores& scores) {
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            rows.best[i] = fmaxf(rows.best[i], fmaxf(scores.at[i / 2][n][i % 2 * 2], scores.at[i / 2][n][i % 2 * 2 + 1]));
}

// The base of each row follows its maximum, over all lanes; sums go over to it by `alpha`, and accumulators have to. The
// product is rounded once, so that a base that stays gives 1.
__device__ __forceinline__ void rebase(Rows& rows, float (&alpha)[ROWS], float c) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        rows.best[i] = fmaxf(rows.best[i], __shfl_xor_sync(~0u, rows.best[i], 1));
        rows.best[i] = fmaxf(rows.best[i], __shfl_xor_sync(~0u, rows.best[i], 2));
        float base = fmaxf(__fmul_rn(rows.best[i], c), rows.base[i]);
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

// One step of the online softmax: scores become weights, still as float32. Where some maximum has grown much,
// `rescale_by(alpha)` is called, after which the accumulators are to be, or will be, rescaled.
template <typename RescaleBy>
__device__ __forceinline__ void soften(Scores& scores, Rows& rows, float c, RescaleBy rescale_by) {
    best_of_scores(rows, scores);
    bool grew = false;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) grew |= __fmul_rn(rows.best[i], c) > rows.base[i] + GROWTH;
    if (__builtin_expect(__any_sync(~0u, grew), 0)) {
        float alpha[ROWS];
        rebase(rows, alpha, c);
        rescale_by(alpha);
    }
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            float* pair = &scores.at[i / 2][n][i % 2 * 2];
            pair[0] = exp2_of(fmaf(pair[0], c, -rows.base[i])), pair[1] = exp2_of(fmaf(pair[1], c, -rows.base[i]));
            rows.sum[i] += pair[0] + pair[1];
        }
}

__device__ __forceinline__ void pack(Weights& weights, const Scores& scores) {
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            weights.at[n / 2][i / 2][n % 2 * 2 + i % 2] =
                packed(scores.at[i / 2][n][i % 2 * 2], scores.at[i / 2][n][i % 2 * 2 + 1]);
}
