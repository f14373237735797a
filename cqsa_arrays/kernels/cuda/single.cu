// attend, float32 by plain fused multiply-adds: exact IEEE products, no tensor cores; compute capability 8.0 and newer.
//
// A warp owns 4 ROWS rows for good, its lanes are a grid of 4 x 8. In both products a thread has a tile in registers:
//
//                 keys of the tile                                  value columns
//   warp 0   +--------------------------+                     +--------------------------+
//            |  S = Q K^T               |  P = 2^(S c - b)    |  O += P V                |
//   warp 1   |  ROWS x KEYS a thread    |  -----------------> |  ROWS x COLUMNS a thread |
//     ...    |                          |  by shared memory   |                          |
//            +--------------------------+                     +--------------------------+
//
//   lane (r, k):  rows r, r + 4, ...    keys k, k + 8, ...    columns 4 k .. 4 k + 3, then 32 further, ...
//
// Every operand is read as 16-byte words: of Q and K four dimensions of a row or key, of P four weights of a row, of V
// four columns of a key. P keeps the keys of a lane together (key k + 8 j in place KEYS k + j), so that it is written by
// words too; the second product takes the values in that order. Lane bits are r0 k0 k1 k2 r1: half a warp has all 8 keys
// and 2 rows, and a neighbour by bit 0 or 1 wants the same word, so that shared memory serves 16 lanes at once.
//
// Shared memory: Q, one K tile, one V tile, P, and the place of the block. Rows of all but V, which is read
// along the row, are 4 elements longer than the vectors, an odd number of words: the 8 keys of a read are in 8 banks.
//   SHARED_BYTES = 4 * ((BLOCK_ROWS + BLOCK_KEYS) (HEAD_DIM + 4) + BLOCK_KEYS VALUE_DIM
//                       + BLOCK_ROWS (BLOCK_KEYS + 4)) + 16
// Two barriers a tile. After the scores: V has arrived, P is written, and the next K may take the place of K. After the
// sums: the next K has arrived, and the next V may take the place of V. So each copy has a whole product to arrive in,
// and needs no second place.
//
// A block that has a sum that is not finite at the end of a span leaves its keys to `simple_rows`.
//
// Sources: Dao, "FlashAttention-2", arXiv 2307.08691 (the loop, rows by warps, copies half a step ahead); the register
// tiles and lane order of matrix products without tensor cores: Kerr et al., "CUTLASS" (gemm/warp/mma_simt_policy.h);
// rescaling only when a maximum grew: Zadouri et al., "FlashAttention-4".
// Defines: ELEMENT (FLOAT32), HEAD_DIM, VALUE_DIM, BLOCK_ROWS, BLOCK_KEYS, WARPS, SHARED_BYTES.
#include "copy.cuh"
#include "fragment.cuh"
#include "simple.cuh"
#include "totals.cuh"

constexpr int THREADS = 32 * WARPS, WARP_ROWS = BLOCK_ROWS / WARPS;
constexpr int ROWS = WARP_ROWS / 4, KEYS = BLOCK_KEYS / 8, COLUMN_WORDS = VALUE_DIM / 32;
// Eight warps a multiprocessor or more, if shared memory allows: a thread may have 255 registers.
constexpr int BLOCKS = WARPS < 8 ? 8 / WARPS : 1;
constexpr int KEY_PITCH = HEAD_DIM + 4, WEIGHT_PITCH = BLOCK_KEYS + 4;
// Score sums are at most 128 terms long: a longer running sum loses digits.
constexpr int PARTS = HEAD_DIM > 128 ? 2 : 1, PART = HEAD_DIM / PARTS;
// Steps of 4 dimensions in a loop body: enough products to hide the loop, few enough words to fit the registers.
constexpr int STEPS = ROWS * KEYS < 64 ? 64 / (ROWS * KEYS) : 1;

struct Shared {
    float queries[BLOCK_ROWS * KEY_PITCH];
    float keys[BLOCK_KEYS * KEY_PITCH];
    float values[BLOCK_KEYS * VALUE_DIM];
    float weights[BLOCK_ROWS * WEIGHT_PITCH];  // each warp's rows are its own
    Place block;                               // here, because registers are scarce
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host computes the same size");
static_assert(ELEMENT == FLOAT32, "copied as it is");
static_assert(ROWS * 4 * WARPS == BLOCK_ROWS && WARP_ROWS <= 32, "whole rows of lanes; one lane a row ends a span");
static_assert(BLOCK_KEYS % 32 == 0 && HEAD_DIM % 32 == 0 && VALUE_DIM % 32 == 0, "whole words of lanes");

struct Rows {
    float base[ROWS];  // a whole power of 2 that no score so far is above
    float sum[ROWS];   // of this lane's weights, which are 2^(s c - base - SPAN_BITS)
    float4 acc[ROWS][COLUMN_WORDS];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            base[i] = LOWEST, sum[i] = 0;
#pragma unroll
            for (int n = 0; n < COLUMN_WORDS; ++n) acc[i][n] = {0, 0, 0, 0};
        }
    }
};

struct Scores {
    float at[ROWS][KEYS];
};

__device__ __forceinline__ int row_lane() { return threadIdx.x % 2 + threadIdx.x % 32 / 16 * 2; }
__device__ __forceinline__ int key_lane() { return threadIdx.x / 2 % 8; }
// Row i of this thread's ROWS, in the block.
__device__ __forceinline__ int row_of(int i) { return threadIdx.x / 32 * WARP_ROWS + row_lane() + 4 * i; }

__device__ __forceinline__ float4 word_at(const float* from) { return *reinterpret_cast<const float4*>(from); }

// sums += Q K^T over 4 dimensions; pointers are to those of this lane's first row and key.
__device__ __forceinline__ void score_step(float (&sums)[ROWS][KEYS], const float* queries, const float* keys) {
    float4 q[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) q[i] = word_at(queries + 4 * i * KEY_PITCH);
#pragma unroll
    for (int j = 0; j < KEYS; ++j) {
        float4 k = word_at(keys + 8 * j * KEY_PITCH);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) sums[i][j] = fmaf(q[i].x, k.x, sums[i][j]);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) sums[i][j] = fmaf(q[i].y, k.y, sums[i][j]);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) sums[i][j] = fmaf(q[i].z, k.z, sums[i][j]);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) sums[i][j] = fmaf(q[i].w, k.w, sums[i][j]);
    }
}

// S = Q K^T for the warp's rows.
__device__ __forceinline__ void score_tile(Scores& scores, const float* queries, const float* keys) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        float sums[ROWS][KEYS] = {};
#pragma unroll STEPS
        for (int d = part * PART; d < (part + 1) * PART; d += 4) score_step(sums, queries + d, keys + d);
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
            for (int j = 0; j < KEYS; ++j) scores.at[i][j] = part ? scores.at[i][j] + sums[i][j] : sums[i][j];
    }
}

// Scores of keys that a row does not see become -inf; `first` is the token of the tile's first key.
__device__ __forceinline__ void hide(Scores& scores, const Call& call, int64 block_row, int64 first, int count) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        Interval seen = visible_keys(call, least(block_row + row_of(i), call.query_tokens - 1));
        int low = int(most(0, least(seen.low - first, BLOCK_KEYS)));
        int high = int(most(0, least(seen.high - first, count)));
#pragma unroll
        for (int j = 0; j < KEYS; ++j) {
            int key = key_lane() + 8 * j;
            scores.at[i][j] = key >= low && key < high ? scores.at[i][j] : negative_infinity(0.0f);
        }
    }
}

// Bases of the warp's rows where a score exceeds them; sums and accumulators go over to them.
__device__ __forceinline__ void raise_bases(Rows& rows, const Scores& scores, float c) {
    float base[ROWS];
    bool grew = false;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        float best = scores.at[i][0];
#pragma unroll
        for (int j = 1; j < KEYS; ++j) best = fmaxf(best, scores.at[i][j]);
#pragma unroll
        for (int offset = 2; offset <= 8; offset *= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, offset));
        base[i] = fmaxf(whole(best * c), rows.base[i]);
        grew |= base[i] > rows.base[i];
    }
    if (!__any_sync(~0u, grew)) return;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        float alpha = exp2_of(rows.base[i] - base[i]);
        rows.base[i] = base[i], rows.sum[i] *= alpha;
#pragma unroll
        for (int n = 0; n < COLUMN_WORDS; ++n) {
            float4& acc = rows.acc[i][n];
            acc = {acc.x * alpha, acc.y * alpha, acc.z * alpha, acc.w * alpha};
        }
    }
}

// P, from this lane's scores to its places in shared memory.
__device__ __forceinline__ void weigh(Rows& rows, const Scores& scores, float* weights, float c) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        float base = rows.base[i] + SPAN_BITS, w[KEYS];
#pragma unroll
        for (int j = 0; j < KEYS; ++j) rows.sum[i] += w[j] = exp2_of(fmaf(scores.at[i][j], c, -base));
#pragma unroll
        for (int j = 0; j < KEYS; j += 4)
            *reinterpret_cast<float4*>(weights + 4 * i * WEIGHT_PITCH + KEYS * key_lane() + j) =
                make_float4(w[j], w[j + 1], w[j + 2], w[j + 3]);
    }
}

// O += P V over 4 keys, 8 apart; pointers are to weights of this lane's first row and to its columns of the first key.
__device__ __forceinline__ void value_step(Rows& rows, const float* weights, const float* values) {
    float4 p[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) p[i] = word_at(weights + 4 * i * WEIGHT_PITCH);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int n = 0; n < COLUMN_WORDS; ++n) {
            float4 v = word_at(values + 8 * e * VALUE_DIM + 32 * n);
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                float w = e == 0 ? p[i].x : e == 1 ? p[i].y : e == 2 ? p[i].z : p[i].w;
                float4& acc = rows.acc[i][n];
                acc = {fmaf(w, v.x, acc.x), fmaf(w, v.y, acc.y), fmaf(w, v.z, acc.z), fmaf(w, v.w, acc.w)};
            }
        }
    }
}

// O += P V for the warp's rows.
__device__ __forceinline__ void add_values(Rows& rows, const float* weights, const float* values) {
#pragma unroll 1
    for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int j = 0; j < KEYS; j += 4) value_step(rows, weights + KEYS * k + j, values + (k + 8 * j) * VALUE_DIM);
    }
}

// Accumulator n of row i, column by column.
__device__ __forceinline__ float& element_at(Rows& rows, int i, int n) {
    float4& word = rows.acc[i][n / 4];
    return n % 4 == 0 ? word.x : n % 4 == 1 ? word.y : n % 4 == 2 ? word.z : word.w;
}

// Merge the rows into the state, or finish them. One lane ends a row. Bases, sums and then the accumulators, 32 columns at
// a time, go through `weights`, the place of the warp's rows of P.
__device__ __forceinline__ void end_block(Rows& rows, const Call& call, const Place& block, float* weights) {
    int lane = threadIdx.x % 32;
    int64 first = block.row + threadIdx.x / 32 * WARP_ROWS;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
#pragma unroll
        for (int offset = 2; offset <= 8; offset *= 2) rows.sum[i] += __shfl_xor_sync(~0u, rows.sum[i], offset);
        float* row = weights + (row_lane() + 4 * i) * WEIGHT_PITCH;
        if (key_lane() == 0) row[32] = rows.base[i], row[33] = rows.sum[i];
    }
    __syncwarp();
    const float* found = weights + min(lane, WARP_ROWS - 1) * WEIGHT_PITCH + 32;
    bool exists = lane < WARP_ROWS && first + lane < call.query_tokens;
    RowEnd end = end_of_row<float>(call, block, first + lane, natural_base(found[0]), found[1], exists, exists);
    int exist = int(most(0, least(call.query_tokens - first, WARP_ROWS)));
#pragma unroll
    for (int n = 0; n < COLUMN_WORDS; ++n) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            *reinterpret_cast<float4*>(weights + (row_lane() + 4 * i) * WEIGHT_PITCH + 4 * key_lane()) = rows.acc[i][n];
        __syncwarp();
#pragma unroll 1
        for (int row = 0; row < exist; ++row) {
            RowEnd its = {__shfl_sync(~0u, end.old, row), __shfl_sync(~0u, end.fresh, row),
                          bool(__shfl_sync(~0u, end.has_old, row)), bool(__shfl_sync(~0u, end.has_fresh, row)),
                          bool(__shfl_sync(~0u, end.skip, row))};
            if (32 * n + lane < call.value_dim)
                end_element<float>(call, block, first + row, 32 * n + lane, its, weights[row * WEIGHT_PITCH + lane]);
        }
        __syncwarp();
    }
}

// Ask for the keys, or the values, of the current tile of `walk`; TO has rows of WIDTH elements PITCH elements apart.
template <int WIDTH, int PITCH>
__device__ __forceinline__ void fetch(
    float* to, const Call& call, const Place& block, const Walk<BLOCK_KEYS>& walk, const void* piece,
    const Strides& strides, int columns) {
    const float* from = static_cast<const float*>(piece) + element_of(strides, block, walk.offset);
    copy_rows<float, BLOCK_KEYS, WIDTH, PITCH, THREADS>(
        to, from, strides.token, walk.count(call), columns, call.aligned);
    copies_issued();
}
__device__ __forceinline__ void fetch_keys(
    Shared& shared, const Call& call, const Place& block, const Walk<BLOCK_KEYS>& walk) {
    fetch<HEAD_DIM, KEY_PITCH>(
        shared.keys, call, block, walk, call.pieces[walk.piece].keys, call.key_strides, call.head_dim);
}
__device__ __forceinline__ void fetch_values(
    Shared& shared, const Call& call, const Place& block, const Walk<BLOCK_KEYS>& walk) {
    fetch<VALUE_DIM, VALUE_DIM>(
        shared.values, call, block, walk, call.pieces[walk.piece].values, call.value_strides, call.value_dim);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend(const __grid_constant__ Call call) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Place& block = shared.block;
    if (threadIdx.x == 0) block = place_of<BLOCK_ROWS>(call);
    __syncthreads();
    const BlockView& view = view_of_rows<THREADS>(call, block.row, BLOCK_ROWS);
    Walk<BLOCK_KEYS> walk(call, view);
    const float* query = static_cast<const float*>(call.queries) + element_of(call.query_strides, block, block.row);
    copy_rows<float, BLOCK_ROWS, HEAD_DIM, KEY_PITCH, THREADS>(
        shared.queries, query, call.query_strides.token, int(least(call.query_tokens - block.row, BLOCK_ROWS)),
        call.head_dim, call.aligned);
    if (walk.more(call)) fetch_keys(shared, call, block, walk);
    copies_arrived();
    __syncthreads();
    if (walk.more(call)) fetch_values(shared, call, block, walk);

    const float* queries = shared.queries + row_of(0) * KEY_PITCH;
    const float* keys = shared.keys + key_lane() * KEY_PITCH;
    const float* values = shared.values + 4 * key_lane();
    float* weights = shared.weights + row_of(0) * WEIGHT_PITCH;
    const float c = float(call.scale * LOG2E);
    constexpr int COLUMNS = 4 * COLUMN_WORDS;
    Totals<ROWS, COLUMNS> totals;
    Rows rows;
    rows.clear();
    auto element = [&](int i, int n) -> float& { return element_at(rows, i, n); };
    for (bool first = true; walk.more(call); first = false) {
        for (int span_keys = 0; span_keys < call.span_keys && walk.more(call); span_keys += BLOCK_KEYS) {
            Scores scores;
            score_tile(scores, queries, keys);
            if (!walk.full(call, view)) hide(scores, call, block.row, walk.token(call), walk.count(call));
            raise_bases(rows, scores, c);
            weigh(rows, scores, weights, c);
            copies_arrived();
            __syncthreads();
            walk.step(call, view);
            if (walk.more(call)) fetch_keys(shared, call, block, walk);
            add_values(rows, weights, values);
            copies_arrived();
            __syncthreads();
            if (walk.more(call)) fetch_values(shared, call, block, walk);
        }
        if (irregular<ROWS, COLUMNS>(rows.sum, element))
            return simple_rows<ELEMENT, float, BLOCK_ROWS, BLOCK_KEYS, THREADS>(call, block, view);
        if (walk.more(call)) {
            close_span(totals, rows.base, rows.sum, element, first);
        } else if (!first) {
            join_totals(totals, rows.base, rows.sum, element);
        }
    }
    end_block(rows, call, block, shared.weights + threadIdx.x / 32 * WARP_ROWS * WEIGHT_PITCH);
}
