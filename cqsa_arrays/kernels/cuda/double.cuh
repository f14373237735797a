// Parts of double.cu: the matrix instruction in the shapes that there are, the exponential function, copies of tiles.
//
// Compute capability 9.0 has instructions of 16 x 8 x 16, 16 x 8 x 8 and 16 x 8 x 4; all others have 8 x 8 x 4 only, of
// which the assembler makes the larger ones. MMA_ROWS and MMA_DEPTH name the largest that is to be used.
//
// Sources: PTX ISA, "Matrix fragments" for mma.m8n8k4, m16n8k4, m16n8k8 and m16n8k16 with .f64; Tang, "Table-driven
// implementation of the exponential function in IEEE floating-point arithmetic", ACM TOMS 15 (1989).
#pragma once
#include "copy.cuh"

#ifndef MMA_ROWS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define MMA_ROWS 16
#define MMA_DEPTH 16
#else
#define MMA_ROWS 8
#define MMA_DEPTH 4
#endif
#endif

// sum (16 x 8) += a (16 x DEPTH) b (DEPTH x 8). Lane 4 g + t holds  sum[2 h + e]: row g + 8 h, column 2 t + e;
// a[2 i + h]: row g + 8 h, b[i]: column g, both at depth 4 i + t. Which key or column stands at which depth is free, as
// long as a and b agree.
template <int ROWS_OF_A, int DEPTH>
struct Instruction;

template <>
struct Instruction<16, 16> {
    static __device__ __forceinline__ void multiply(double (&sum)[4], const double* a, const double* b) {
        asm("mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7,%8,%9,%10,%11}, {%12,%13,%14,%15}, {%0,%1,%2,%3};"
            : "+d"(sum[0]), "+d"(sum[1]), "+d"(sum[2]), "+d"(sum[3])
            : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(a[4]), "d"(a[5]), "d"(a[6]), "d"(a[7]),
              "d"(b[0]), "d"(b[1]), "d"(b[2]), "d"(b[3]));
    }
};
template <>
struct Instruction<16, 8> {
    static __device__ __forceinline__ void multiply(double (&sum)[4], const double* a, const double* b) {
        asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+d"(sum[0]), "+d"(sum[1]), "+d"(sum[2]), "+d"(sum[3])
            : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
    }
};
template <>
struct Instruction<16, 4> {
    static __device__ __forceinline__ void multiply(double (&sum)[4], const double* a, const double* b) {
        asm("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+d"(sum[0]), "+d"(sum[1]), "+d"(sum[2]), "+d"(sum[3])
            : "d"(a[0]), "d"(a[1]), "d"(b[0]));
    }
};
template <>
struct Instruction<8, 4> {
    static __device__ __forceinline__ void multiply(double (&sum)[4], const double* a, const double* b) {
        for (int half = 0; half < 2; ++half)
            asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
                : "+d"(sum[2 * half]), "+d"(sum[2 * half + 1])
                : "d"(a[half]), "d"(b[0]));
    }
};

// The same of depth 4 COUNT, by as few instructions as there may be.
template <int COUNT>
__device__ __forceinline__ void multiply(double (&sum)[4], const double* a, const double* b) {
    constexpr int DEPTH = 4 * COUNT < MMA_DEPTH ? 4 * COUNT : MMA_DEPTH;
#pragma unroll
    for (int slot = 0; slot < COUNT; slot += DEPTH / 4)
        Instruction<MMA_ROWS, DEPTH>::multiply(sum, a + 2 * slot, b + slot);
}

// The largest weight is 2^-SMALL after a new base, and may grow by 2^GROWTH before the next: the sum of 2^32 of them is at
// most 1, and sums of values are no larger than these.
constexpr int SMALL = 40, GROWTH = 8;

// 2^(j / 16 - 960 - SMALL)
__constant__ double POWERS[16] = {
    0x1.0000000000000p-1000, 0x1.0b5586cf9890fp-1000, 0x1.172b83c7d517bp-1000, 0x1.2387a6e756238p-1000,
    0x1.306fe0a31b715p-1000, 0x1.3dea64c123422p-1000, 0x1.4bfdad5362a27p-1000, 0x1.5ab07dd485429p-1000,
    0x1.6a09e667f3bcdp-1000, 0x1.7a11473eb0187p-1000, 0x1.8ace5422aa0dbp-1000, 0x1.9c49182a3f090p-1000,
    0x1.ae89f995ad3adp-1000, 0x1.c199bdd85529cp-1000, 0x1.d5818dcfba487p-1000, 0x1.ea4afa2a490dap-1000};

// 2^(x c / 16 - SMALL) for c > 0 and x c / 16 up to GROWTH; 0 where x c / 16 is below -960, also of -inf; of NaN either 0
// or NaN.
// With n = round(x c) and the rest f, 2^(n / 16) is made of `powers` and the exponent, 2^(f / 16) = 1 + f p(f) of an
// interpolation at the Chebyshev points (relative error 2^-56). `powers` is POWERS in shared memory: 16 doubles lie in
// every bank once, so that no two lanes are in each other's way.
__device__ __forceinline__ double weight_of(double x, double c, const double* powers) {
    constexpr double SHIFT = 6755399441055744.0 + 16 * 960;  // 1.5 * 2^52: the sum's low word is n + 16 * 960
    double shifted = fma(x, c, SHIFT), f = fma(x, c, SHIFT - shifted);
    double p = fma(f, 9.181354192172116e-12, 1.2716120543851127e-09);
    p = fma(f, p, 1.4676100321236697e-07);
    p = fma(f, p, 1.3550807776390032e-05);
    p = fma(f, p, 0.0009383847928089877);
    p = fma(f, p, 0.04332169878499668);
    p = fma(f, p, 1.0);
    int n = __double2loint(shifted);
    double power = powers[n & 15];
    power = __hiloint2double(__double2hiint(power) + ((n & ~15) << 16), __double2loint(power));
    return __double2hiint(shifted) >= 0x43380000 ? power * p : 0.0;
}

// 2^(x c / 16), likewise.
__device__ __forceinline__ double factor_of(double x, double c, const double* powers) {
    return double(1ll << SMALL) * weight_of(x, c, powers);
}

// 8 bytes, or zeros where `wanted` is false; for arrays without borders of 16 bytes.
__device__ __forceinline__ void copy_half_word(uint32 to, const void* from, bool wanted) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(wanted ? 8 : 0));
}

// ROWS rows as `copy_rows` copies them, in words of WORD doubles, asynchronous in either case. 16 threads share a
// row, so that a thread's rows and columns are equal steps apart, of which one address and few registers are made.
template <int WORD, int ROWS, int WIDTH, int PITCH, int THREADS>
__device__ __forceinline__ void copy_tile(double* to, const double* from, int64 stride, int count, int columns) {
    int column = threadIdx.x % 16 * WORD;
    const double* source = from + threadIdx.x / 16 * stride + column;
#pragma unroll
    for (int first = 0; first < ROWS; first += THREADS / 16) {
        int row = first + threadIdx.x / 16;
        if (ROWS % (THREADS / 16) != 0 && row >= ROWS) break;
#pragma unroll
        for (int step = 0; step < WIDTH; step += 16 * WORD) {
            uint32 target = shared_address(to + row * PITCH + column + step);
            bool wanted = row < count && column + step < columns;
            if (WORD == 2) {
                copy_word(target, source + step, wanted);
            } else {
                copy_half_word(target, source + step, wanted);
            }
        }
        source += THREADS / 16 * stride;
    }
}
