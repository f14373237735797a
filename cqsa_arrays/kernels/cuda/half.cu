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
constexpr bool QUERIES_STAY = HEAD_DIM <= 64;

struct Shared {
    uint16 queries[BLOCK_ROWS * KEY_PITCH];
    uint16 keys[2][BLOCK_KEYS * KEY_PITCH];
    uint16 values[2][BLOCK_KEYS * VALUE_PITCH];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host computes the same size");
static_assert(16 * WARPS * STAGE_PITCH * 4 <= sizeof(Shared::keys) + sizeof(Shared::values), "rows are staged there");
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
    float best[ROWS];                            // largest plain score so far
    float sum[ROWS];                             // of this lane's weights
    float acc[ROW_TILES][VALUE_TILES][4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) best[i] = negative_infinity(0.0f), sum[i] = 0;
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t)
            for (int n = 0; n < VALUE_TILES; ++n)
                for (int e = 0; e < 4; ++e) acc[t][n][e] = 0;
    }
};

struct Scores {
    float at[ROW_TILES][SCORE_TILES][4];
};

__device__ __forceinline__ int row_of(int i) {
    return threadIdx.x / 32 * 16 * ROW_TILES + i / 2 * 16 + i % 2 * 8 + threadIdx.x % 32 / 4;
}

// The 16 x 16 query fragment of row tile t and columns 16 k ..
__device__ __forceinline__ void load_queries(uint32 (&a)[4], uint32 queries, int t, int k) {
    load_matrices(a, queries + 2 * (t * 16 * KEY_PITCH + k * 16));
}

// S = Q K^T for the warp's rows; addresses are those of this lane's rows (see `lane_offset`).
__device__ __forceinline__ void score_tile(
    Scores& scores, const uint32 (&kept)[ROW_TILES][HEAD_DIM / 16][4], uint32 queries, uint32 keys) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t)
        for (int n = 0; n < SCORE_TILES; ++n)
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
        for (int n = 0; n < SCORE_TILES; n += 2) {
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

// Scores of keys that a row does not see become -inf; `first` is the token of the tile's first key.
__device__ __forceinline__ void hide(Scores& scores, const Call& call, int64 block_row, int64 first, int count) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        Interval seen = visible_keys(call, least(block_row + row_of(i), call.query_tokens - 1));
        int low = int(most(0, least(seen.low - first, BLOCK_KEYS))), high = int(most(0, least(seen.high - first, count)));
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
            for (int e = 0; e < 2; ++e) {
                int key = n * 8 + threadIdx.x % 4 * 2 + e;
                float& score = scores.at[i / 2][n][i % 2 * 2 + e];
                score = key >= low && key < high ? score : negative_infinity(0.0f);
            }
    }
}

// One step of the online softmax: scores become weights, sums and accumulators go over to the new maxima.
__device__ __forceinline__ void soften(Scores& scores, Rows& rows, float c) {
    float best[ROWS];
    bool grew = false;
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            float larger = fmaxf(scores.at[i / 2][n][i % 2 * 2], scores.at[i / 2][n][i % 2 * 2 + 1]);
            best[i] = n == 0 ? larger : fmaxf(best[i], larger);
        }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) best[i] = fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 1));
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        best[i] = fmaxf(fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 2)), rows.best[i]);
        grew |= best[i] > rows.best[i];
    }
    if (__any_sync(~0u, grew)) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            bool empty = rows.best[i] == negative_infinity(0.0f);
            float alpha = empty ? 0.0f : exp2_of(__fmul_rn(rows.best[i], c) - __fmul_rn(best[i], c));
            rows.sum[i] *= alpha, rows.best[i] = best[i];
#pragma unroll
            for (int n = 0; n < VALUE_TILES; ++n)
                for (int e = 0; e < 2; ++e) rows.acc[i / 2][n][i % 2 * 2 + e] *= alpha;
        }
    }
    float base[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
        base[i] = rows.best[i] == negative_infinity(0.0f) ? 0.0f : __fmul_rn(rows.best[i], c);
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            float *pair = &scores.at[i / 2][n][i % 2 * 2];
            pair[0] = exp2_of(fmaf(pair[0], c, -base[i])), pair[1] = exp2_of(fmaf(pair[1], c, -base[i]));
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
    for (int i = threadIdx.x; i < BLOCK_KEYS * VALUE_DIM; i += THREADS)
        found |= (values[i / VALUE_DIM * VALUE_PITCH + i % VALUE_DIM] & EXPONENT) == EXPONENT;
    return __syncthreads_or(found);
}

// Merge the span into the state, or finish the rows; the accumulators are empty afterwards. `stage` is free memory of the
// block, 16 * WARPS rows of VALUE_PITCH floats.
__device__ __forceinline__ void end_span(
    Rows& rows, const Call& call, const Place& block, SpanEnds ends, float c, float* stage) {
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
            bests[half] = __shfl_sync(~0u, rows.best[2 * t + half], holder);
        }
        bool upper = lane / 8 % 2;
        double base = double(__fmul_rn(upper ? bests[1] : bests[0], c)) * LN2;
        int64 first = block.row + (warp * ROW_TILES + t) * 16;
        end_rows<float>(call, block, first, staged, STAGE_PITCH, base, upper ? sums[1] : sums[0], ends);
    }
    rows.clear();
}

// Ask for the current tile of `walk`.
__device__ __forceinline__ void fetch(
    const Call& call, const Place& block, const Walk<BLOCK_KEYS>& walk, uint16* keys, uint16* values) {
    const Piece& piece = call.pieces[walk.piece];
    const uint16* key = static_cast<const uint16*>(piece.keys) + element_of(call.key_strides, block, walk.offset);
    const uint16* value = static_cast<const uint16*>(piece.values) + element_of(call.value_strides, block, walk.offset);
    int count = walk.count(call);
    copy_rows<uint16, BLOCK_KEYS, HEAD_DIM, KEY_PITCH, THREADS>(
        keys, key, call.key_strides.token, count, call.head_dim, call.aligned);
    copy_rows<uint16, BLOCK_KEYS, VALUE_DIM, VALUE_PITCH, THREADS>(
        values, value, call.value_strides.token, count, call.value_dim, call.aligned);
    copies_issued();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend(const __grid_constant__ Call call) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Place block = place_of<BLOCK_ROWS>(call);
    const BlockView& view = view_of_rows<THREADS>(call, block.row, BLOCK_ROWS);
    Walk<BLOCK_KEYS> walk(call, view);
    int span_piece = walk.piece, span_offset = walk.offset;
    const uint16* query = static_cast<const uint16*>(call.queries) + element_of(call.query_strides, block, block.row);
    copy_rows<uint16, BLOCK_ROWS, HEAD_DIM, KEY_PITCH, THREADS>(
        shared.queries, query, call.query_strides.token, int(least(call.query_tokens - block.row, BLOCK_ROWS)),
        call.head_dim, call.aligned);
    if (walk.more(call)) fetch(call, block, walk, shared.keys[0], shared.values[0]);
    copies_arrived();
    __syncthreads();

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // ldmatrix takes row addresses from the lanes: lanes 0-15 name the 16 rows, lanes 16-31 the same rows 8 columns on;
    // as B operand of two neighbouring score tiles: rows 0-7, rows 0-7 8 columns on, rows 8-15, rows 8-15 8 columns on.
    uint32 by_row = lane % 16, by_column = lane / 16 * 8;
    uint32 queries = shared_address(shared.queries + (warp * 16 * ROW_TILES + by_row) * KEY_PITCH + by_column);
    uint32 key_offset = 2 * ((lane % 8 + lane / 16 * 8) * KEY_PITCH + lane / 8 % 2 * 8);
    uint32 value_offset = 2 * (by_row * VALUE_PITCH + by_column);
    uint32 kept[ROW_TILES][HEAD_DIM / 16][4];
    if (QUERIES_STAY)
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t)
            for (int k = 0; k < HEAD_DIM / 16; ++k) load_queries(kept[t][k], queries, t, k);

    const float c = float(call.scale * LOG2E);
    Rows rows;
    rows.clear();
    SpanEnds ends = {bool(call.fresh), false};
    float* stage = reinterpret_cast<float*>(shared.keys);
    int span_keys = 0;
    for (int at = 0; walk.more(call); at ^= 1) {
        // What this tile is to the tiles after it is known before they are asked for: a span's end needs their place.
        bool full = walk.full(call, view);
        int64 token = walk.token(call);
        int count = walk.count(call);
        walk.step(call, view), span_keys += BLOCK_KEYS;
        ends.last = !walk.more(call);
        bool span_over = ends.last || span_keys >= call.span_keys;
        if (!span_over) fetch(call, block, walk, shared.keys[at ^ 1], shared.values[at ^ 1]);
        Scores scores;
        score_tile(scores, kept, queries, shared_address(shared.keys[at]) + key_offset);
        if (!full) {
            if (irregular(shared.values[at])) {
                return simple_rows<ELEMENT, float, BLOCK_ROWS, BLOCK_KEYS, THREADS>(
                    call, block, view, Walk<BLOCK_KEYS>::back_at(call, view, span_piece, span_offset), ends.first);
            }
            hide(scores, call, block.row, token, count);
        }
        soften(scores, rows, c);
        add_values(rows, scores, shared_address(shared.values[at]) + value_offset);
        if (span_over) {
            __syncthreads();
            end_span(rows, call, block, ends, c, stage);
            if (ends.last) return;
            ends.first = false, span_piece = walk.piece, span_offset = walk.offset, span_keys = 0;
            __syncthreads();
            fetch(call, block, walk, shared.keys[at ^ 1], shared.values[at ^ 1]);
        }
        copies_arrived();
        __syncthreads();
    }
    ends.last = true;  // no row of the block sees a key
    end_span(rows, call, block, ends, c, stage);
}
