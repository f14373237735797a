// Parts of float32 numbers: how tiles come from global memory and are split, and how fragments of them are multiplied.
//
// Sources: PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix". Defines as in split.cu.
#pragma once
#include "copy.cuh"
#include "finish.cuh"
#include "fragment.cuh"
#include "simple.cuh"
#define BOUNDED_VALUES  // a tile with others is left to `simple_rows`
#include "totals.cuh"

constexpr int THREADS = 32 * WARPS, ROW_TILES = BLOCK_ROWS / (16 * WARPS), ROWS = 2 * ROW_TILES;
constexpr int KEY_PITCH = HEAD_DIM + 8, VALUE_PITCH = VALUE_DIM + 8;
constexpr int STAGE_PITCH = VALUE_DIM + 4;  // floats
constexpr int SCORE_TILES = BLOCK_KEYS / 8, VALUE_TILES = VALUE_DIM / 8, KEY_STEPS = BLOCK_KEYS / 16;
constexpr int TOP = 15;  // a tile's largest weight of a row is nearly 2^TOP, so that the others have their low parts
// Weights 2^SHADE times smaller than 2^TOP lose digits in their parts. What is lost is multiplied, too, 2^LIFT times as large,
// and what that loses once more.
constexpr int SHADE = 28, LIFT = 40, LIFTS = 2;
// Values scaled by more than this have sums that are scaled back before those of the weights are.
constexpr int EARLY_SCALE = 20;
constexpr uint32 TOO_LARGE = (127 + 63) << 23;  // 2^63 as bits

// The two parts of N numbers.
template <int N>
struct Parts {
    uint16 high[N], low[N];
};
struct Shared {
    Parts<BLOCK_ROWS * KEY_PITCH> queries;
    Parts<BLOCK_KEYS * KEY_PITCH> keys;
    Parts<BLOCK_KEYS * VALUE_PITCH> values;
    float raw_keys[BLOCK_KEYS * HEAD_DIM], raw_values[BLOCK_KEYS * VALUE_DIM];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host computes the same size");
static_assert(ELEMENT == FLOAT32, "copied as it is");
static_assert(ROW_TILES * 16 * WARPS == BLOCK_ROWS && BLOCK_KEYS % 16 == 0, "whole fragments");

// sum (16 x 8) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two float16 in one register, the first in the low half.
__device__ __forceinline__ uint32 packed(float low, float high) {
    uint32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// The parts of x and y: what rounding to float16 leaves of them is rounded again.
__device__ __forceinline__ void split(uint32& high, uint32& low, float x, float y) {
    high = packed(x, y);
    low = packed(x - half_to_float(uint16(high)), y - half_to_float(uint16(high >> 16)));
}

// A weight that loses digits in its parts, or zero.
__device__ __forceinline__ float shaded(float x) { return fabsf(x) < 1.0f / (1 << (SHADE - TOP)) ? x : 0; }

// What the parts in the lower halves of `high` and `low` leave of x.
__device__ __forceinline__ float lost(float x, uint32 high, uint32 low) {
    return x - half_to_float(uint16(high)) - half_to_float(uint16(low));
}

// 2^exponent, from -126 to 127.
__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((127 + exponent) << 23); }

// The power of two, at most 2^most, that brings `largest`, the bits of a magnitude, to 2^14 .. 2^15.
__device__ __forceinline__ int scale_of(uint32 largest, int most) { return min(14 + 127 - int(largest >> 23), most); }

// Bits of the larger magnitude; those of infinities and NaN are the largest.
__device__ __forceinline__ uint32 larger_of(uint32 largest, float x) {
    return max(largest, __float_as_uint(x) & 0x7fffffff);
}

// Bits of the largest magnitude that this thread sees of COUNT numbers, of the words that it copies by itself.
template <int COUNT>
__device__ __forceinline__ uint32 largest_of(const float* raw) {
    static_assert(COUNT % (4 * THREADS) == 0, "whole passes of the block");
    uint32 largest = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i += 4 * THREADS) {
        int at = i + 4 * threadIdx.x;
        float4 word = *reinterpret_cast<const float4*>(raw + at);
        largest = larger_of(larger_of(larger_of(larger_of(largest, word.x), word.y), word.z), word.w);
    }
    return largest;
}

// The parts of COUNT numbers times `scale`, rows of WIDTH to rows of WIDTH + 8.
template <int COUNT, int WIDTH, typename PARTS>
__device__ __forceinline__ void split_rows(PARTS& parts, const float* raw, float scale) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4 * THREADS) {
        int at = i + 4 * threadIdx.x;
        float4 word = *reinterpret_cast<const float4*>(raw + at);
        uint2 high, low;
        split(high.x, low.x, word.x * scale, word.y * scale), split(high.y, low.y, word.z * scale, word.w * scale);
        int to = at / WIDTH * (WIDTH + 8) + at % WIDTH;
        *reinterpret_cast<uint2*>(parts.high + to) = high, *reinterpret_cast<uint2*>(parts.low + to) = low;
    }
}

// The largest of all threads' numbers, two at once; a barrier, after which `shared` may be written once one more has passed.
struct Largest {
    uint32 a, b;
};
__device__ __forceinline__ Largest largest_of_block(Largest (&shared)[WARPS], uint32 a, uint32 b) {
    a = __reduce_max_sync(~0u, a), b = __reduce_max_sync(~0u, b);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = {a, b};
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) a = max(a, shared[warp].a), b = max(b, shared[warp].b);
    return {a, b};
}

// The block's queries, split, and the exponent of what they are scaled by; NO_SCALE where they have no parts. Two barriers.
constexpr int NO_SCALE = 1 << 20;
__device__ __noinline__ int split_queries(const Call& call, const Place& block, Shared& shared, Largest (&largest)[WARPS]) {
    const float* query = static_cast<const float*>(call.queries) + element_of(call.query_strides, block, block.row);
    int count = int(least(call.query_tokens - block.row, BLOCK_ROWS));
    uint32 seen = 0;
    for (int i = threadIdx.x; i < count * HEAD_DIM; i += THREADS)
        if (i % HEAD_DIM < call.head_dim)
            seen = larger_of(seen, query[i / HEAD_DIM * call.query_strides.token + i % HEAD_DIM]);
    seen = largest_of_block(largest, seen, 0).a;
    int scale = scale_of(seen, 112);
    for (int i = threadIdx.x; i < BLOCK_ROWS * HEAD_DIM; i += THREADS) {
        int row = i / HEAD_DIM, column = i % HEAD_DIM;
        bool exists = row < count && column < call.head_dim;
        float x = exists ? query[row * call.query_strides.token + column] * power_of_two(scale) : 0;
        uint32 high, low;
        split(high, low, x, 0);
        shared.queries.high[row * KEY_PITCH + column] = uint16(high);
        shared.queries.low[row * KEY_PITCH + column] = uint16(low);
    }
    __syncthreads();
    return seen >= TOO_LARGE ? NO_SCALE : scale;
}

// Ask for the current tile of `walk`.
__device__ __forceinline__ void fetch(Shared& shared, const Call& call, const Place& block, const Walk<BLOCK_KEYS>& walk) {
    const Piece& piece = call.pieces[walk.piece];
    const float* key = static_cast<const float*>(piece.keys) + element_of(call.key_strides, block, walk.offset);
    const float* value = static_cast<const float*>(piece.values) + element_of(call.value_strides, block, walk.offset);
    int count = walk.count(call);
    copy_rows<float, BLOCK_KEYS, HEAD_DIM, HEAD_DIM, THREADS>(
        shared.raw_keys, key, call.key_strides.token, count, call.head_dim, call.aligned);
    copy_rows<float, BLOCK_KEYS, VALUE_DIM, VALUE_DIM, THREADS>(
        shared.raw_values, value, call.value_strides.token, count, call.value_dim, call.aligned);
    copies_issued();
}
