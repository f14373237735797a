// Sums of a launch for the kernels of float32: spans of keys are accumulated from zero in registers, and added up from zero
// in float64.
//
// Bases of weights are whole powers of 2, so that moving one costs no rounding. They are kept as float32; LOWEST before any
// key was seen.
#pragma once
#include "fragment.cuh"
#include "state.cuh"

constexpr float LOWEST = -3.402823466e38f;
// Weights of a span are at most 2^-SPAN_BITS, so that their sum is at most 1, and sums of values no larger than these.
constexpr int SPAN_BITS = 12;

// The least whole number from `x` on; LOWEST for -inf.
__device__ __forceinline__ float whole(float x) { return fmaxf(ceilf(x), LOWEST); }

// Elements of a row's totals that are read at once: a wait for each would take longer than all.
constexpr int BATCH = 4;

// What the spans of a launch have come to so far. It lies in local memory, of which the driver keeps some for every thread
// that can be resident anyway, and is touched once a span: it takes neither registers nor memory of the plan.
template <int ROWS, int COLUMNS>
struct Totals {
    float base[ROWS];
    double sum[ROWS], acc[ROWS][COLUMNS];

    // Who gives its address away keeps it in memory.
    __device__ __forceinline__ Totals() { asm volatile("" ::"l"(this) : "memory"); }
};

// Row i of a thread at the end of a span, its sum that of all lanes. `at(n)` is its n-th accumulator. Where more keys
// follow, `totals` take it over, together with those before; else the row has it all.
template <int ROWS, int COLUMNS, typename At>
__device__ __forceinline__ void close_row(
    Totals<ROWS, COLUMNS>& totals, int i, float& base, float& sum, At at, bool first, bool last) {
    static_assert(COLUMNS % BATCH == 0, "whole batches");
    if (first && last) return;
    float before = first ? LOWEST : totals.base[i], joint = fmaxf(base, before);
    float fresh = exp2_of(base - joint), old = exp2_of(before - joint);
    double total = sum * fresh;
    if (!first) total = fma(totals.sum[i], double(old), total);
    // Kept at 1 at most.
    if (total > 1) joint += 1, fresh *= 0.5f, old *= 0.5f, total *= 0.5;
    base = joint, sum = float(total);
    totals.base[i] = joint, totals.sum[i] = total;
#pragma unroll
    for (int n = 0; n < COLUMNS; n += BATCH) {
        double before[BATCH] = {};
        if (!first)
#pragma unroll
            for (int j = 0; j < BATCH; ++j) before[j] = totals.acc[i][n + j];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            double acc = fma(before[j], double(old), double(at(n + j)) * double(fresh));
            if (last) {
                at(n + j) = float(acc);
            } else {
                totals.acc[i][n + j] = acc;
            }
        }
    }
}

// The base of a row's state, from that of its weights.
__device__ __forceinline__ double natural_base(float base) {
    return base == LOWEST ? negative_infinity(0.0) : (double(base) + SPAN_BITS) * LN2;
}
