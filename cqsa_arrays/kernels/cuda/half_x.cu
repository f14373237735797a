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
#ifndef LAZY
#define LAZY 8
#endif
constexpr float LOWEST = -3.402823466e38f;

struct TileMemory {
    uint16 keys[BLOCK_KEYS * KEY_PITCH], values[BLOCK_KEYS * VALUE_PITCH];
};
struct Shared {
    uint16 queries[BLOCK_ROWS * KEY_PITCH];
    TileMemory tiles[2];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host computes the same size");
static_assert(16 * WARPS * STAGE_PITCH * 4 <= 2 * sizeof(TileMemory), "rows are staged there");
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

__device__ __forceinline__ void best_of_chunk(Rows& rows, const Scores& scores, int begin) {
#pragma unroll
    for (int n = begin; n < begin + CHUNK; ++n)
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

// One step of the online softmax: scores become weights, sums and accumulators go over to the new maxima.
__device__ __forceinline__ void soften(Scores& scores, Rows& rows, float c) {
    bool grew = false;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) grew |= __fmul_rn(rows.best[i], c) > rows.base[i] + float(LAZY);
    if (__builtin_expect(__any_sync(~0u, grew), 0)) {
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
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            float *pair = &scores.at[i / 2][n][i % 2 * 2];
            pair[0] = exp2_of(fmaf(pair[0], c, -rows.base[i])), pair[1] = exp2_of(fmaf(pair[1], c, -rows.base[i]));
            rows.sum[i] += pair[0] + pair[1];
        }
}

// O += P V: the weights of 16 keys are an A operand as they lie in the registers.
__device__ __forceinline__ void add_values(Rows& rows, const Scores& scores, uint32 values) {
#pragma unroll
    for (int k = 0; k < BLOCK_KEYS / 16; ++k) {
        uint32 a[ROW_TILES][4];
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t)
            for (int e = 0; e < 4; ++e) {
                const float* pair = &scores.at[t][2 * k + e / 2][e % 2 * 2];
                a[t][e] = packed(pair[0], pair[1]);
            }
#pragma unroll
        for (int n = 0; n < VALUE_TILES; n += 2) {
            uint32 b[4];
            load_transposed(b, values + 2 * (k * 16 * VALUE_PITCH + n * 8));
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t) {
                multiply(rows.acc[t][n], a[t], b[0], b[1]);
                multiply(rows.acc[t][n + 1], a[t], b[2], b[3]);
            }
        }
    }
}

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
    Rows& rows, const Call& call, const Place& block, SpanEnds ends, float* stage) {
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
    static constexpr int WORDS = WIDTH / 8, LANES = WORDS & -WORDS, PASS = THREADS / LANES;
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
};

struct Streams {
    Stream<HEAD_DIM, KEY_PITCH> keys;
    Stream<VALUE_DIM, VALUE_PITCH> values;

    __device__ __forceinline__ void copy(const Call& call, uint32 memory) {
        keys.copy(memory, call.key_strides.token, call.head_dim);
        values.copy(memory, call.value_strides.token, call.value_dim);
        copies_issued();
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

// Where a block stands in its keys.
struct Course {
    Walk<BLOCK_KEYS> walk;
    int span_keys;

    // Ask for the tile that the walk is at, and go to the last of the whole tiles that follow it in this span without a
    // break: their number is returned, and `streams` are left at the first of them.
    __device__ __forceinline__ int begin(
        const Call& call, const Place& block, const BlockView& view, Streams& streams, TileMemory& memory) {
        const Piece& piece = call.pieces[walk.piece];
        const uint16* key = static_cast<const uint16*>(piece.keys) + element_of(call.key_strides, block, walk.offset);
        const uint16* value = static_cast<const uint16*>(piece.values) + element_of(call.value_strides, block, walk.offset);
        int count = walk.count(call);
        copy_slowly<BLOCK_KEYS, HEAD_DIM, KEY_PITCH>(
            memory.keys, key, call.key_strides.token, count, call.head_dim, call.aligned);
        copy_slowly<BLOCK_KEYS, VALUE_DIM, VALUE_PITCH>(
            memory.values, value, call.value_strides.token, count, call.value_dim, call.aligned);
        copies_issued();
        streams.keys.start(key + BLOCK_KEYS * call.key_strides.token, call.key_strides.token);
        streams.values.start(value + BLOCK_KEYS * call.value_strides.token, call.value_strides.token);
        if (!call.aligned || !walk.full(call, view)) return 0;
        int64 keys = least(least(view.inner.high - piece.start, piece.tokens) - walk.offset, call.span_keys - span_keys);
        int more = int(keys / BLOCK_KEYS) - 1;
        walk.offset += more * BLOCK_KEYS, span_keys += more * BLOCK_KEYS;
        return more;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend(const __grid_constant__ Call call) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Place block = place_of<BLOCK_ROWS>(call);
    const BlockView& view = view_of_rows<THREADS>(call, block.row, BLOCK_ROWS);
    Course course = {Walk<BLOCK_KEYS>(call, view), 0};
    Walk<BLOCK_KEYS>& walk = course.walk;
    const uint16* query = static_cast<const uint16*>(call.queries) + element_of(call.query_strides, block, block.row);
    copy_rows<uint16, BLOCK_ROWS, HEAD_DIM, KEY_PITCH, THREADS>(
        shared.queries, query, call.query_strides.token, int(least(call.query_tokens - block.row, BLOCK_ROWS)),
        call.head_dim, call.aligned);
    copies_issued();
    copies_arrived();
    __syncthreads();

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32 by_row = lane % 16, by_column = lane / 16 * 8;
    uint32 queries = shared_address(shared.queries + (warp * 16 * ROW_TILES + by_row) * KEY_PITCH + by_column);
    uint32 keys_at = shared_address(shared.tiles[0].keys) + 2 * ((lane % 8 + lane / 16 * 8) * KEY_PITCH + lane / 8 % 2 * 8);
    uint32 values_at = shared_address(shared.tiles[0].values) + 2 * (by_row * VALUE_PITCH + by_column);
    uint32 kept[ROW_TILES][HEAD_DIM / 16][4];
    if (QUERIES_STAY)
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t)
            for (int k = 0; k < HEAD_DIM / 16; ++k) load_queries(kept[t][k], queries, t, k);

    const float c = float(call.scale * LOG2E);
    Rows rows;
    rows.clear();
    Streams streams;
    streams.keys.to = shared_address(shared.tiles[0].keys) + 2 * (streams.keys.row() * KEY_PITCH + streams.keys.column());
    streams.values.to = shared_address(shared.tiles[0].values) + 2 * (streams.values.row() * VALUE_PITCH + streams.values.column());
    SpanEnds ends = {bool(call.fresh), !walk.more(call)};
    while (true) {
        int span_piece = walk.piece, span_offset = walk.offset;
        if (!ends.last) {
            course.span_keys = 0;
            int left = course.begin(call, block, view, streams, shared.tiles[0]);
            uint32 here = 0;
            bool over = false;
            do {
                copies_arrived();
                __syncthreads();
                Scores scores;
                if (__builtin_expect(left > 0, 1)) {
                    --left;
                    streams.copy(call, uint32(sizeof(TileMemory)) - here);
#pragma unroll
                    for (int n = 0; n < SCORE_TILES; n += CHUNK) {
                        score_chunk(scores, kept, queries, keys_at + here, n);
                        best_of_chunk(rows, scores, n);
                    }
                } else {
                    bool full = walk.full(call, view);
                    int64 token = walk.token(call);
                    int count = walk.count(call);
                    walk.step(call, view), course.span_keys += BLOCK_KEYS;
                    ends.last = !walk.more(call);
                    over = ends.last || course.span_keys >= call.span_keys;
                    TileMemory& tile = shared.tiles[here != 0];
                    if (!over) left = course.begin(call, block, view, streams, shared.tiles[here == 0]);
#pragma unroll
                    for (int n = 0; n < SCORE_TILES; n += CHUNK) score_chunk(scores, kept, queries, keys_at + here, n);
                    if (!full) {
                        if (irregular(tile.values))
                            return simple_rows<ELEMENT, float, BLOCK_ROWS, BLOCK_KEYS, THREADS>(
                                call, block, view, Walk<BLOCK_KEYS>::back_at(call, view, span_piece, span_offset), ends.first);
                        hide(scores, call, block.row, token, count);
                    }
#pragma unroll
                    for (int n = 0; n < SCORE_TILES; n += CHUNK) best_of_chunk(rows, scores, n);
                }
                soften(scores, rows, c);
                add_values(rows, scores, values_at + here);
                here = uint32(sizeof(TileMemory)) - here;
            } while (!over);
            __syncthreads();
        }
        end_span(rows, call, block, ends, reinterpret_cast<float*>(shared.tiles));
        if (ends.last) return;
        ends.first = false;
        __syncthreads();
    }
}
