// Element types as bits, and their conversions: float16 and bfloat16 are 16-bit words here.
#pragma once
#include "call.cuh"

typedef unsigned short uint16;

__device__ __forceinline__ float half_to_float(uint16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ float bfloat_to_float(uint16 bits) { return __uint_as_float(uint32(bits) << 16); }

__device__ __forceinline__ uint16 float_to_half(float value) {
    uint16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
__device__ __forceinline__ uint16 float_to_bfloat(float value) {
    uint16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Element `index` of an array of KIND in the arithmetic REAL.
template <int KIND, typename REAL>
__device__ __forceinline__ REAL load_element(const void* array, int64 index) {
    if (KIND == FLOAT16) return half_to_float(static_cast<const uint16*>(array)[index]);
    if (KIND == BFLOAT16) return bfloat_to_float(static_cast<const uint16*>(array)[index]);
    if (KIND == FLOAT32) return static_cast<const float*>(array)[index];
    return static_cast<const double*>(array)[index];
}

// Store `value` as element `index` of an array of KIND, rounded once.
template <int KIND, typename REAL>
__device__ __forceinline__ void store_as(void* array, int64 index, REAL value) {
    if (KIND == FLOAT16) static_cast<uint16*>(array)[index] = float_to_half(value);
    if (KIND == BFLOAT16) static_cast<uint16*>(array)[index] = float_to_bfloat(value);
    if (KIND == FLOAT32) static_cast<float*>(array)[index] = value;
    if (KIND == FLOAT64) static_cast<double*>(array)[index] = value;
}

// The same of the type that `kind` names.
template <typename REAL>
__device__ __forceinline__ void store_element(void* array, int kind, int64 index, REAL value) {
    switch (kind) {
        case FLOAT16: return store_as<FLOAT16>(array, index, value);
        case BFLOAT16: return store_as<BFLOAT16>(array, index, value);
        case FLOAT32: return store_as<FLOAT32>(array, index, value);
        default: return store_as<FLOAT64>(array, index, value);
    }
}
