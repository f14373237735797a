// attend, float32 on tensor cores, for vectors longer than `split.cu` takes: every operand is split into two TF32 numbers,
// x = high + low, and a product is high low + low high + high high by mma.sync m16n8k8, float32 accumulation; compute
// capability 8.0 and newer.
//
// A block of BLOCK_ROWS rows walks the tiles of BLOCK_KEYS keys. A warp owns ROW_TILES x 16 rows for good, so that softmax
// rows stay inside a quad of lanes, and a fragment of keys or values that was read and split serves ROW_TILES products.
//
//                 keys of the tile                            value columns
//   warp 0   +--------------------------+              +------------------------+
//   16 x RT  |  S = Q K^T, registers    |  P = 2^(Sc-b)|  O += P V, registers   |
//   warp 1   +--------------------------+  ----------> +------------------------+
//     ...    |                          |  as A operand|                        |
//
// Both products are made of units: 16 rows x 8 columns, a contraction of 16. Tensor cores cut off what does not fit where
// an ordinary sum rounds, so errors of a long sum would all point the same way. Therefore a unit starts from zero with its
// small products, and is added to S or O by an ordinary addition.
//
// The contraction index may be permuted, so that operands are read by words of 16 bytes and P needs no exchange. With
// g = lane / 4 and t = lane % 4 (mma wants indices t and t + 4 of 8 from a lane), step s = 0, 1 of a unit:
//   Q K^T   index t of step s is dimension 4 t + 2 s of 16, index t + 4 the next one: one word of a row or key
//   P V     index t of step s is key 8 s + 2 t of 16, index t + 4 the next one, as mma leaves S to the lanes
//           column n of unit j is value column 4 n + j of 32: units j = 0 .. 3 take one word of a value
//
// Shared memory, as float32: Q, then two K tiles, then two V tiles. Rows of Q and K are 16 elements longer than the
// vectors: 16 modulo 32, so that the 2 x 4 words which shared memory serves together lie in different banks. For rows of V,
// of which each lane reads every second one, that is 4 modulo 16.
//   SHARED_BYTES = 4 * ((BLOCK_ROWS + 2 BLOCK_KEYS) (HEAD_DIM + 16) + 2 BLOCK_KEYS (VALUE_DIM + 4))
// One barrier a tile: it says that tile i + 1 has arrived and that everybody is done with tile i, whose place tile i + 2
// takes while tile i + 1 is computed.
//
// Infinities and NaN: of an element that is not finite, or rounds to infinity, the low part is NaN. So each one of a query
// or key makes its weights NaN, each one of a value its sums, in rows that do not see it as well, as 0 * NaN is NaN. A span
// that leaves anything but finite numbers in a row of the block has all of its keys computed again by `simple_rows`.
//
// Sources: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical
// peak performance", arXiv 2203.03341; Dao, "FlashAttention-2", arXiv 2307.08691 (the loop, rows by warps); PTX ISA,
// "Matrix fragments for mma.m16n8k8"; rescaling only when a maximum grew: Zadouri et al., "FlashAttention-4".
// Defines: ELEMENT (FLOAT32), HEAD_DIM, VALUE_DIM, BLOCK_ROWS, BLOCK_KEYS, WARPS, SHARED_BYTES.
#include "copy.cuh"
#include "fragment.cuh"
#include "simple.cuh"
#include "totals.cuh"

constexpr int THREADS = 32 * WARPS, ROW_TILES = BLOCK_ROWS / (16 * WARPS), ROWS = 2 * ROW_TILES;
constexpr int KEY_PITCH = HEAD_DIM + 16, VALUE_PITCH = VALUE_DIM + 4;
constexpr int SCORE_TILES = BLOCK_KEYS / 8, VALUE_TILES = VALUE_DIM / 8;

struct Shared {
    float queries[BLOCK_ROWS * KEY_PITCH];
    float keys[2][BLOCK_KEYS * KEY_PITCH];
    float values[2][BLOCK_KEYS * VALUE_PITCH];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host computes the same size");
static_assert(ELEMENT == FLOAT32, "copied as it is");
static_assert(ROW_TILES * 16 * WARPS == BLOCK_ROWS && BLOCK_KEYS % 16 == 0, "whole units");
static_assert(HEAD_DIM % 32 == 0 && VALUE_DIM % 32 == 0, "whole units, and rows that begin in the banks said above");

// What all threads read where they need it, for registers are scarce.
struct Tile {
    int64 first;  // token of its first key
    int count;    // keys that exist
    bool full;    // every row sees every key
};
struct Notes {
    Place block;
    Tile tiles[2];
};

// What a thread keeps of its rows: row i of ROWS is row  warp * 16 ROW_TILES + 16 (i / 2) + 8 (i % 2) + lane / 4.
// Element e of acc[t][n] is of row 2 t + e / 2 and of the column that `column_of` says.
struct Rows {
    float base[ROWS];  // a whole power of 2 that no score so far is above
    float sum[ROWS];   // of this lane's weights, which are 2^(s c - base - SPAN_BITS)
    float acc[ROW_TILES][VALUE_TILES][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) base[i] = LOWEST, sum[i] = 0;
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
            for (int n = 0; n < VALUE_TILES; ++n)
                for (int e = 0; e < 4; ++e) acc[t][n][e] = 0;
    }
};

// Element e of at[t][n] is the score, later the weight, of row 2 t + e / 2 and key 8 n + 2 (lane % 4) + e % 2.
struct Scores {
    float at[ROW_TILES][SCORE_TILES][4];
};

__device__ __forceinline__ int row_of(int i) {
    return threadIdx.x / 32 * 16 * ROW_TILES + i / 2 * 16 + i % 2 * 8 + threadIdx.x % 32 / 4;
}
__device__ __forceinline__ int column_of(int n, int e) { return n / 4 * 32 + threadIdx.x % 4 * 8 + e % 2 * 4 + n % 4; }

__device__ __forceinline__ float4 word_at(const float* from) { return *reinterpret_cast<const float4*>(from); }

// x = high + low: high is x rounded to the 11 significant bits of TF32, low what remains, of which mma takes as many.
struct Split {
    uint32 high, low;

    __device__ __forceinline__ Split() {}
    __device__ __forceinline__ explicit Split(float x) : high(__float_as_uint(x) + 0x1000 & 0xffffe000) {
        low = __float_as_uint(x - __uint_as_float(high));
    }
};

// This lane's part of the operands of one mma: rows g and g + 8 of index t, then both of index t + 4; or column g of each.
struct Left {
    Split at[4];
};
struct Right {
    Split at[2];
};

// Two steps of rows g and g + 8, whose elements of indices t and t + 4 are x, y in step 0 and z, w in step 1.
__device__ __forceinline__ void split_left(Left (&to)[2], float4 row, float4 row_8) {
    to[0] = {Split(row.x), Split(row_8.x), Split(row.y), Split(row_8.y)};
    to[1] = {Split(row.z), Split(row_8.z), Split(row.w), Split(row_8.w)};
}
__device__ __forceinline__ void split_right(Right (&to)[2], float4 column) {
    to[0] = {Split(column.x), Split(column.y)};
    to[1] = {Split(column.z), Split(column.w)};
}

// sum (16 x 8) += a (16 x 8) b (8 x 8), TF32
__device__ __forceinline__ void multiply(float (&sum)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// N units side by side for each row tile: a (16 x 16) b (16 x 8), without low low, which is below the last bit. Product by
// product through all units: consecutive mma do not wait for one another, and the compiler keeps to that order.
template <int N>
__device__ __forceinline__ void multiply_split(
    float (&units)[ROW_TILES][N][4], const Left (&a)[ROW_TILES][2], const Right (&b)[N][2]) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
        for (int n = 0; n < N; ++n)
            for (int e = 0; e < 4; ++e) units[t][n][e] = 0;
#pragma unroll
    for (int product = 0; product < 6; ++product) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t) {
                float(&unit)[4] = units[t][n];
                const Split(&l)[4] = a[t][product % 2].at, (&r)[2] = b[n][product % 2].at;
                if (product < 2) {
                    multiply(unit, l[0].high, l[1].high, l[2].high, l[3].high, r[0].low, r[1].low);
                } else if (product < 4) {
                    multiply(unit, l[0].low, l[1].low, l[2].low, l[3].low, r[0].high, r[1].high);
                } else {
                    multiply(unit, l[0].high, l[1].high, l[2].high, l[3].high, r[0].high, r[1].high);
                }
            }
    }
}

// S = Q K^T; pointers are to the words of this lane's row g of the warp, and of key g of the tile.
__device__ __forceinline__ void score_tile(Scores& scores, int dimensions, const float* queries, const float* keys) {
    constexpr int N = SCORE_TILES % 4 ? 2 : 4;
    scores = {};
#pragma unroll 1
    for (int k = 0; k < HEAD_DIM; k += 16) {
        if (k >= dimensions) break;  // the rest is zero
        Left a[ROW_TILES][2];
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t) {
            const float* row = queries + 16 * t * KEY_PITCH + k;
            split_left(a[t], word_at(row), word_at(row + 8 * KEY_PITCH));
        }
#pragma unroll
        for (int n = 0; n < SCORE_TILES; n += N) {
            Right b[N][2];
#pragma unroll
            for (int j = 0; j < N; ++j) split_right(b[j], word_at(keys + 8 * (n + j) * KEY_PITCH + k));
            float units[ROW_TILES][N][4];
            multiply_split(units, a, b);
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
                for (int j = 0; j < N; ++j)
                    for (int e = 0; e < 4; ++e) scores.at[t][n + j][e] += units[t][j][e];
        }
    }
}

// Scores of keys that a row does not see become -inf.
__device__ __forceinline__ void hide(Scores& scores, const Call& call, int64 block_row, const Tile& tile) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        Interval seen = visible_keys(call, least(block_row + row_of(i), call.query_tokens - 1));
        int low = int(most(0, least(seen.low - tile.first, BLOCK_KEYS)));
        int high = int(most(0, least(seen.high - tile.first, tile.count)));
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
            for (int e = 0; e < 2; ++e) {
                int key = n * 8 + threadIdx.x % 4 * 2 + e;
                float& score = scores.at[i / 2][n][i % 2 * 2 + e];
                score = key >= low && key < high ? score : negative_infinity(0.0f);
            }
    }
}

// Bases of the warp's rows where a score exceeds them; sums and accumulators go over to them.
__device__ __forceinline__ void raise_bases(Rows& rows, const Scores& scores, float c) {
    float base[ROWS];
    bool grew = false;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        float best = negative_infinity(0.0f);
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
            best = fmaxf(best, fmaxf(scores.at[i / 2][n][i % 2 * 2], scores.at[i / 2][n][i % 2 * 2 + 1]));
        best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
        best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
        base[i] = fmaxf(whole(best * c), rows.base[i]);
        grew |= base[i] > rows.base[i];
    }
    if (!__any_sync(~0u, grew)) return;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        float alpha = exp2_of(rows.base[i] - base[i]);
        rows.base[i] = base[i], rows.sum[i] *= alpha;
#pragma unroll
        for (int n = 0; n < VALUE_TILES; ++n)
            for (int e = 0; e < 2; ++e) rows.acc[i / 2][n][i % 2 * 2 + e] *= alpha;
    }
}

// Scores become weights, and are added up; tile by tile, so that a long sum has few terms.
__device__ __forceinline__ void weigh(Scores& scores, Rows& rows, float c) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        float base = rows.base[i] + SPAN_BITS, sum = 0;
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
            for (int e = 0; e < 2; ++e) {
                float& score = scores.at[i / 2][n][i % 2 * 2 + e];
                score = exp2_of(fmaf(score, c, -base));
                sum += score;
            }
        rows.sum[i] += sum;
    }
}

// O += P V; the pointer is to this lane's columns of its first key of the tile.
__device__ __forceinline__ void add_values(Rows& rows, const Scores& weights, int columns, const float* values) {
#pragma unroll
    for (int k = 0; k < SCORE_TILES; k += 2) {
        Left a[ROW_TILES][2];
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t) {
            const float(&p)[4] = weights.at[t][k], (&q)[4] = weights.at[t][k + 1];
            split_left(a[t], {p[0], p[1], q[0], q[1]}, {p[2], p[3], q[2], q[3]});
        }
#pragma unroll
        for (int n = 0; n < VALUE_TILES; n += 4) {
            // Rarely so: the branch is to keep the compiler from reading ahead more than it has registers for.
            if (8 * n >= columns) break;
            const float* value = values + 8 * k * VALUE_PITCH + 8 * n;
            float4 v0 = word_at(value), v1 = word_at(value + VALUE_PITCH);
            float4 v8 = word_at(value + 8 * VALUE_PITCH), v9 = word_at(value + 9 * VALUE_PITCH);
            const float4 taken[4] = {
                {v0.x, v1.x, v8.x, v9.x}, {v0.y, v1.y, v8.y, v9.y}, {v0.z, v1.z, v8.z, v9.z}, {v0.w, v1.w, v8.w, v9.w}};
            Right b[4][2];
#pragma unroll
            for (int j = 0; j < 4; ++j) split_right(b[j], taken[j]);
            float units[ROW_TILES][4][4];
            multiply_split(units, a, b);
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    for (int e = 0; e < 4; ++e) rows.acc[t][n + j][e] += units[t][j][e];
        }
    }
}

// Accumulator n of row i.
__device__ __forceinline__ float& element_at(Rows& rows, int i, int n) {
    return rows.acc[i / 2][n / 2][i % 2 * 2 + n % 2];
}
// Sums of a row's four lanes.
__device__ __forceinline__ void join_lanes(Rows& rows) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        rows.sum[i] += __shfl_xor_sync(~0u, rows.sum[i], 1);
        rows.sum[i] += __shfl_xor_sync(~0u, rows.sum[i], 2);
    }
}

// Merge the rows into the state, or finish them.
__device__ __forceinline__ void end_block(Rows& rows, const Call& call, const Place& block) {
    join_lanes(rows);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        int64 row = block.row + row_of(i);
        bool exists = row < call.query_tokens;
        RowEnd end = end_of_row<float>(
            call, block, row, natural_base(rows.base[i]), rows.sum[i], exists, exists && threadIdx.x % 4 == 0);
        if (!exists) continue;
        end_elements<float, 2 * VALUE_TILES>(
            call, block, row, end, [&](int n) { return column_of(n / 2, n % 2); },
            [&](int n) -> float& { return element_at(rows, i, n); });
    }
}

// Ask for the current tile of `walk`.
__device__ __forceinline__ void fetch(
    Shared& shared, Notes& notes, int stage, const Call& call, const BlockView& view, const Walk<BLOCK_KEYS>& walk) {
    const Piece& piece = call.pieces[walk.piece];
    const float* key = static_cast<const float*>(piece.keys) + element_of(call.key_strides, notes.block, walk.offset);
    const float* value =
        static_cast<const float*>(piece.values) + element_of(call.value_strides, notes.block, walk.offset);
    int count = walk.count(call);
    if (threadIdx.x == 0) notes.tiles[stage] = {walk.token(call), count, walk.full(call, view)};
    copy_rows<float, BLOCK_KEYS, HEAD_DIM, KEY_PITCH, THREADS>(
        shared.keys[stage], key, call.key_strides.token, count, call.head_dim, call.aligned);
    copy_rows<float, BLOCK_KEYS, VALUE_DIM, VALUE_PITCH, THREADS>(
        shared.values[stage], value, call.value_strides.token, count, call.value_dim, call.aligned);
    copies_issued();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend(const __grid_constant__ Call call) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    __shared__ Notes notes;
    Place block = place_of<BLOCK_ROWS>(call);
    if (threadIdx.x == 0) notes.block = block;
    const BlockView& view = view_of_rows<THREADS>(call, block.row, BLOCK_ROWS);  // has barriers
    Walk<BLOCK_KEYS> walk(call, view);
    const float* query = static_cast<const float*>(call.queries) + element_of(call.query_strides, block, block.row);
    copy_rows<float, BLOCK_ROWS, HEAD_DIM, KEY_PITCH, THREADS>(
        shared.queries, query, call.query_strides.token, int(least(call.query_tokens - block.row, BLOCK_ROWS)),
        call.head_dim, call.aligned);
    if (walk.more(call)) fetch(shared, notes, 0, call, view, walk);
    copies_arrived();
    __syncthreads();

    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const float* queries = shared.queries + row_of(0) * KEY_PITCH + 4 * t;
    const float c = float(call.scale * LOG2E);
    constexpr int COLUMNS = 2 * VALUE_TILES;
    Totals<ROWS, COLUMNS> totals;
    Rows rows;
    rows.clear();
    auto element = [&](int i, int n) -> float& { return element_at(rows, i, n); };
    const int span_tiles = int(call.span_keys / BLOCK_KEYS);
    int tile = 0, span = 0;  // tiles so far, and before the current span
    while (walk.more(call)) {
        for (; tile < span + span_tiles && walk.more(call); ++tile) {
            int stage = tile % 2;
            walk.step(call, view);
            if (walk.more(call)) fetch(shared, notes, stage ^ 1, call, view, walk);
            Scores scores;
            score_tile(scores, call.head_dim, queries, shared.keys[stage] + g * KEY_PITCH + 4 * t);
            if (!notes.tiles[stage].full) hide(scores, call, notes.block.row, notes.tiles[stage]);
            raise_bases(rows, scores, c);
            weigh(scores, rows, c);
            add_values(rows, scores, call.value_dim, shared.values[stage] + 2 * t * VALUE_PITCH + 4 * g);
            copies_arrived();
            __syncthreads();
        }
        if (irregular<ROWS, COLUMNS>(rows.sum, element))
            return simple_rows<ELEMENT, float, BLOCK_ROWS, BLOCK_KEYS, THREADS>(call, notes.block, view);
        if (walk.more(call)) {
            close_span(totals, rows.base, rows.sum, element, span == 0);
        } else if (span > 0) {
            join_totals(totals, rows.base, rows.sum, element);
        }
        span = tile;
    }
    end_block(rows, call, notes.block);
}
