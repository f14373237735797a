// The end of a launch's rows: their statistics over its keys are merged into the state, or the rows are finished.
//
// For each row a kernel calls `end_of_row`, which deals with m, l and lse, and gets the two factors by which every
// element of acc is then combined by `end_element`, or by `end_elements`:   acc' = old * acc + fresh * accumulated.
//
// A state leaves with l near 1, its base m moved accordingly, so that acc is a mean of values and as large as they are: a
// sum of many large values would not be finite. What is rounded off m and l goes into the factors, so that a merge costs
// acc one rounding and acc / l nothing else.
#pragma once
#include "element.cuh"

__device__ __forceinline__ float negative_infinity(float) { return __int_as_float(0xff800000); }
__device__ __forceinline__ double negative_infinity(double) { return __longlong_as_double(0xfff0000000000000ll); }
__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

struct RowEnd {
    double old, fresh;    // factors; where the row is finished, 1 / l is contained in them
    bool has_old, has_fresh;
    bool skip;            // the state stays as it is, bit for bit
};

// A finished row, of whose sum `l` on the base `top` the factors have to be freed.
template <typename REAL>
__device__ __forceinline__ void finish_row(const Call& call, const Place& place, int64 row, RowEnd& end, double top, double l, bool writer) {
    bool seen = end.has_old || end.has_fresh;
    double share = seen ? 1 / l : 0;
    end.old *= share, end.fresh *= share;
    if (!writer || !call.lse) return;
    int64 at = element_of(call.lse_strides, place, row);
    static_cast<REAL*>(call.lse)[at] = seen ? REAL(top + double(log_of(REAL(l)))) : negative_infinity(REAL(0));
}

// One row. `base` is what was subtracted from its scores (natural logarithm), `sum` the sum of its weights; a row that saw
// no key of weight above 0 has base = -inf and sum = 0. Of the threads that share the row one is its `writer`. All 32
// threads of the warp must call; threads whose row does not exist pass exists = false.
template <typename REAL>
__device__ RowEnd end_of_row(
    const Call& call, const Place& place, int64 row, double base, double sum, bool exists, bool writer) {
    const double nothing = negative_infinity(0.0);
    double m_old = nothing, l_old = 0;
    int64 at = element_of(call.stat_strides, place, row);
    if (call.m && exists && !call.fresh) m_old = static_cast<REAL*>(call.m)[at], l_old = static_cast<REAL*>(call.l)[at];
    __syncwarp();  // all threads of the row have read m and l before its writer changes them
    RowEnd end = {1, 1, !(m_old == nothing && l_old == 0), !(base == nothing && sum == 0), false};
    double top = base, l = sum;
    if (end.has_old) {
        top = end.has_fresh && base > m_old ? base : m_old;
        end.old = exp(m_old - top), end.fresh = exp(base - top);
        l = l_old * end.old + (end.has_fresh ? sum * end.fresh : 0);
    }
    if (call.out) {
        finish_row<REAL>(call, place, row, end, top, l, writer);
        return end;
    }
    end.skip = !end.has_fresh && !call.fresh;
    REAL m_new = REAL(top), l_new = REAL(l);
    if (l > 0 && l <= 1.7976931348623157e308 && end.has_fresh) {  // a NaN stays as it is
        m_new = REAL(top + log(l));
        double moved = exp(top - double(m_new)), exact = l * moved;
        l_new = REAL(exact), moved *= double(l_new) / exact;
        end.old *= moved, end.fresh *= moved;
    }
    if (writer && !end.skip) static_cast<REAL*>(call.m)[at] = m_new, static_cast<REAL*>(call.l)[at] = l_new;
    return end;
}

// What an element of a row becomes: `accumulated` by this launch, `before` in the state, which is not read where it is
// empty. The sum is rounded once.
template <typename REAL, typename TOTAL>
__device__ __forceinline__ REAL merged(const RowEnd& end, TOTAL accumulated, REAL before) {
    TOTAL fresh = end.has_fresh ? accumulated * TOTAL(end.fresh) : TOTAL(0);
    return end.has_old ? REAL(fma(double(before), end.old, end.has_fresh ? accumulated * end.fresh : 0.0)) : REAL(fresh);
}

// Column `column` of a row that exists.
template <typename REAL, typename TOTAL>
__device__ __forceinline__ void end_element(
    const Call& call, const Place& place, int64 row, int column, const RowEnd& end, TOTAL accumulated) {
    if (end.skip) return;
    REAL* acc = static_cast<REAL*>(call.acc);
    int64 at = element_of(call.acc_strides, place, row) + column;
    REAL value = merged<REAL, TOTAL>(end, accumulated, end.has_old ? acc[at] : REAL(0));
    if (call.out) {
        store_element(call.out, call.out_kind, element_of(call.out_strides, place, row) + column, value);
    } else {
        acc[at] = value;
    }
}

// Store `factor` times `at(n)` as column `column(n)` of a row whose elements begin at `first`, for n < COUNT.
template <int KIND, int COUNT, typename REAL, typename Column, typename At>
__device__ __forceinline__ void store_row(void* to, int64 first, int columns, REAL factor, Column column, At at) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
        if (column(n) < columns) store_as<KIND>(to, first + column(n), at(n) * factor);
}

// The elements of a row that exists which a thread has in registers: `at(n)`, of column `column(n)`, for n < COUNT. What is
// asked once for all, and reads that wait together, are a tenth of the instructions of one element after the other.
template <typename REAL, int COUNT, typename Column, typename At>
__device__ __forceinline__ void end_elements(
    const Call& call, const Place& place, int64 row, const RowEnd& end, Column column, At at) {
    if (end.skip) return;
    const int64 acc = element_of(call.acc_strides, place, row), out = element_of(call.out_strides, place, row);
    const int columns = call.value_dim;
    const REAL factor = end.has_old || !end.has_fresh ? REAL(1) : REAL(end.fresh);
    if (!end.has_old && !end.has_fresh) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) at(n) = 0;  // weights of 0 beside an infinite value have made it a NaN
    }
    if (end.has_old) {
        const REAL* before = static_cast<const REAL*>(call.acc) + acc;
#pragma unroll
        for (int n = 0; n < COUNT; ++n)
            if (column(n) < columns) at(n) = merged<REAL, REAL>(end, at(n), before[column(n)]);
    }
    constexpr int STATE = sizeof(REAL) == 4 ? FLOAT32 : FLOAT64;
    if (!call.out) return store_row<STATE, COUNT>(call.acc, acc, columns, factor, column, at);
    switch (call.out_kind) {
        case FLOAT16: return store_row<FLOAT16, COUNT>(call.out, out, columns, factor, column, at);
        case BFLOAT16: return store_row<BFLOAT16, COUNT>(call.out, out, columns, factor, column, at);
        case FLOAT32: return store_row<FLOAT32, COUNT>(call.out, out, columns, factor, column, at);
        default: return store_row<FLOAT64, COUNT>(call.out, out, columns, factor, column, at);
    }
}
