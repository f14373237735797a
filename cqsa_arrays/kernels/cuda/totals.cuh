// Sums of a launch for the kernels of float32: spans of keys are accumulated in registers, and added up in float32, without
// loss: what rounding takes from a total stays in the registers and joins it at the next span's end, so that the error
// does not grow with the number of spans.
//
// Bases of weights are whole powers of 2, so that moving one costs no rounding. They are kept as float32; LOWEST before any
// key was seen.
//
// Source: Dekker, "A floating-point technique for extending the available precision", Numer. Math. 18 (1971), the sum of
// two numbers by three additions.
#pragma once
#include "fragment.cuh"
#include "state.cuh"

constexpr float LOWEST = -3.402823466e38f;
// Weights are at most 2^-SPAN_BITS, so that a span's sum of them is at most 1/4, and sums of values smaller than these. The
// totals stay so because bases rise where a lane's part of the sum, an eighth or a quarter, exceeds MOST_SUM.
#ifndef BOUNDED_VALUES
constexpr int SPAN_BITS = 12;
constexpr float MOST_SUM = 0.0625f;
#else  // below 2^63: sums are finite anyway, and weights reach further down
constexpr int SPAN_BITS = 0;
constexpr float MOST_SUM = 1 << 30;
#endif

// The least whole number from `x` on; LOWEST for -inf.
__device__ __forceinline__ float whole(float x) { return fmaxf(ceilf(x), LOWEST); }

// Elements of a row's totals that are read at once: a wait for each would take longer than all.
constexpr int BATCH = 4;

// What the spans of a launch have come to so far. It lies in local memory, of which the driver keeps some for every thread
// that can be resident anyway, and is touched once a span: it takes neither registers nor memory of the plan.
template <int ROWS, int COLUMNS>
struct alignas(16) Totals {
    float acc[ROWS][COLUMNS], base[ROWS], sum[ROWS];
    static_assert(COLUMNS % BATCH == 0, "whole batches");

    // Who gives its address away keeps it in memory.
    __device__ __forceinline__ Totals() { asm volatile("" ::"l"(this) : "memory"); }
};

// total = old * total + x, of which `x` keeps what is rounded off; `old` is a power of 2. Where x is the larger one, as few
// are, its last bit may be lost.
__device__ __forceinline__ void move_to(float& total, float old, float& x) {
    float sum = fmaf(old, total, x);
    x -= fmaf(-old, total, sum);
    total = sum;
}

// A span ends, after which others follow: what a thread has of its rows joins the totals. `at(i, n)` is accumulator n of row
// i. All numbers are finite.
template <int ROWS, int COLUMNS, typename At>
__device__ __forceinline__ void close_span(
    Totals<ROWS, COLUMNS>& totals, float (&base)[ROWS], float (&sum)[ROWS], At at, bool first) {
    bool large = false;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        float old = first ? 0 : exp2_of(totals.base[i] - base[i]), its_sum = first ? 0 : totals.sum[i];
        move_to(its_sum, old, sum[i]);
        totals.base[i] = base[i], totals.sum[i] = its_sum;
        large |= its_sum > MOST_SUM;
#pragma unroll
        for (int n = 0; n < COLUMNS; n += BATCH) {
            float total[BATCH] = {};
            // So many are read at once and not all of them, which would not fit the registers.
            asm volatile("" ::: "memory");
            if (!first)
#pragma unroll
                for (int j = 0; j < BATCH; ++j) total[j] = totals.acc[i][n + j];
#pragma unroll
            for (int j = 0; j < BATCH; ++j) move_to(total[j], old, at(i, n + j)), totals.acc[i][n + j] = total[j];
        }
    }
    if (!__any_sync(~0u, large)) return;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        base[i] += 1, sum[i] *= 0.5f;
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) at(i, n) *= 0.5f;
    }
}

// The rows have all spans, of which the last is not closed.
template <int ROWS, int COLUMNS, typename At>
__device__ __forceinline__ void join_totals(
    const Totals<ROWS, COLUMNS>& totals, const float (&base)[ROWS], float (&sum)[ROWS], At at) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        float old = exp2_of(totals.base[i] - base[i]);
        sum[i] = fmaf(old, totals.sum[i], sum[i]);
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) at(i, n) = fmaf(old, totals.acc[i][n], at(i, n));
    }
}

// Whether a row of the block has a sum that is not finite; a barrier. Finite values have finite sums.
template <int ROWS, int COLUMNS, typename At>
__device__ __forceinline__ bool irregular(const float (&sum)[ROWS], At at) {
    float zero = 0;  // x * 0 is NaN for those
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        zero = fmaf(sum[i], 0.0f, zero);
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) zero = fmaf(at(i, n), 0.0f, zero);
    }
    return __syncthreads_or(zero != zero);
}

// The base of a row's state, from that of its weights.
__device__ __forceinline__ double natural_base(float base) {
    return base == LOWEST ? negative_infinity(0.0) : (double(base) + SPAN_BITS) * LN2;
}
