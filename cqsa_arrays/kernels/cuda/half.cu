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
// Two groups of four warps take turns: while one multiplies (values of tile i, then scores of tile i + 1), the other
// exponentiates, so that tensor cores and ordinary units work at the same time. Named barriers 1 and 2 pass the turn.
//
//   group 0   V0 S1 | softmax 1 | V1 S2 | softmax 2 | ...
//   group 1         | V0 S1     | softm | V1 S2     | ...
//
// Shared memory: Q, two K tiles, three V tiles (scores are a tile ahead of values); rows are 16 bytes longer than the vectors,
// an odd number of 16-byte words, so that the eight rows of an ldmatrix lie in different banks:
//   SHARED_BYTES = 2 * ((BLOCK_ROWS + 2 BLOCK_KEYS) (HEAD_DIM + 8) + 3 BLOCK_KEYS (VALUE_DIM + 8))
// The first group copies tile i + 2 in parts between its products, into places that both groups have left.
//
// Sources: Dao, "FlashAttention-2", arXiv 2307.08691 (the loop, rows by warps); Shah et al., "FlashAttention-3", arXiv
// 2407.08608 (groups that take turns); Zadouri et al., "FlashAttention-4" (rescaling only where a maximum grew much).
// Defines: ELEMENT (FLOAT16 or BFLOAT16), HEAD_DIM, VALUE_DIM, BLOCK_ROWS, BLOCK_KEYS, WARPS, BLOCKS (a multiprocessor),
// SHARED_BYTES.
#include "half.cuh"

// Query fragments stay in registers where they are few, and are read again for every tile where they are not.
constexpr bool QUERIES_STAY = HEAD_DIM <= 64;
// The 16 x 16 query fragment of row tile t and columns 16 k ..
__device__ __forceinline__ void load_queries(uint32 (&a)[4], uint32 queries, int t, int k) {
    load_matrices(a, queries + 2 * (t * 16 * KEY_PITCH + k * 16));
}

// Where this lane reads, and the query fragments if they stay.
struct Operands {
    uint32 queries, keys, values;
    uint32 kept[QUERIES_STAY ? HEAD_DIM / 16 : 1][ROW_TILES][4];
};

// S = Q K^T with the key tile `tile` bytes behind the first.
__device__ __forceinline__ void score_tile(Scores& scores, const Operands& operands, uint32 tile) {
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
                for (int e = 0; e < 4; ++e) a[t][e] = operands.kept[k][t][e];
            } else {
                load_queries(a[t], operands.queries, t, k);
            }
        }
#pragma unroll
        for (int n = 0; n < SCORE_TILES; n += 2) {
            uint32 b[4];
            load_matrices(b, operands.keys + tile + 2 * (n * 8 * KEY_PITCH + k * 16));
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t) {
                multiply(scores.at[t][n], a[t], b[0], b[1]);
                multiply(scores.at[t][n + 1], a[t], b[2], b[3]);
            }
        }
    }
}

// O += P V with the value tile `tile` bytes behind the first: the weights of 16 keys are an A operand as they lie in the
// registers. `beside(k)` is called between the products of 16 keys.
template <typename Beside>
__device__ __forceinline__ void add_values(
    Rows& rows, const Weights& weights, const Operands& operands, uint32 tile, Beside beside) {
#pragma unroll
    for (int k = 0; k < BLOCK_KEYS / 16; ++k) {
#pragma unroll
        for (int n = 0; n < VALUE_TILES; n += 2) {
            uint32 b[4];
            load_transposed(b, operands.values + tile + 2 * (k * 16 * VALUE_PITCH + n * 8));
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t) {
                multiply(rows.acc[t][n], weights.at[k][t], b[0], b[1]);
                multiply(rows.acc[t][n + 1], weights.at[k][t], b[2], b[3]);
            }
        }
        beside(k);
    }
}

// Merge the rows into the state, or finish them. `stage` is free memory of the block, 16 * WARPS rows of STAGE_PITCH floats.
__device__ __forceinline__ void end_block(const Rows& rows, const Call& call, const Place& block, float* stage) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* staged = stage + warp * 16 * STAGE_PITCH;
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
            call, block, first, staged, STAGE_PITCH, natural_base(upper ? bases[1] : bases[0]), upper ? sums[1] : sums[0]);
    }
}

// Bring the first tile of a stretch, and set the streams to the second.
__device__ __forceinline__ void begin_stretch(
    const Call& call, const Place& block, const Stretch& stretch, Shared& shared, Streams& streams) {
    const Piece& piece = call.pieces[stretch.piece];
    auto key = static_cast<const uint16*>(piece.keys) + element_of(call.key_strides, block, stretch.offset);
    auto value = static_cast<const uint16*>(piece.values) + element_of(call.value_strides, block, stretch.offset);
    copy_slowly<BLOCK_KEYS, HEAD_DIM, KEY_PITCH>(
        shared.keys[0], key, call.key_strides.token, stretch.count, call.head_dim, call.aligned);
    copy_slowly<BLOCK_KEYS, VALUE_DIM, VALUE_PITCH>(
        shared.values[0], value, call.value_strides.token, stretch.count, call.value_dim, call.aligned);
    copies_issued();
    streams.keys.start(key + BLOCK_KEYS * call.key_strides.token, call.key_strides.token);
    streams.values.start(value + BLOCK_KEYS * call.value_strides.token, call.value_strides.token);
    copies_arrived();
    __syncthreads();
}

// All tiles of a stretch, of which the first is here. False: a value that is not finite was met where a row may not see it.
__device__ __forceinline__ bool attend_stretch(
    const Call& call, const Course& course, const Stretch& stretch, Shared& shared, Streams& streams,
    const Operands& operands, Rows& rows, float c, int group) {
    int after = stretch.tiles - 1;
    if (GROUPS == 2 && group == 1) leave(group);
    enter(group);
    uint32 key_here = 0, value_here = 0, value_next = VALUE_TILE;
    if (group == 0 && after > 0) streams.copy(call, KEY_TILE, VALUE_TILE);
    Scores scores;
    Weights weights;
    score_tile(scores, operands, 0);
    leave(group);
    while (true) {
        if (__builtin_expect(after < course.stretch.low || after >= course.stretch.high, 0)) {
            if (irregular(shared.values[0] + value_here / 2)) return false;
            const Stretch& here = course.stretch;
            int64 first = call.pieces[here.piece].start + here.offset + (here.tiles - 1 - after) * BLOCK_KEYS;
            hide(scores, call, course.block.row, first, here.count);
        }
        soften(scores, rows, c, [&](const float(&alpha)[ROWS]) { rescale(rows, alpha); });
        pack(weights, scores);
        if (after == 0) break;
        --after;
        enter(group);
        uint32 value_to = value_next == 2 * VALUE_TILE ? 0 : value_next + VALUE_TILE, key_to = key_here;
        int wanted = group == 0 && after > 0;
        key_here = KEY_TILE - key_here;
        add_values(rows, weights, operands, value_here, [&](int k) {
            streams.copy_part(call, key_to, value_to, k, BLOCK_KEYS / 16, wanted);
        });
        copies_issued();
        score_tile(scores, operands, key_here);
        leave(group);
        value_here = value_next, value_next = value_next == 2 * VALUE_TILE ? 0 : value_next + VALUE_TILE;
    }
    enter(group);
    add_values(rows, weights, operands, value_here, [](int) {});
    if (group == 0) leave(group);
    __syncthreads();
    return true;
}

// Queries to shared memory; where the lane reads its fragments.
__device__ __forceinline__ Operands begin_block(const Call& call, const Place& block, Shared& shared) {
    auto query = static_cast<const uint16*>(call.queries) + element_of(call.query_strides, block, block.row);
    copy_rows<uint16, BLOCK_ROWS, HEAD_DIM, KEY_PITCH, THREADS>(
        shared.queries, query, call.query_strides.token, int(least(call.query_tokens - block.row, BLOCK_ROWS)),
        call.head_dim, call.aligned);
    copies_issued();
    copies_arrived();
    __syncthreads();
    // ldmatrix takes row addresses from the lanes. A operand: lanes 0-15 name the 16 rows, lanes 16-31 the same rows 8
    // columns on; so for values, transposed. Keys, as B operand of two neighbouring score tiles: rows 0-7, rows 0-7 8
    // columns on, rows 8-15, rows 8-15 8 columns on.
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32 by_row = lane % 16, by_column = lane / 16 * 8;
    Operands operands;
    operands.queries = shared_address(shared.queries + (warp * 16 * ROW_TILES + by_row) * KEY_PITCH + by_column);
    operands.keys = shared_address(shared.keys[0]) + 2 * ((lane % 8 + lane / 16 * 8) * KEY_PITCH + lane / 8 % 2 * 8);
    operands.values = shared_address(shared.values[0]) + 2 * (by_row * VALUE_PITCH + by_column);
    if (QUERIES_STAY)
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; ++k)
            for (int t = 0; t < ROW_TILES; ++t) load_queries(operands.kept[k][t], operands.queries, t, k);
    return operands;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend(const __grid_constant__ Call call) {
    extern __shared__ __align__(16) char memory[];
    __shared__ __align__(8) char course_memory[sizeof(Course)];
    Course& course = *reinterpret_cast<Course*>(course_memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Place block = place_of<BLOCK_ROWS>(call);
    const BlockView& view = view_of_rows<THREADS>(call, block.row, BLOCK_ROWS);
    if (threadIdx.x == 0) {
        course.block = block, course.walk = Walk<BLOCK_KEYS>(call, view);
        course.last = !course.walk.more(call);
        course.over = true;
    }
    const Operands operands = begin_block(call, block, shared);
    const int group = GROUPS == 1 ? 0 : __shfl_sync(~0u, threadIdx.x / 128, 0);
    const float c = float(call.scale * LOG2E);
    Streams streams(shared);
    Totals totals;
    Rows rows;
    rows.clear();
    for (bool first = true; !course.last; first = false) {
        do {
            Course now = course;
            if (now.over) now.span_keys = 0;
            const Stretch stretch = now.stretch = now.next(call, view);
            __syncthreads();
            if (threadIdx.x == 0) course = now;
            begin_stretch(call, now.block, stretch, shared, streams);
            if (!attend_stretch(call, course, stretch, shared, streams, operands, rows, c, group))
                return simple_rows<ELEMENT, float, BLOCK_ROWS, BLOCK_KEYS, THREADS>(call, course.block, view);
        } while (!course.over);
        close_span(rows, totals, first, course.last);
    }
    end_block(rows, call, course.block, reinterpret_cast<float*>(shared.keys));
}
