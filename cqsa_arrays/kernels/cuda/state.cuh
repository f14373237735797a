// The end of a span: its statistics are merged into the row's state, or the row is finished.
//
// For each row a kernel calls `end_of_span`, which deals with m, l and lse, and gets the two factors by which every
// element of acc is then combined by `end_element`:   acc' = old * acc + fresh * accumulated.
#pragma once
#include "element.cuh"

__device__ __forceinline__ float negative_infinity(float) { return __int_as_float(0xff800000); }
__device__ __forceinline__ double negative_infinity(double) { return __longlong_as_double(0xfff0000000000000ll); }
__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

template <typename REAL>
struct RowEnd {
    REAL old, fresh;      // factors; where the row is finished, 1 / l is contained in them
    bool has_old, has_fresh;
    bool skip;            // the state stays as it is, bit for bit
};

// Where a span stands: whether the state is empty before it, and whether the row's keys of this call end with it.
struct SpanEnds {
    bool first, last;
};

// One row. `base` is what was subtracted from its scores (natural logarithm; more digits than REAL has are kept), `sum`
// the sum of its weights; a row that saw no key of weight above 0 has base = -inf and sum = 0. Of the threads that share
// the row one is its `writer`. All 32 threads of the warp must call; threads whose row does not exist pass exists = false.
template <typename REAL>
__device__ RowEnd<REAL> end_of_span(
    const Call& call, const Place& place, int64 row, double base, REAL sum, SpanEnds ends, bool exists, bool writer) {
    const REAL nothing = negative_infinity(REAL(0));
    REAL m_old = nothing, l_old = 0;
    int64 at = element_of(call.stat_strides, place, row);
    if (call.m && exists && !ends.first) m_old = static_cast<REAL*>(call.m)[at], l_old = static_cast<REAL*>(call.l)[at];
    __syncwarp();  // all threads of the row have read m and l before its writer changes them
    bool has_old = !(m_old == nothing && l_old == 0);
    REAL m_fresh = REAL(base);
    bool has_fresh = !(m_fresh == nothing && sum == 0);
    // The state keeps m in REAL; what rounding takes from the base, at most 2^-24 of it, goes into the factor.
    double rounded_off = base - double(m_fresh);
    REAL fresh = rounded_off == rounded_off ? REAL(1 + rounded_off) : REAL(1);
    REAL old = 1, m_new = has_old ? m_old : m_fresh;
    if (has_old && has_fresh) {
        m_new = m_old > m_fresh ? m_old : m_fresh;
        old = exp_of(m_old - m_new), fresh *= exp_of(m_fresh - m_new);
    }
    REAL l_new = (has_old ? l_old * old : REAL(0)) + (has_fresh ? sum * fresh : REAL(0));
    if (ends.last && call.out) {
        REAL share = has_old || has_fresh ? 1 / l_new : REAL(0);
        old *= share, fresh *= share;
        if (writer && call.lse) {
            int64 lse_at = element_of(call.lse_strides, place, row);
            static_cast<REAL*>(call.lse)[lse_at] = has_old || has_fresh ? m_new + log_of(l_new) : nothing;
        }
        return {old, fresh, has_old, has_fresh, false};
    }
    bool skip = !has_fresh && !ends.first;
    if (writer && !skip) static_cast<REAL*>(call.m)[at] = m_new, static_cast<REAL*>(call.l)[at] = l_new;
    return {old, fresh, has_old, has_fresh, skip};
}

// Column `column` of a row that exists: this span's `accumulated` joins the state's, which is not read where it is empty.
template <typename REAL>
__device__ __forceinline__ void end_element(
    const Call& call, const Place& place, int64 row, int column, const RowEnd<REAL>& end, bool last, REAL accumulated) {
    if (end.skip) return;
    REAL* acc = static_cast<REAL*>(call.acc);
    int64 at = element_of(call.acc_strides, place, row) + column;
    REAL value = end.has_fresh ? accumulated * end.fresh : REAL(0);
    if (end.has_old) value += acc[at] * end.old;
    if (last && call.out) {
        store_element(call.out, call.out_kind, element_of(call.out_strides, place, row) + column, value);
    } else {
        acc[at] = value;
    }
}
