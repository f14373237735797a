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
// to 2^14 .. 2^15; so are the weights that a row has in a tile. A pair has 22 significant bits, and at least steps of 2^-24,
// 2^-39 of the largest. Weights that lose digits by that (`SHADE`), as where one key of a tile outweighs the others by far,
// are multiplied in further parts.
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
// Infinities and NaN have no parts. A block that meets one, or a magnitude from 2^63 on, leaves its keys to `simple_rows`. So what is multiplied here is finite, and an unseen key of weight 0 adds nothing.
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

// Bases of a tile, its largest scores rounded up; those of the rows follow where they are exceeded, and sums and
// accumulators go over to them. `unit` is what scores are multiples of, in powers of 2.
__device__ __forceinline__ void raise_bases(float (&tile)[ROWS], Rows& rows, const Scores& scores, float unit) {
    bool grew = false;
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            float larger = fmaxf(scores.at[i / 2][n][i % 2 * 2], scores.at[i / 2][n][i % 2 * 2 + 1]);
            tile[i] = n == 0 ? larger : fmaxf(tile[i], larger);
        }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) tile[i] = fmaxf(tile[i], __shfl_xor_sync(~0u, tile[i], 1));
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        tile[i] = whole(fmaxf(tile[i], __shfl_xor_sync(~0u, tile[i], 2)) * unit);
        grew |= tile[i] > rows.base[i];
    }
    if (!__any_sync(~0u, grew)) return;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        float base = fmaxf(tile[i], rows.base[i]), alpha = exp2_of(rows.base[i] - base);
        rows.sum[i] *= alpha, rows.base[i] = base;
#pragma unroll
        for (int n = 0; n < VALUE_TILES; ++n)
            for (int e = 0; e < 2; ++e) rows.acc[i / 2][n][i % 2 * 2 + e] *= alpha;
    }
}

// Weights of a tile, 2^(s c - tile + TOP), split. Whether some are so small beside the others that they lost digits, or
// zero. They are summed tile by tile, so that a long sum has few terms.
__device__ __forceinline__ bool weigh(
    Weights& weights, const Scores& scores, Rows& rows, const float (&tile)[ROWS], const float (&factor)[ROWS], float unit) {
    float sum[ROWS];
    uint32 least_pair = 0x7bff7bff;
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const float* pair = &scores.at[i / 2][n][i % 2 * 2];
            float base = tile[i] - TOP, x = exp2_of(fmaf(pair[0], unit, -base)), y = exp2_of(fmaf(pair[1], unit, -base));
            sum[i] = n == 0 ? x + y : sum[i] + (x + y);
            uint32& high = weights.high[i / 2][n / 2][n % 2 * 2 + i % 2];
            split(high, weights.low[i / 2][n / 2][n % 2 * 2 + i % 2], x, y);
            asm("min.f16x2 %0, %0, %1;" : "+r"(least_pair) : "r"(high));
        }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) rows.sum[i] = fmaf(sum[i], factor[i], rows.sum[i]);
    constexpr uint32 SMALL = (15 + TOP - SHADE) << 10;  // 2^(TOP - SHADE), float16
    return (least_pair & 0xffff) < SMALL || least_pair >> 16 < SMALL;
}

// Parts of what the parts of small weights have lost, 2^(LIFT lift) times as large. Whether there is anything.
__device__ __forceinline__ bool lift(Weights& weights, const Scores& scores, const float (&tile)[ROWS], float unit, int lift) {
    bool found = false;
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const float* pair = &scores.at[i / 2][n][i % 2 * 2];
            float base = tile[i] - TOP, x = exp2_of(fmaf(pair[0], unit, -base)), y = exp2_of(fmaf(pair[1], unit, -base));
            uint32 high, low;
#pragma unroll 1
            for (int step = 0; step < lift; ++step) {
                x = shaded(x), y = shaded(y), split(high, low, x, y);
                x = lost(x, high, low) * power_of_two(LIFT), y = lost(y, high >> 16, low >> 16) * power_of_two(LIFT);
            }
            split(high, low, x, y);
            weights.high[i / 2][n / 2][n % 2 * 2 + i % 2] = high, weights.low[i / 2][n / 2][n % 2 * 2 + i % 2] = low;
            found |= x != 0 || y != 0;
        }
    return found;
}

// O += P V, scaled by the power of two `early`, 1 as a rule, and then row by row by `late`: neither is too small for float32.
__device__ __forceinline__ void add_values(
    Rows& rows, const Weights& weights, uint32 values, float early, const float (&late)[ROWS]) {
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
        if (early != 1)
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t)
                for (int j = 0; j < GROUP; ++j)
                    for (int e = 0; e < 4; ++e) sum[t][j][e] *= early;
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
            for (int j = 0; j < GROUP; ++j)
                for (int e = 0; e < 4; ++e)
                    rows.acc[t][n + j][e] = fmaf(sum[t][j][e], late[2 * t + e / 2], rows.acc[t][n + j][e]);
    }
}

// One tile whose parts are there: scores become weights, weights and values join the rows. `unit`: see `raise_bases`.
__device__ __forceinline__ void attend_tile(
    Rows& rows, const Scores& scores, uint32 values, float unit, int value_scale) {
    float tile[ROWS], factor[ROWS], late[ROWS];
    raise_bases(tile, rows, scores, unit);
    const float back = power_of_two(-value_scale);
    const bool far = value_scale > EARLY_SCALE;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        factor[i] = exp2_of(tile[i] - rows.base[i] - (TOP + SPAN_BITS));
        late[i] = far ? factor[i] : factor[i] * back;
    }
    Weights weights;
    bool shaded = weigh(weights, scores, rows, tile, factor, unit);
    add_values(rows, weights, values, far ? back : 1, late);
    if (__builtin_expect(!__any_sync(~0u, shaded), 1)) return;
#pragma unroll 1
    for (int times = 1; times <= LIFTS; ++times)
        if (__any_sync(~0u, lift(weights, scores, tile, unit, times)))
            add_values(rows, weights, values, back * power_of_two(-LIFT * times), factor);
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

// Merge the rows into the state, or finish them. Rows are staged at `stage`.
__device__ __forceinline__ void end_block(Rows& rows, const Call& call, const Place& block, float* stage) {
    join_lanes(rows);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* staged = stage + warp / TURNS * 16 * STAGE_PITCH;
#pragma unroll 1
    for (int turn = 0; turn < TURNS; ++turn) {
        __syncthreads();
        if (warp % TURNS != turn) continue;
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t) {
#pragma unroll
            for (int n = 0; n < VALUE_TILES; ++n)
                for (int e = 0; e < 4; ++e)
                    staged[(lane / 4 + e / 2 * 8) * STAGE_PITCH + n * 8 + lane % 4 * 2 + e % 2] = rows.acc[t][n][e];
            // Row r of the tile is with the four lanes from 4 (r % 8) on: rows 0-7 as 2 t, rows 8-15 as 2 t + 1.
            int holder = lane % 8 * 4;
            float sums[2], bases[2];
            for (int half = 0; half < 2; ++half) {
                sums[half] = __shfl_sync(~0u, rows.sum[2 * t + half], holder);
                bases[half] = __shfl_sync(~0u, rows.base[2 * t + half], holder);
            }
            bool upper = lane / 8 % 2;
            int64 first = block.row + (warp * ROW_TILES + t) * 16;
            end_rows(
                call, block, first, staged, STAGE_PITCH, natural_base(upper ? bases[1] : bases[0]),
                upper ? sums[1] : sums[0]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend(const __grid_constant__ Call call) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    __shared__ Largest largest[WARPS];
    Place block = place_of<BLOCK_ROWS>(call);
    const BlockView& view = view_of_rows<THREADS>(call, block.row, BLOCK_ROWS);
    Walk<BLOCK_KEYS> walk(call, view);
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
    Totals<ROWS, 2 * VALUE_TILES> totals;
    Rows rows;
    rows.clear();
    auto element = [&](int i, int n) -> float& { return element_at(rows, i, n); };
    int span_keys = 0;
    bool first = true;  // span
    while (walk.more(call)) {
        bool full = walk.full(call, view);
        int64 token = walk.token(call);
        int count = walk.count(call);
        copies_arrived();
        if (!call.aligned) __syncthreads();  // other threads have copied it
        uint32 key = largest_of<BLOCK_KEYS * HEAD_DIM>(shared.raw_keys);
        Largest found = largest_of_block(largest, key, largest_of<BLOCK_KEYS * VALUE_DIM>(shared.raw_values));
        if (max(found.a, found.b) >= TOO_LARGE || query_scale == NO_SCALE)
            return simple_rows<ELEMENT, float, BLOCK_ROWS, BLOCK_KEYS, THREADS>(call, block, view);
        int key_scale = scale_of(found.a, 126 - query_scale), value_scale = scale_of(found.b, 126);
        split_rows<BLOCK_KEYS * HEAD_DIM, HEAD_DIM>(shared.keys, shared.raw_keys, power_of_two(key_scale));
        split_rows<BLOCK_KEYS * VALUE_DIM, VALUE_DIM>(shared.values, shared.raw_values, power_of_two(value_scale));
        __syncthreads();
        walk.step(call, view), span_keys += BLOCK_KEYS;
        bool last = !walk.more(call);
        if (!last) fetch(shared, call, block, walk);

        Scores scores;
        score_tile(scores, queries, keys);
        if (!full) hide(scores, call, block.row, token, count);
        attend_tile(rows, scores, values, c * power_of_two(-query_scale - key_scale), value_scale);
        if (!last && span_keys >= call.span_keys)
            close_span(totals, rows.base, rows.sum, element, first), first = false, span_keys = 0;
    }
    if (!first) join_totals(totals, rows.base, rows.sum, element);
    end_block(rows, call, block, reinterpret_cast<float*>(shared.keys.high));
}
