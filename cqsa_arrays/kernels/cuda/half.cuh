// Fragments and tiles of the kernel for 16-bit elements: what a warp loads, multiplies and copies.
//
// Sources: PTX ISA, "Matrix fragments for mma.m16n8k16", "ldmatrix" and "bar". Defines as in half.cu.
#pragma once
constexpr int THREADS = 32 * WARPS, ROW_TILES = BLOCK_ROWS / (16 * WARPS);

#include "copy.cuh"
#include "finish.cuh"
#include "simple.cuh"
#include "softmax.cuh"

constexpr int KEY_PITCH = HEAD_DIM + 8, VALUE_PITCH = VALUE_DIM + 8;
constexpr int STAGE_PITCH = VALUE_DIM + 4;  // floats
// Warps that multiply at the same time; two groups of them take turns. The first one copies.
constexpr int GROUPS = WARPS / 4, GROUP_THREADS = THREADS / GROUPS;

struct Shared {
    uint16 queries[BLOCK_ROWS * KEY_PITCH];
    uint16 keys[2][BLOCK_KEYS * KEY_PITCH];
    uint16 values[3][BLOCK_KEYS * VALUE_PITCH];
};
constexpr uint32 KEY_TILE = sizeof(Shared::keys) / 2, VALUE_TILE = sizeof(Shared::values) / 3;
static_assert(sizeof(Shared) == SHARED_BYTES, "the host computes the same size");
static_assert(16 * WARPS * STAGE_PITCH * 4 <= sizeof(Shared::keys) + sizeof(Shared::values), "rows are staged there");
static_assert(GROUPS == 1 || GROUPS == 2, "two groups take turns");
static_assert(ROW_TILES * 16 * WARPS == BLOCK_ROWS && BLOCK_KEYS % 16 == 0, "whole fragments");

// sum (16 x 8) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    if (ELEMENT == FLOAT16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// This thread's part in copying whole tiles of rows of WIDTH columns.
template <int WIDTH, int PITCH>
struct Stream {
    static constexpr int WORDS = WIDTH / 8, LANES = WORDS & -WORDS, PASS = GROUP_THREADS / LANES;
    static constexpr int PASSES = (BLOCK_KEYS + PASS - 1) / PASS;
    const uint16* from;  // of the next tile
    uint32 to;           // in the first tile's memory

    __device__ static int column() { return threadIdx.x % LANES * 8; }
    // Whether this thread copies a row of that pass: the last may have fewer.
    __device__ static bool takes_part(int pass) {
        return (pass + 1) * PASS <= BLOCK_KEYS || pass * PASS + threadIdx.x / LANES < BLOCK_KEYS;
    }
    __device__ __forceinline__ explicit Stream(const uint16* tiles) {
        to = shared_address(tiles) + 2 * (threadIdx.x / LANES * PITCH + column());
    }
    __device__ void start(const uint16* tile, int64 stride) {
        int thread = thread_now();
        from = tile + thread / LANES * stride + thread % LANES * 8;
    }
    // The next tile, to `memory` bytes behind the first.
    __device__ __forceinline__ void copy(uint32 memory, int64 stride, int columns) {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
#pragma unroll
            for (int j = 0; j < WORDS && takes_part(pass); j += LANES)
                copy_word(memory + to + 2 * (pass * PASS * PITCH + j * 8), from + j * 8, column() + j * 8 < columns);
            from += PASS * stride;
        }
        from -= (PASSES * PASS - BLOCK_KEYS) * stride;
    }
    // Part `part` of `parts` of it; nothing where `wanted` is 0.
    __device__ __forceinline__ void copy_part(uint32 memory, int64 stride, int columns, int part, int parts, int wanted) {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            if (pass * parts / PASSES != part || !takes_part(pass)) continue;
#pragma unroll
            for (int j = 0; j < WORDS; j += LANES)
                asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p cp.async.cg.shared.global [%0], [%1], 16, %2; }" ::"r"(
                                 memory + to + 2 * (pass * PASS * PITCH + j * 8)),
                             "l"(from + pass * PASS * stride + j * 8), "r"(column() + j * 8 < columns ? 16 : 0), "r"(wanted));
        }
        if (part == parts - 1 && wanted) from += BLOCK_KEYS * stride;
    }
};

// Both streams of a block.
struct Streams {
    Stream<HEAD_DIM, KEY_PITCH> keys;
    Stream<VALUE_DIM, VALUE_PITCH> values;

    __device__ __forceinline__ explicit Streams(const Shared& shared) : keys(shared.keys[0]), values(shared.values[0]) {}
    __device__ __forceinline__ void copy(const Call& call, uint32 keys_to, uint32 values_to) {
        keys.copy(keys_to, call.key_strides.token, call.head_dim);
        values.copy(values_to, call.value_strides.token, call.value_dim);
        copies_issued();
    }
    __device__ __forceinline__ void copy_part(
        const Call& call, uint32 keys_to, uint32 values_to, int part, int parts, int wanted) {
        keys.copy_part(keys_to, call.key_strides.token, call.head_dim, part, parts, wanted);
        values.copy_part(values_to, call.value_strides.token, call.value_dim, part, parts, wanted);
    }
};

// As copy_rows, one word after another.
template <int ROWS, int WIDTH, int PITCH>
__device__ __forceinline__ void copy_slowly(
    uint16* to, const uint16* from, int64 stride, int count, int columns, bool aligned) {
    const int words = aligned ? WIDTH / 8 : WIDTH, width = aligned ? 8 : 1;
#pragma unroll 1
    for (int i = thread_now(); i < ROWS * words; i += THREADS) {
        int row = i / words, column = i % words * width;
        bool wanted = row < count && column < columns;
        const uint16* source = wanted ? from + row * stride + column : from;
        uint16* place = to + row * PITCH + column;
        if (aligned) copy_word(shared_address(place), source, wanted);
        else *place = wanted ? *source : uint16(0);
    }
}

// Turns of the groups: `enter` waits until the other group has left. With one group, a barrier of the block. What was
// copied before has arrived then.
__device__ __forceinline__ void enter(int group) {
    copies_arrived();
    if (GROUPS == 1) {
        __syncthreads();
    } else {
        asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(THREADS) : "memory");
    }
}
__device__ __forceinline__ void leave(int group) {
    if (GROUPS == 2) asm volatile("bar.arrive %0, %1;" ::"r"(2 - group), "n"(THREADS) : "memory");
}

// Tiles of one piece and one span that exist as a whole, the first at `offset`; of those with `after` tiles after them
// full ones have  low <= after < high.
struct Stretch {
    int piece, offset, tiles, count, low, high;
};

// Where a block stands in its keys; in shared memory, for it is looked at once in many tiles.
struct Course {
    Place block;
    Walk<BLOCK_KEYS> walk;
    Stretch stretch;
    int span_keys;
    bool over, last;  // the span, all keys

    // The stretch that begins where the walk is; the walk goes on to what follows.
    __device__ __forceinline__ Stretch next(const Call& call, const BlockView& view) {
        const Piece& piece = call.pieces[walk.piece];
        Stretch stretch = {walk.piece, walk.offset, 1, walk.count(call), 0, 0};
        int end = int(least(walk.end, piece.tokens));
        if (call.aligned && stretch.count == BLOCK_KEYS) {
            int seen = (end - walk.offset + BLOCK_KEYS - 1) / BLOCK_KEYS, whole = int(piece.tokens - walk.offset) / BLOCK_KEYS;
            stretch.tiles = min(min(seen, whole), int(call.span_keys - span_keys) / BLOCK_KEYS);
        }
        // First full tile and the one behind the last, counted in the stretch.
        int64 first = (view.inner.low - piece.start - walk.offset + BLOCK_KEYS - 1) / BLOCK_KEYS;
        int64 behind = (view.inner.high - piece.start - walk.offset) / BLOCK_KEYS;
        if (view.inner.low - piece.start - walk.offset < 0) first = 0;
        if (view.inner.high - piece.start - walk.offset < 0) behind = 0;
        if (stretch.count < BLOCK_KEYS) behind = 0;
        int from = int(least(first, stretch.tiles)), to = int(least(behind, stretch.tiles));
        stretch.low = stretch.tiles - to, stretch.high = stretch.tiles - from;
        span_keys += stretch.tiles * BLOCK_KEYS;
        walk.offset += (stretch.tiles - 1) * BLOCK_KEYS;
        walk.step(call, view);
        last = !walk.more(call);
        over = last || span_keys >= call.span_keys;
        return stretch;
    }
};

// Whether the value tile holds an infinity or NaN; a barrier.
__device__ bool irregular(const uint16* values) {
    bool found = false;
#pragma unroll 1
    for (int i = thread_now(); i < BLOCK_KEYS * VALUE_DIM / 2; i += THREADS) {
        int row = i / (VALUE_DIM / 2), pair = i % (VALUE_DIM / 2);
        found |= irregular_pair(reinterpret_cast<const uint32*>(values + row * VALUE_PITCH)[pair]);
    }
    return __syncthreads_or(found);
}
