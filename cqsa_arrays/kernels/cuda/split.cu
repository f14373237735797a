// attend, float32 on tensor cores: every operand, scaled by a power of two, is split into two float16 numbers, x = high +
// low, and a product is low high + high low + high high by mma.sync m16n8k16, float32 accumulation; compute capability 8.0
// and newer.
//
// A block of BLOCK_ROWS rows walks the tiles of BLOCK_KEYS keys. A warp owns ROW_TILES x 16 rows for good, so that softmax
// rows stay inside a quad of lanes, and every key or value fragment that it reads serves ROW_TILES products.
//
//   global --copy--> raw K, V (float32) --split, once for the block--> K, V high and low (float16)
//
//                 keys of the tile                            value columns
//   warp 0   +--------------------------+              +------------------------+
//   16 x RT  |  S = Q K^T, registers    |  P = 2^(Sc-b)|  O += P V, registers   |
//   warp 1   +--------------------------+  ----------> +------------------------+
//     ...    |                          |  as A operand|                        |
//
// Scales: each tile of K and of V, and the block's Q, is multiplied by the power of two that brings its largest magnitude
// to 2^14 .. 2^15. A pair has 22 significant bits, and at least steps of 2^-24, 2^-38 of the largest. Weights are made
// 2^WEIGHT_SHIFT times as large.
//
// Tensor cores cut off what does not fit where an ordinary sum rounds, so errors of a long sum would all point the same way.
// Therefore P V of one tile starts from zero and is added to O by an ordinary sum. Scores are long sums as well: that is
// what limits HEAD_DIM to 128, and `split_wide.cu` takes longer vectors.
//
// Shared memory: Q, K and V high, then low; rows are 16 bytes longer than the vectors, an odd number of 16-byte words, so
// that the eight rows of an ldmatrix lie in different banks. Then raw K and V:
//   SHARED_BYTES = 4 * ((BLOCK_ROWS + BLOCK_KEYS) (HEAD_DIM + 8) + BLOCK_KEYS (VALUE_DIM + 8 + HEAD_DIM + VALUE_DIM))
// Barriers of a tile: the largest magnitudes are known, and everybody is done with the parts of the tile before; the parts
// are there. A thread splits the very words that it has copied, and then asks for those of the next tile, which fly
// meanwhile. Vectors that are not aligned are copied by other threads: one barrier more.
//
// Infinities and NaN have no parts. A block that meets one, or a magnitude from 2^63 on, leaves its span and the rest of
// its keys to `simple_rows`. So what is multiplied here is finite, and an unseen key of weight 0 adds nothing.
//
// Sources: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical
// peak performance", arXiv 2203.03341; Dao, "FlashAttention-2", arXiv 2307.08691 (the loop, rows by warps); PTX ISA,
// "Matrix fragments for mma.m16n8k16" and "ldmatrix"; rescaling only when a maximum grew: Zadouri et al.,
// "FlashAttention-4".
// Defines: ELEMENT (FLOAT32), HEAD_DIM, VALUE_DIM, BLOCK_ROWS, BLOCK_KEYS, WARPS, BLOCKS, SHARED_BYTES.
#include "split.cuh"

constexpr int GROUP = 4;  // value tiles of which P V is in temporary accumulators at once

// The warps stage 16 rows each where K and V were, in as many turns as that takes.
constexpr int STAGED_BYTES = 16 * WARPS * STAGE_PITCH * 4, STAGE_BYTES = sizeof(Shared::keys) + sizeof(Shared::values);
constexpr int TURNS = STAGED_BYTES <= STAGE_BYTES ? 1 : STAGED_BYTES <= 2 * STAGE_BYTES ? 2 : 4;
static_assert(STAGED_BYTES <= TURNS * STAGE_BYTES, "rows are staged there");
static_assert(WARPS % TURNS == 0, "equal turns");

// What a thread keeps of its rows: row i of ROWS is row  warp * 16 ROW_TILES + 16 (i / 2) + 8 (i % 2) + lane / 4.
struct Rows {
    float best[ROWS];                            // largest plain score so far
    float sum[ROWS];                             // of this lane's weights
    float acc[ROW_TILES][VALUE_TILES][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) best[i] = negative_infinity(0.0f), sum[i] = 0;
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
            for (int n = 0; n < VALUE_TILES; ++n)
                for (int e = 0; e < 4; ++e) acc[t][n][e] = 0;
    }
};

struct Scores {
    float at[ROW_TILES][SCORE_TILES][4];
};

// Weights as A operands.
struct Weights {
    uint32 high[ROW_TILES][KEY_STEPS][4], low[ROW_TILES][KEY_STEPS][4];
};

__device__ __forceinline__ int row_of(int i) {
    return threadIdx.x / 32 * 16 * ROW_TILES + i / 2 * 16 + i % 2 * 8 + threadIdx.x % 32 / 4;
}

// S = Q K^T for the warp's rows, in units of the scales; addresses are those of this lane's rows of the high parts.
__device__ __forceinline__ void score_tile(Scores& scores, uint32 queries, uint32 keys) {
    constexpr uint32 QUERY_LOW = sizeof(Shared::queries) / 2, KEY_LOW = sizeof(Shared::keys) / 2;
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
            for (int e = 0; e < 4; ++e) scores.at[t][n][e] = 0;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k) {
        uint32 high[ROW_TILES][4], low[ROW_TILES][4];
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t) {
            uint32 address = queries + 2 * (t * 16 * KEY_PITCH + k * 16);
            load_matrices(high[t], address), load_matrices(low[t], address + QUERY_LOW);
        }
#pragma unroll
        for (int n = 0; n < SCORE_TILES; n += 2) {
            uint32 key[4], key_low[4];
            uint32 address = keys + 2 * (n * 8 * KEY_PITCH + k * 16);
            load_matrices(key, address), load_matrices(key_low, address + KEY_LOW);
#pragma unroll
            for (int product = 0; product < 3; ++product)
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int t = 0; t < ROW_TILES; ++t) {
                        const uint32(&b)[4] = product == 1 ? key_low : key;
                        multiply(scores.at[t][n + j], product == 0 ? low[t] : high[t], b[2 * j], b[2 * j + 1]);
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

// What is subtracted from the scores of a row, in units of the exponent of 2.
__device__ __forceinline__ float base_of(float best, float c) { return fmaf(best, c, -float(WEIGHT_SHIFT)); }

// The new maxima of the warp's rows; sums and accumulators go over to them. `unit` is what scores are multiples of.
__device__ __forceinline__ void raise_maxima(Rows& rows, const Scores& scores, float c, float unit) {
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
        best[i] = fmaxf(fmaxf(best[i], __shfl_xor_sync(~0u, best[i], 2)) * unit, rows.best[i]);
        grew |= best[i] > rows.best[i];
    }
    if (!__any_sync(~0u, grew)) return;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        bool empty = rows.best[i] == negative_infinity(0.0f);
        float alpha = empty ? 0.0f : exp2_of(base_of(rows.best[i], c) - base_of(best[i], c));
        rows.sum[i] *= alpha, rows.best[i] = best[i];
#pragma unroll
        for (int n = 0; n < VALUE_TILES; ++n)
            for (int e = 0; e < 2; ++e) rows.acc[i / 2][n][i % 2 * 2 + e] *= alpha;
    }
}

// Scores become weights, which are added up, tile by tile, so that a long sum has few terms, and split.
__device__ __forceinline__ void weigh(Weights& weights, Scores& scores, Rows& rows, float c, float unit) {
    float base[ROWS], sum[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
        base[i] = rows.best[i] == negative_infinity(0.0f) ? 0.0f : base_of(rows.best[i], c), sum[i] = 0;
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const float* pair = &scores.at[i / 2][n][i % 2 * 2];
            float x = exp2_of(fmaf(pair[0], c * unit, -base[i])), y = exp2_of(fmaf(pair[1], c * unit, -base[i]));
            sum[i] += x + y;
            int e = n % 2 * 2 + i % 2;
            split(weights.high[i / 2][n / 2][e], weights.low[i / 2][n / 2][e], x, y);
        }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) rows.sum[i] += sum[i];
}

// O += P V; `unit` is what the tile's values are multiples of.
__device__ __forceinline__ void add_values(Rows& rows, const Weights& weights, uint32 values, float unit) {
    constexpr uint32 LOW = sizeof(Shared::values) / 2;
#pragma unroll
    for (int n = 0; n < VALUE_TILES; n += GROUP) {
        float sum[ROW_TILES][GROUP][4] = {};
#pragma unroll
        for (int k = 0; k < KEY_STEPS; ++k) {
            uint32 high[GROUP / 2][4], low[GROUP / 2][4];
#pragma unroll
            for (int j = 0; j < GROUP / 2; ++j) {
                uint32 address = values + 2 * (k * 16 * VALUE_PITCH + (n + 2 * j) * 8);
                load_transposed(high[j], address), load_transposed(low[j], address + LOW);
            }
#pragma unroll
            for (int product = 0; product < 3; ++product)
#pragma unroll
                for (int j = 0; j < GROUP; ++j)
#pragma unroll
                    for (int t = 0; t < ROW_TILES; ++t) {
                        const uint32(&a)[4] = product == 0 ? weights.low[t][k] : weights.high[t][k];
                        const uint32(&b)[4] = product == 1 ? low[j / 2] : high[j / 2];
                        multiply(sum[t][j], a, b[j % 2 * 2], b[j % 2 * 2 + 1]);
                    }
        }
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
            for (int j = 0; j < GROUP; ++j)
                for (int e = 0; e < 4; ++e) rows.acc[t][n + j][e] = fmaf(sum[t][j][e], unit, rows.acc[t][n + j][e]);
    }
}

// Merge the span into the state, or finish the rows; the accumulators are empty afterwards. Rows are staged at `stage`.
__device__ __forceinline__ void end_span(
    Rows& rows, const Call& call, const Place& block, SpanEnds ends, float c, float* stage) {
    constexpr float UNIT = 1.0f / (1 << WEIGHT_SHIFT);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* staged = stage + warp / TURNS * 16 * STAGE_PITCH;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        rows.sum[i] += __shfl_xor_sync(~0u, rows.sum[i], 1);
        rows.sum[i] += __shfl_xor_sync(~0u, rows.sum[i], 2);
    }
#pragma unroll 1
    for (int turn = 0; turn < TURNS; ++turn) {
        __syncthreads();
        if (warp % TURNS != turn) continue;
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t) {
#pragma unroll
            for (int n = 0; n < VALUE_TILES; ++n)
                for (int e = 0; e < 4; ++e)
                    staged[(lane / 4 + e / 2 * 8) * STAGE_PITCH + n * 8 + lane % 4 * 2 + e % 2] = rows.acc[t][n][e] * UNIT;
            // Row r of the tile is with the four lanes from 4 (r % 8) on: rows 0-7 as 2 t, rows 8-15 as 2 t + 1.
            int holder = lane % 8 * 4;
            float sums[2], bests[2];
            for (int half = 0; half < 2; ++half) {
                sums[half] = __shfl_sync(~0u, rows.sum[2 * t + half], holder);
                bests[half] = __shfl_sync(~0u, rows.best[2 * t + half], holder);
            }
            bool upper = lane / 8 % 2;
            double base = (double(base_of(upper ? bests[1] : bests[0], c)) + WEIGHT_SHIFT) * LN2;
            int64 first = block.row + (warp * ROW_TILES + t) * 16;
            end_rows(call, block, first, staged, STAGE_PITCH, base, (upper ? sums[1] : sums[0]) * UNIT, ends);
        }
    }
    rows.clear();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend(const __grid_constant__ Call call) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    __shared__ Largest largest[WARPS];
    Place block = place_of<BLOCK_ROWS>(call);
    const BlockView& view = view_of_rows<THREADS>(call, block.row, BLOCK_ROWS);
    Walk<BLOCK_KEYS> walk(call, view);
    int span_piece = walk.piece, span_offset = walk.offset;
    if (walk.more(call)) fetch(shared, call, block, walk);
    const int query_scale = walk.more(call) ? split_queries(call, block, shared, largest) : 0;

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // ldmatrix takes row addresses from the lanes: lanes 0-15 name the 16 rows, lanes 16-31 the same rows 8 columns on;
    // as B operand of two neighbouring score tiles: rows 0-7, rows 0-7 8 columns on, rows 8-15, rows 8-15 8 columns on.
    int by_row = lane % 16, by_column = lane / 16 * 8;
    uint32 queries = shared_address(shared.queries.high + (warp * 16 * ROW_TILES + by_row) * KEY_PITCH + by_column);
    uint32 keys = shared_address(shared.keys.high + (lane % 8 + lane / 16 * 8) * KEY_PITCH + lane / 8 % 2 * 8);
    uint32 values = shared_address(shared.values.high + by_row * VALUE_PITCH + by_column);

    const float c = float(call.scale * LOG2E);
    Rows rows;
    rows.clear();
    SpanEnds ends = {bool(call.fresh), false};
    float* stage = reinterpret_cast<float*>(shared.keys.high);
    int span_keys = 0;
    while (walk.more(call)) {
        bool full = walk.full(call, view);
        int64 token = walk.token(call);
        int count = walk.count(call);
        copies_arrived();
        if (!call.aligned) __syncthreads();  // other threads have copied it
        uint32 key = largest_of<BLOCK_KEYS * HEAD_DIM>(shared.raw_keys);
        Largest found = largest_of_block(largest, key, largest_of<BLOCK_KEYS * VALUE_DIM>(shared.raw_values));
        if (max(found.a, found.b) >= TOO_LARGE || query_scale == NO_SCALE)
            return simple_rows<ELEMENT, float, BLOCK_ROWS, BLOCK_KEYS, THREADS>(
                call, block, view, Walk<BLOCK_KEYS>::back_at(call, view, span_piece, span_offset), ends.first);
        int key_scale = scale_of(found.a, 126 - query_scale), value_scale = scale_of(found.b, 126);
        split_rows<BLOCK_KEYS * HEAD_DIM, HEAD_DIM>(shared.keys, shared.raw_keys, power_of_two(key_scale));
        split_rows<BLOCK_KEYS * VALUE_DIM, VALUE_DIM>(shared.values, shared.raw_values, power_of_two(value_scale));
        __syncthreads();
        walk.step(call, view), span_keys += BLOCK_KEYS;
        ends.last = !walk.more(call);
        if (!ends.last) fetch(shared, call, block, walk);

        Scores scores;
        Weights weights;
        float unit = power_of_two(-query_scale - key_scale);
        score_tile(scores, queries, keys);
        if (!full) hide(scores, call, block.row, token, count);
        raise_maxima(rows, scores, c, unit);
        weigh(weights, scores, rows, c, unit);
        add_values(rows, weights, values, power_of_two(-value_scale));
        if (ends.last || span_keys >= call.span_keys) {
            end_span(rows, call, block, ends, c, stage);
            if (ends.last) return;
            ends.first = false, span_piece = walk.piece, span_offset = walk.offset, span_keys = 0;
        }
    }
    ends.last = true;  // no row of the block sees a key
    end_span(rows, call, block, ends, c, stage);
}
