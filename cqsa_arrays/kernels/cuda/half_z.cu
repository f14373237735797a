// attend, float16 and bfloat16 on tensor cores: mma.sync m16n8k16, float32 accumulation; compute capability 8.0 and newer.
//
// A block of BLOCK_ROWS rows walks the tiles of BLOCK_KEYS keys. A warp owns ROW_TILES x 16 rows for good, so that softmax
// rows stay inside a quad of lanes, and every key or value fragment that it reads serves ROW_TILES products.
//
//                 keys of the tile                            value columns
//   warp 0   +--------------------------+              +------------------------+
//   16 x RT  |  S = Q K^T, registers    |  P = 2^(Sc-b)|  O += P V, registers   |
//   warp 1   +--------------------------+  ----------> +------------------------+
//     ...    |                          |  as A operand|                        |
//
// Shared memory: Q, then two K tiles, then two V tiles; rows are 16 bytes longer than the vectors, an odd number of
// 16-byte words, so that the eight rows of an ldmatrix lie in different banks:
//   SHARED_BYTES = 2 * ((BLOCK_ROWS + 2 BLOCK_KEYS) (HEAD_DIM + 8) + 2 BLOCK_KEYS (VALUE_DIM + 8))
// One barrier a tile: it says that tile i has arrived and that everybody is done with tile i - 1, whose place tile i + 1
// takes while tile i is computed.
//
// Sources: Dao, "FlashAttention-2", arXiv 2307.08691 (the loop, rows by warps); PTX ISA, "Matrix fragments for
// mma.m16n8k16" and "ldmatrix"; rescaling only when a maximum grew: Zadouri et al., "FlashAttention-4".
// Defines: ELEMENT (FLOAT16 or BFLOAT16), HEAD_DIM, VALUE_DIM, BLOCK_ROWS, BLOCK_KEYS, WARPS, SHARED_BYTES.
#include "copy.cuh"
#include "finish.cuh"
#include "simple.cuh"

constexpr int THREADS = 32 * WARPS, ROW_TILES = BLOCK_ROWS / (16 * WARPS), ROWS = 2 * ROW_TILES;
constexpr int KEY_PITCH = HEAD_DIM + 8, VALUE_PITCH = VALUE_DIM + 8;
constexpr int STAGE_PITCH = VALUE_DIM + 4;  // floats
constexpr int SCORE_TILES = BLOCK_KEYS / 8, VALUE_TILES = VALUE_DIM / 8;
// Query fragments stay in registers where they are few, and are read again for every tile where they are not.
#ifndef STAY
#define STAY (HEAD_DIM <= 64)
#endif
constexpr bool QUERIES_STAY = STAY;
#ifndef CHUNK
#define CHUNK SCORE_TILES
#endif
#ifndef PAIRED
#define PAIRED 0
#endif
#ifndef COPY
#define COPY 0
#endif
#ifndef LAZY
#define LAZY 8
#endif
constexpr float LOWEST = -3.402823466e38f;

// Warps that compute their products together; the groups take turns.
constexpr int GROUPS = WARPS / 4, GROUP_THREADS = THREADS / GROUPS;
struct Shared {
    uint16 queries[BLOCK_ROWS * KEY_PITCH];
    uint16 keys[2][BLOCK_KEYS * KEY_PITCH];
    uint16 values[3][BLOCK_KEYS * VALUE_PITCH];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host computes the same size");
static_assert(16 * WARPS * STAGE_PITCH * 4 <= sizeof(Shared::keys) + sizeof(Shared::values), "rows are staged there");
static_assert(GROUPS == 1 || GROUPS == 2, "");
static_assert(ROW_TILES * 16 * WARPS == BLOCK_ROWS && BLOCK_KEYS % 16 == 0, "whole fragments");

__device__ __forceinline__ void load_matrices(uint32 (&to)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
}
__device__ __forceinline__ void load_transposed(uint32 (&to)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
}

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

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// What a thread keeps of its rows: row i of ROWS is row  warp * 16 ROW_TILES + 16 (i / 2) + 8 (i % 2) + lane / 4.
struct Rows {
    float best[ROWS], base[ROWS];
    float sum[ROWS];                             // of this lane's weights
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

__device__ __forceinline__ int row_of(int thread, int i) {
    return thread / 32 * 16 * ROW_TILES + i / 2 * 16 + i % 2 * 8 + thread % 32 / 4;
}

// The 16 x 16 query fragment of row tile t and columns 16 k ..
__device__ __forceinline__ void load_queries(uint32 (&a)[4], uint32 queries, int t, int k) {
    load_matrices(a, queries + 2 * (t * 16 * KEY_PITCH + k * 16));
}

// Columns begin .. begin + CHUNK - 1 of S = Q K^T, in tiles of 8; addresses are those of this lane's rows.
__device__ __forceinline__ void score_chunk(
    Scores& scores, const uint32 (&kept)[ROW_TILES][HEAD_DIM / 16][4], uint32 queries, uint32 keys, int begin) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t)
        for (int n = begin; n < begin + CHUNK; ++n)
            for (int e = 0; e < 4; ++e) scores.at[t][n][e] = 0;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k) {
        uint32 a[ROW_TILES][4];
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t) {
            if (QUERIES_STAY) {
                for (int e = 0; e < 4; ++e) a[t][e] = kept[t][k][e];
            } else {
                load_queries(a[t], queries, t, k);
            }
        }
#pragma unroll
        for (int n = begin; n < begin + CHUNK; n += 2) {
            uint32 b[4];
            load_matrices(b, keys + 2 * (n * 8 * KEY_PITCH + k * 16));
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t) {
                multiply(scores.at[t][n], a[t], b[0], b[1]);
                multiply(scores.at[t][n + 1], a[t], b[2], b[3]);
            }
        }
    }
}

__device__ __forceinline__ void best_of_scores(Rows& rows, const Scores& scores) {
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            rows.best[i] = fmaxf(rows.best[i], fmaxf(scores.at[i / 2][n][i % 2 * 2], scores.at[i / 2][n][i % 2 * 2 + 1]));
}

// threadIdx.x where it may not be worked out before the loop: what only rare tiles need would take registers.
__device__ __forceinline__ int thread_now() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// Scores of keys that a row does not see become -inf; `first` is the token of the tile's first key.
__device__ __forceinline__ void hide(Scores& scores, const Call& call, int64 block_row, int64 first, int count) {
    int thread = thread_now();
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        Interval seen = visible_keys(call, least(block_row + row_of(thread, i), call.query_tokens - 1));
        int low = int(most(0, least(seen.low - first, BLOCK_KEYS))), high = int(most(0, least(seen.high - first, count)));
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
            for (int e = 0; e < 2; ++e) {
                int key = n * 8 + thread % 4 * 2 + e;
                float& score = scores.at[i / 2][n][i % 2 * 2 + e];
                score = key >= low && key < high ? score : negative_infinity(0.0f);
            }
    }
}

// The largest scores of the lanes of a row become its base.
__device__ __forceinline__ void rebase(Rows& rows, float c) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        rows.best[i] = fmaxf(rows.best[i], __shfl_xor_sync(~0u, rows.best[i], 1));
        rows.best[i] = fmaxf(rows.best[i], __shfl_xor_sync(~0u, rows.best[i], 2));
        float base = fmaxf(__fmul_rn(rows.best[i], c), rows.base[i]);
        float alpha = exp2_of(rows.base[i] - base);
        rows.sum[i] *= alpha, rows.base[i] = base;
#pragma unroll
        for (int n = 0; n < VALUE_TILES; ++n)
            for (int e = 0; e < 2; ++e) rows.acc[i / 2][n][i % 2 * 2 + e] *= alpha;
    }
}

// One step of the online softmax: scores become weights, sums and accumulators go over to the new maxima.
__device__ __forceinline__ void soften(Weights& weights, Scores& scores, Rows& rows, float c) {
    best_of_scores(rows, scores);
    bool grew = false;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) grew |= __fmul_rn(rows.best[i], c) > rows.base[i] + float(LAZY);
    if (__builtin_expect(__any_sync(~0u, grew), 0)) rebase(rows, c);
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            float *pair = &scores.at[i / 2][n][i % 2 * 2];
            pair[0] = exp2_of(fmaf(pair[0], c, -rows.base[i])), pair[1] = exp2_of(fmaf(pair[1], c, -rows.base[i]));
            rows.sum[i] += pair[0] + pair[1];
            weights.at[n / 2][i / 2][n % 2 * 2 + i % 2] = packed(pair[0], pair[1]);
        }
}

// O += P V: the weights of 16 keys are an A operand as they lie in the registers.
template <typename F>
__device__ __forceinline__ void add_values(Rows& rows, const Weights& weights, uint32 values, F beside) {
#pragma unroll
    for (int k = 0; k < BLOCK_KEYS / 16; ++k) {
#pragma unroll
        for (int n = 0; n < VALUE_TILES; n += 2) {
            uint32 b[4];
            load_transposed(b, values + 2 * (k * 16 * VALUE_PITCH + n * 8));
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t) {
                multiply(rows.acc[t][n], weights.at[k][t], b[0], b[1]);
                multiply(rows.acc[t][n + 1], weights.at[k][t], b[2], b[3]);
            }
        }
        beside(k);
    }
}

__device__ __forceinline__ void add_values(Rows& rows, const Weights& weights, uint32 values) { add_values(rows, weights, values, [](int) {}); }

// Whether the value tile holds an infinity or NaN; a barrier.
__device__ bool irregular(const uint16* values) {
    constexpr uint16 EXPONENT = ELEMENT == FLOAT16 ? 0x7c00 : 0x7f80;
    bool found = false;
#pragma unroll 1
    for (int i = thread_now(); i < BLOCK_KEYS * VALUE_DIM; i += THREADS)
        found |= (values[i / VALUE_DIM * VALUE_PITCH + i % VALUE_DIM] & EXPONENT) == EXPONENT;
    return __syncthreads_or(found);
}

// Merge the span into the state, or finish the rows; the accumulators are empty afterwards. `stage` is free memory of the
// block, 16 * WARPS rows of VALUE_PITCH floats.
__device__ __forceinline__ void end_span(
    Rows& rows, const Call& call, const Place& block, SpanEnds ends, float c, float* stage) {
    if (LAZY) rebase(rows, c);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* staged = stage + warp * 16 * STAGE_PITCH;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        rows.sum[i] += __shfl_xor_sync(~0u, rows.sum[i], 1);
        rows.sum[i] += __shfl_xor_sync(~0u, rows.sum[i], 2);
    }
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
#pragma unroll
        for (int n = 0; n < VALUE_TILES; ++n)
            for (int e = 0; e < 4; ++e)
                staged[(lane / 4 + e / 2 * 8) * STAGE_PITCH + n * 8 + lane % 4 * 2 + e % 2] = rows.acc[t][n][e];
        // Row r of the tile is with the four lanes from 4 (r % 8) on: rows 0-7 as 2 t, rows 8-15 as 2 t + 1.
        int holder = lane % 8 * 4;
        float sums[2], bests[2];
        for (int half = 0; half < 2; ++half) {
            sums[half] = __shfl_sync(~0u, rows.sum[2 * t + half], holder);
            bests[half] = __shfl_sync(~0u, rows.base[2 * t + half], holder);
        }
        bool upper = lane / 8 % 2;
        float best = upper ? bests[1] : bests[0];
        double base = best == LOWEST ? negative_infinity(0.0) : double(best) * LN2;
        int64 first = block.row + (warp * ROW_TILES + t) * 16;
        end_rows<float>(call, block, first, staged, STAGE_PITCH, base, upper ? sums[1] : sums[0], ends);
    }
    rows.clear();
}

// This thread's part in copying whole tiles of rows of WIDTH columns, WORD columns at a time.
template <int WIDTH, int PITCH>
struct Stream {
    static constexpr int WORDS = WIDTH / 8, LANES = WORDS & -WORDS, PASS = GROUP_THREADS / LANES;
    const uint16* from;  // of the next tile
    uint32 to;           // in the first tile's memory

    __device__ static int column() { return threadIdx.x % LANES * 8; }
    __device__ static int row() { return threadIdx.x / LANES; }
    __device__ void start(const uint16* tile, int64 stride) {
        int thread = thread_now();
        from = tile + thread / LANES * stride + thread % LANES * 8;
    }
    __device__ __forceinline__ void copy(uint32 memory, int64 stride, int columns) {
#pragma unroll
        for (int pass = 0; pass < (BLOCK_KEYS + PASS - 1) / PASS; ++pass) {
#pragma unroll
            for (int j = 0; j < WORDS; j += LANES)
                if (BLOCK_KEYS % PASS == 0 || row() + pass * PASS < BLOCK_KEYS)
                    copy_word(memory + to + 2 * (pass * PASS * PITCH + j * 8), from + j * 8, column() + j * 8 < columns);
            from += PASS * stride;
        }
    }
    static constexpr int PASSES = (BLOCK_KEYS + PASS - 1) / PASS;
    __device__ __forceinline__ void copy_part(uint32 memory, int64 stride, int columns, int part, int parts, int go) {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            if (pass * parts / PASSES != part) continue;
#pragma unroll
            for (int j = 0; j < WORDS; j += LANES)
                asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p cp.async.cg.shared.global [%0], [%1], 16, %2; }"
                    ::"r"(memory + to + 2 * (pass * PASS * PITCH + j * 8)), "l"(from + pass * PASS * stride + j * 8),
                      "r"(column() + j * 8 < columns ? 16 : 0), "r"(go));
        }
        if (part == parts - 1 && go) from += BLOCK_KEYS * stride;
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

// Turns of the groups: `enter` waits until the other group has left. With one group, a barrier of the block.
__device__ __forceinline__ void enter(int group) {
    copies_arrived();
    if (GROUPS == 1) {
        __syncthreads();
    } else {
        if (PAIRED && group) asm volatile("bar.sync %0, 64;" ::"r"(threadIdx.x / 32 % 4 + 2) : "memory");
        else asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(THREADS) : "memory");
    }
}
__device__ __forceinline__ void leave(int group) {
    if (PAIRED && group == 0) asm volatile("bar.arrive %0, 64;" ::"r"(threadIdx.x / 32 % 4 + 2) : "memory");
    else if (GROUPS == 2) asm volatile("bar.arrive %0, %1;" ::"r"(2 - group), "n"(THREADS) : "memory");
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
    int span_piece, span_offset, span_keys;
    SpanEnds ends;
    bool over;

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
        ends.last = !walk.more(call);
        over = ends.last || span_keys >= call.span_keys;
        return stretch;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend(const __grid_constant__ Call call) {
    extern __shared__ __align__(16) char memory[];
    __shared__ __align__(8) char course_memory[sizeof(Course)];
    Course& course = *reinterpret_cast<Course*>(course_memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Place block = place_of<BLOCK_ROWS>(call);
    const BlockView& view = view_of_rows<THREADS>(call, block.row, BLOCK_ROWS);
    if (threadIdx.x == 0) {
        course.block = block, course.walk = Walk<BLOCK_KEYS>(call, view);
        course.ends = {bool(call.fresh), !course.walk.more(call)};
        course.over = true;
    }
    const uint16* query = static_cast<const uint16*>(call.queries) + element_of(call.query_strides, block, block.row);
    copy_rows<uint16, BLOCK_ROWS, HEAD_DIM, KEY_PITCH, THREADS>(
        shared.queries, query, call.query_strides.token, int(least(call.query_tokens - block.row, BLOCK_ROWS)),
        call.head_dim, call.aligned);
    copies_issued();
    copies_arrived();
    __syncthreads();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int group = GROUPS == 1 ? 0 : __shfl_sync(~0u, warp / 4, 0);
    uint32 by_row = lane % 16, by_column = lane / 16 * 8;
    uint32 queries = shared_address(shared.queries + (warp * 16 * ROW_TILES + by_row) * KEY_PITCH + by_column);
    uint32 keys_at = shared_address(shared.keys[0]) + 2 * ((lane % 8 + lane / 16 * 8) * KEY_PITCH + lane / 8 % 2 * 8);
    uint32 values_at = shared_address(shared.values[0]) + 2 * (by_row * VALUE_PITCH + by_column);
    uint32 kept[ROW_TILES][HEAD_DIM / 16][4];
    if (QUERIES_STAY)
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t)
            for (int k = 0; k < HEAD_DIM / 16; ++k) load_queries(kept[t][k], queries, t, k);

    const float c = float(call.scale * LOG2E);
    Rows rows;
    rows.clear();
    Stream<HEAD_DIM, KEY_PITCH> key_stream;
    Stream<VALUE_DIM, VALUE_PITCH> value_stream;
    key_stream.to = shared_address(shared.keys[0]) + 2 * (key_stream.row() * KEY_PITCH + key_stream.column());
    value_stream.to = shared_address(shared.values[0]) + 2 * (value_stream.row() * VALUE_PITCH + value_stream.column());
    constexpr uint32 KEY_TILE = sizeof(shared.keys[0]), VALUE_TILE = sizeof(shared.values[0]);
    while (true) {
        while (!course.ends.last) {
            Course now = course;
            if (now.over) now.span_piece = now.walk.piece, now.span_offset = now.walk.offset, now.span_keys = 0;
            Stretch stretch = now.next(call, view);
            __syncthreads();
            if (threadIdx.x == 0) course = now;
            const Piece& piece = call.pieces[stretch.piece];
            const uint16* key = static_cast<const uint16*>(piece.keys) + element_of(call.key_strides, now.block, stretch.offset);
            const uint16* value =
                static_cast<const uint16*>(piece.values) + element_of(call.value_strides, now.block, stretch.offset);
            copy_slowly<BLOCK_KEYS, HEAD_DIM, KEY_PITCH>(
                shared.keys[0], key, call.key_strides.token, stretch.count, call.head_dim, call.aligned);
            copy_slowly<BLOCK_KEYS, VALUE_DIM, VALUE_PITCH>(
                shared.values[0], value, call.value_strides.token, stretch.count, call.value_dim, call.aligned);
            copies_issued();
            key_stream.start(key + BLOCK_KEYS * call.key_strides.token, call.key_strides.token);
            value_stream.start(value + BLOCK_KEYS * call.value_strides.token, call.value_strides.token);
            copies_arrived();
            __syncthreads();
            int low = stretch.low, full = max(stretch.high - stretch.low, 0);
            int after = stretch.tiles - 1;
            int64 last_token = piece.start + stretch.offset + after * BLOCK_KEYS;
            int count = stretch.count;
            if (GROUPS == 2 && group == 1) leave(group);
            enter(group);
            uint32 key_here = 0, value_here = 0, value_next = VALUE_TILE;
            if (group == 0 && after > 0) {
                key_stream.copy(KEY_TILE, call.key_strides.token, call.head_dim);
                value_stream.copy(VALUE_TILE, call.value_strides.token, call.value_dim);
                copies_issued();
            }
            Scores scores;
            Weights weights;
            score_chunk(scores, kept, queries, keys_at, 0);
            leave(group);
            while (true) {
                if (__builtin_expect(uint32(after - low) >= uint32(full), 0)) {
                    if (irregular(shared.values[0] + value_here / 2))
                        return simple_rows<ELEMENT, float, BLOCK_ROWS, BLOCK_KEYS, THREADS>(
                            call, course.block, view,
                            Walk<BLOCK_KEYS>::back_at(call, view, course.span_piece, course.span_offset), course.ends.first);
                    hide(scores, call, course.block.row, last_token - after * BLOCK_KEYS, count);
                }
                soften(weights, scores, rows, c);
                if (after == 0) break;
                --after;
                enter(group);
                uint32 to = value_next == 2 * VALUE_TILE ? 0 : value_next + VALUE_TILE;
                if (COPY == 0 && group == 0 && after > 0) {
                    key_stream.copy(key_here, call.key_strides.token, call.head_dim);
                    value_stream.copy(to, call.value_strides.token, call.value_dim);
                    copies_issued();
                }
                int go = group == 0 && after > 0;
                uint32 key_to = key_here;
                key_here = KEY_TILE - key_here;
                if (COPY == 1) {
                    constexpr int PARTS = BLOCK_KEYS / 16;
                    add_values(rows, weights, values_at + value_here, [&](int k) {
                        key_stream.copy_part(key_to, call.key_strides.token, call.head_dim, k, PARTS, go);
                        value_stream.copy_part(to, call.value_strides.token, call.value_dim, k, PARTS, go);
                    });
                    copies_issued();
                } else {
                    add_values(rows, weights, values_at + value_here);
                }
                score_chunk(scores, kept, queries, keys_at + key_here, 0);
                if (COPY == 2 && group == 0 && after > 0) {
                    leave(group);
                    key_stream.copy(key_to, call.key_strides.token, call.head_dim);
                    value_stream.copy(to, call.value_strides.token, call.value_dim);
                    copies_issued();
                } else
                leave(group);
                value_here = value_next, value_next = value_next == 2 * VALUE_TILE ? 0 : value_next + VALUE_TILE;
            }
            enter(group);
            add_values(rows, weights, values_at + value_here);
            if (group == 0) leave(group);
            __syncthreads();
            if (course.over) break;
        }
        end_span(rows, call, course.block, course.ends, c, reinterpret_cast<float*>(shared.keys));
        if (course.ends.last) return;
        __syncthreads();
        if (threadIdx.x == 0) course.ends.first = false;
        __syncthreads();
    }
}
