// attend, float64 on double-precision tensor cores (DMMA): mma.sync f64, double accumulation, double exponentials.
//
// A block of BLOCK_ROWS rows walks the tiles of BLOCK_KEYS keys, which it computes STEP_KEYS at a time. A warp owns
// ROW_TILES x 16 rows for good. Where there are twice as many warps as 16 rows, for long value vectors, two warps
// (PARTS) compute the same scores, each for one half of the value columns.
//
//                 keys of a step                                       rows of the warp
//   warp 0   +----------------------+                        value    +-----------------+
//   16 x RT  |  S = Q K^T           |  P = exp(scale S - m)  columns  |  O^T += V^T P^T |
//   warp 1   +----------------------+  ------------------->           +-----------------+
//     ...    |                      |    P^T as B operand
//
// The second product is transposed because then nothing moves between registers: weights are a B operand as the scores
// lie, and 16 bytes of a value vector are a pair of elements that an A operand has side by side.
//
// Shared memory (struct Shared): powers of 2 for the exponential, the walk, two K tiles, two V tiles, and the query
// columns from KEPT on, in pairs of rows r, r + 8; the first KEPT columns stay in registers. Fragments are read by 16
// bytes a lane, eight lanes at a time: two of lane / 4, four of lane % 4. The pitches put these into different banks:
//   keys     HEAD_DIM + 8          two rows 64 bytes apart (mod 128), of each of which four lanes read 64 bytes
//   values   VALUE_DIM + 2         every second of eight rows, 32 bytes apart, of each of which two lanes read 32 bytes
//   queries  HEAD_DIM - KEPT + 1   units of 16 bytes; two rows one unit apart, four lanes read every second one
//   SHARED_BYTES = 8 (20 + BLOCK_ROWS (HEAD_DIM - KEPT + 1) + 2 BLOCK_KEYS (HEAD_DIM + VALUE_DIM + 10)), where
//   KEPT = ROW_TILES == 1 ? min(HEAD_DIM, (144 - VALUE_DIM / PARTS) / 16 * 16) : 0
// One barrier a tile: it says that tile i has arrived and that everybody is done with tile i - 1, whose place tile
// i + 1 takes while tile i is computed.
//
// Compute capabilities 8.6, 8.9 and 12.x have these instructions too, but few units for them: right, and about as fast
// as plain double arithmetic is there.
//
// Sources: Dao, "FlashAttention-2", arXiv 2307.08691 (the loop, rows by warps); PTX ISA, "Matrix fragments" of mma with
// .f64; rescaling only when a maximum grew much: Zadouri et al., "FlashAttention-4".
// Defines: ELEMENT (FLOAT64), HEAD_DIM, VALUE_DIM, BLOCK_ROWS, BLOCK_KEYS, WARPS, SHARED_BYTES; and, where the defaults
// do not please, those below and of double.cuh.
#include "double.cuh"
#include "simple.cuh"

#ifndef STEP
#define STEP (BLOCK_KEYS % 32 == 0 && ROW_TILES == 1 && MMA_ROWS == 16 ? 32 : BLOCK_KEYS % 16 == 0 ? 16 : 8)
#endif
#ifndef KEEP
#define KEEP (ROW_TILES == 1 ? (144 - COLUMNS) / 16 * 16 : 0)
#endif
#ifndef UNROLL
#define UNROLL (ROW_TILES == 1 ? 2 : 1)
#endif
#ifndef BLOCKS
#define BLOCKS (WARPS < 8 ? 8 / WARPS : 1)
#endif

constexpr int THREADS = 32 * WARPS;
constexpr int PARTS = 16 * WARPS > BLOCK_ROWS ? 16 * WARPS / BLOCK_ROWS : 1, COLUMNS = VALUE_DIM / PARTS;
constexpr int ROW_TILES = BLOCK_ROWS * PARTS / (16 * WARPS), ROWS = 2 * ROW_TILES;
constexpr int STEP_KEYS = STEP, KEPT = KEEP < HEAD_DIM ? KEEP : HEAD_DIM, UNROLLED = UNROLL;
constexpr int KEY_PITCH = HEAD_DIM + 8, VALUE_PITCH = VALUE_DIM + 2, QUERY_PITCH = HEAD_DIM - KEPT + 1;
constexpr int SCORE_TILES = STEP_KEYS / 8, COLUMN_TILES = COLUMNS / 16;
// Depth of one product of values and weights, in groups of 4 keys.
constexpr int SLOTS = STEP_KEYS % 16 == 0 ? 4 : 2;
static_assert(ELEMENT == FLOAT64, "double inputs");
static_assert(ROW_TILES * 16 * WARPS == BLOCK_ROWS * PARTS && WARPS % PARTS == 0, "whole warps of rows");
static_assert(BLOCK_KEYS % STEP_KEYS == 0 && STEP_KEYS % 8 == 0 && KEPT % 16 == 0, "whole fragments");
static_assert(HEAD_DIM % 32 == 0 && VALUE_DIM % 32 == 0 && COLUMNS % 16 == 0, "whole fragments");

struct __align__(16) Pair {
    double low, high;
};

struct Shared {
    alignas(16) double powers[16];
    Walk<BLOCK_KEYS> tiles[2];  // where the walk stands: the tile of each stage
    alignas(16) double keys[2][BLOCK_KEYS * KEY_PITCH];
    double values[2][BLOCK_KEYS * VALUE_PITCH];
    Pair queries[BLOCK_ROWS / 2 * QUERY_PITCH];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host computes the same size");

// The high word of a double, as a float, which has the same order; an infinity or NaN from 2^1017 on.
__device__ __forceinline__ float high_word(double x) { return __int_as_float(__double2hiint(x)); }

// What a thread keeps. Row i of ROWS of the softmax is row  16 ROW_TILES (warp / PARTS) + 8 i + lane / 4  of the block;
// acc[n][i][2 c + e] is of column  16 n + 2 (lane / 4) + c  and row  8 i + 2 (lane % 4) + e.
struct Rows {
    double best[ROWS];  // largest plain score when the row's base was last moved, which it is
    float limit[ROWS];  // high word, as a float, of a score that may still be smaller than what moves the base
    double sum[ROWS];   // of this lane's weights, which are exp(scale (s - best)) 2^-SMALL
    double acc[COLUMN_TILES][ROWS][4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            best[i] = negative_infinity(0.0), limit[i] = high_word(best[i]), sum[i] = 0;
            for (int n = 0; n < COLUMN_TILES; ++n)
                for (int e = 0; e < 4; ++e) acc[n][i][e] = 0;
        }
    }
};

// at[t][n][2 h + e]: row i = 2 t + h, key 8 n + 2 (lane % 4) + e.
struct Scores {
    double at[ROW_TILES][SCORE_TILES][4];
};

// `x`, unknown to the compiler, so that what is made of it is made where it is needed instead of before the loop: what
// is needed once a span must not occupy registers in between.
__device__ __forceinline__ int made_here(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

__device__ __forceinline__ int first_row() { return threadIdx.x / 32 / PARTS * 16 * ROW_TILES; }
// A operands of the queries, of 16 columns each; one without use where none is kept.
struct Kept {
    double at[KEPT > 0 ? KEPT / 16 : 1][ROW_TILES][8];
};

__device__ __forceinline__ int part() { return threadIdx.x / 32 % PARTS; }

// The column of a head that stands at depth 4 slot + lane % 4.
__device__ __forceinline__ int column_of(int slot) { return slot / 2 * 8 + threadIdx.x % 4 * 2 + slot % 2; }

// Element of the query row `row` of the block; zero where there is none.
__device__ __forceinline__ double query(const Call& call, const Place& block, int row, int column) {
    if (block.row + row >= call.query_tokens || column >= call.head_dim) return 0;
    return static_cast<const double*>(call.queries)[element_of(call.query_strides, block, block.row + row) + column];
}

// Query columns below KEPT as A operands, the others to shared memory.
__device__ __forceinline__ void load_queries(Kept& kept, Pair* queries, const Call& call, const Place& block) {
    int row = first_row() + threadIdx.x % 32 / 4;
#pragma unroll
    for (int slot = 0; slot < KEPT / 4; ++slot)
        for (int i = 0; i < ROWS; ++i)
            kept.at[slot / 4][i / 2][slot % 4 * 2 + i % 2] = query(call, block, row + 8 * i, column_of(slot));
    for (int i = threadIdx.x; i < BLOCK_ROWS / 2 * QUERY_PITCH; i += THREADS) {
        int row = i / QUERY_PITCH / 8 * 16 + i / QUERY_PITCH % 8, column = KEPT + i % QUERY_PITCH;
        queries[i] = {query(call, block, row, column), query(call, block, row + 8, column)};
    }
}

// Scores of all keys of a step += the products of 16 columns, those of the queries being `a`.
__device__ __forceinline__ void add_products(Scores& scores, const double (&a)[ROW_TILES][8], const double* keys) {
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n) {
        const Pair* at = reinterpret_cast<const Pair*>(keys + 8 * n * KEY_PITCH);
        Pair left = at[0], right = at[4];
        double b[4] = {left.low, left.high, right.low, right.high};
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t) multiply<4>(scores.at[t][n], a[t], b);
    }
}

// S = Q K^T for the warp's rows; `queries` and `keys` are where this lane reads first.
__device__ __forceinline__ void score_tile(Scores& scores, const Kept& kept, const Pair* queries, const double* keys) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t)
        for (int n = 0; n < SCORE_TILES; ++n)
            for (int e = 0; e < 4; ++e) scores.at[t][n][e] = 0;
#pragma unroll
    for (int k = 0; k < KEPT; k += 16) add_products(scores, kept.at[k / 16], keys + k);
#pragma unroll UNROLLED
    for (int k = KEPT; k < HEAD_DIM; k += 16) {
        double a[ROW_TILES][8];
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t)
            for (int slot = 0; slot < 4; ++slot) {
                Pair rows = queries[8 * t * QUERY_PITCH + k - KEPT + slot / 2 * 8 + slot % 2];
                a[t][2 * slot] = rows.low, a[t][2 * slot + 1] = rows.high;
            }
        add_products(scores, a, keys + k);
    }
}

// Scores of keys that a row does not see become -inf; `first` is the token of the step's first key, `count` keys exist.
__device__ __forceinline__ void hide(Scores& scores, const Call& call, int64 block_row, int64 first, int count) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        int64 row = block_row + made_here(first_row() + 8 * i + threadIdx.x % 32 / 4);
        Interval seen = visible_keys(call, least(row, call.query_tokens - 1));
        int low = int(most(0, least(seen.low - first, STEP_KEYS)));
        int high = int(most(0, least(seen.high - first, count)));
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
            for (int e = 0; e < 2; ++e) {
                int key = n * 8 + threadIdx.x % 4 * 2 + e;
                double& score = scores.at[i / 2][n][i % 2 * 2 + e];
                score = key >= low && key < high ? score : negative_infinity(0.0);
            }
    }
}

// The larger of two high words; NaN where either is.
__device__ __forceinline__ float larger(float a, double b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(high_word(b)));
    return result;
}

// Some row's maximum may have grown much: find the new ones, and let sums and accumulators go over to them. A row that has
// a score of NaN or +inf becomes NaN here, and stays it: its maximum is +inf from now on.
__device__ __forceinline__ void raise(const Scores& scores, Rows& rows, double c, const double* powers) {
    const double nothing = negative_infinity(0.0), everything = -nothing;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        double best = rows.best[i];
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
            for (int e = 0; e < 2; ++e) {
                double score = scores.at[i / 2][n][i % 2 * 2 + e];
                best = score <= best ? best : score < everything ? score : everything;
            }
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) {
            double other = __shfl_xor_sync(~0u, best, offset);
            best = other > best ? other : best;
        }
        double base = best == nothing ? 0.0 : best;
        double alpha = best == everything ? nothing + everything : factor_of(rows.best[i] - base, c, powers);
        rows.best[i] = best, rows.limit[i] = high_word(best + 16 * GROWTH / c), rows.sum[i] *= alpha;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            double factor = __shfl_sync(~0u, alpha, threadIdx.x % 4 * 8 + e * 4);
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; ++n) rows.acc[n][i][e] *= factor, rows.acc[n][i][2 + e] *= factor;
        }
    }
}

// One step of the online softmax: scores become weights. They are summed step by step, so that a long sum has few terms.
__device__ __forceinline__ void soften(Scores& scores, Rows& rows, double c, const double* powers) {
    bool grew = false;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        float top = high_word(scores.at[i / 2][0][i % 2 * 2]);
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
            for (int e = 0; e < 2; ++e) top = larger(top, scores.at[i / 2][n][i % 2 * 2 + e]);
        // Only a score whose high word is smaller is certainly smaller, and no word is smaller or larger than NaN.
        grew |= !(top < rows.limit[i]);
    }
    if (__any_sync(~0u, grew)) raise(scores, rows, c, powers);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        double base = rows.best[i] == negative_infinity(0.0) ? 0.0 : rows.best[i], sum = 0;
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n) {
            double* pair = &scores.at[i / 2][n][i % 2 * 2];
            pair[0] = weight_of(pair[0] - base, c, powers), pair[1] = weight_of(pair[1] - base, c, powers);
            sum += pair[0] + pair[1];
        }
        rows.sum[i] += sum;
    }
}

// O^T += V^T P^T; `values` is where this lane reads first.
__device__ __forceinline__ void add_values(Rows& rows, const Scores& scores, const double* values) {
#pragma unroll
    for (int k = 0; k < STEP_KEYS; k += 4 * SLOTS) {
        double b[ROWS][SLOTS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            for (int slot = 0; slot < SLOTS; ++slot)
                b[i][slot] = scores.at[i / 2][k / 8 + slot / 2][i % 2 * 2 + slot % 2];
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n) {
            double a[2 * SLOTS];
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                int key = k + slot / 2 * 8 + slot % 2;
                Pair columns = *reinterpret_cast<const Pair*>(values + key * VALUE_PITCH + 16 * n);
                a[2 * slot] = columns.low, a[2 * slot + 1] = columns.high;
            }
#pragma unroll
            for (int i = 0; i < ROWS; ++i) multiply<SLOTS>(rows.acc[n][i], a, b[i]);
        }
    }
}

// Whether the value tile holds an infinity or NaN; a barrier.
__device__ bool irregular(const double* values) {
    bool found = false;
    for (int i = threadIdx.x; i < BLOCK_KEYS * VALUE_DIM; i += THREADS)
        found |= (~__double2hiint(values[i / VALUE_DIM * VALUE_PITCH + i % VALUE_DIM]) & 0x7ff00000) == 0;
    return __syncthreads_or(found);
}

// What the spans of a launch have come to so far. What rounding takes from these sums stays in the rows and joins at the
// next span's end, so that the error does not grow with their number. It lies in local memory, of which the driver keeps
// some for every thread that can be resident anyway, and is touched once a span: it takes neither registers nor memory of
// the plan.
struct Totals {
    double best[ROWS], sum[ROWS], acc[ROWS][4][COLUMN_TILES];

    // Who gives its address away keeps it in memory.
    __device__ __forceinline__ Totals() { asm volatile("" ::"l"(this) : "memory"); }
};

// total = old * total + x, of which `x` keeps what is rounded off (Knuth's two-sum); beside an infinity that is nothing.
__device__ __forceinline__ void move_to(double& total, double old, double& x) {
    double before = old * total, sum = before + x, back = sum - before;
    double rest = (before - (sum - back)) + (x - back);
    total = sum, x = high_word(sum) == high_word(sum) ? rest : 0;
}

// By what the totals of row `i` are to be multiplied, for the base that it has now.
__device__ __forceinline__ double factor_of_totals(
    const Rows& rows, const Totals& totals, int i, double c, const double* powers) {
    double before = totals.best[i];
    return before == rows.best[i] ? 1 : factor_of(before - rows.best[i], c, powers);
}
// The factor of the row to which acc[..][i][at] belongs; lanes that have sums know it.
__device__ __forceinline__ double of_column(double factor, int at) {
    return __shfl_sync(~0u, factor, threadIdx.x % 4 * 8 + at % 2 * 4);
}

// A span ends, after which others follow: sums join those before.
__device__ __forceinline__ void close_span(Rows& rows, Totals& totals, bool first, double c, const double* powers) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        double old = first ? 0 : factor_of_totals(rows, totals, i, c, powers), sum = first ? 0 : totals.sum[i];
        move_to(sum, old, rows.sum[i]);
        totals.best[i] = rows.best[i], totals.sum[i] = sum;
#pragma unroll
        for (int at = 0; at < 4; ++at) {
            double its_old = of_column(old, at), total[COLUMN_TILES] = {};
            // Several are read at once, for a wait for each would take longer; all of them would not fit the registers.
            asm volatile("" ::: "memory");
            if (!first)
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; ++n) total[n] = totals.acc[i][at][n];
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; ++n)
                move_to(total[n], its_old, rows.acc[n][i][at]), totals.acc[i][at][n] = total[n];
        }
    }
}

// The rows have all spans, of which the last is not closed.
__device__ __forceinline__ void join_totals(Rows& rows, const Totals& totals, double c, const double* powers) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        double old = factor_of_totals(rows, totals, i, c, powers);
        rows.sum[i] = fma(old, totals.sum[i], rows.sum[i]);
#pragma unroll
        for (int at = 0; at < 4; ++at) {
            double its_old = of_column(old, at);
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; ++n)
                rows.acc[n][i][at] = fma(its_old, totals.acc[i][at][n], rows.acc[n][i][at]);
        }
    }
}

// Merge the rows into the state, or finish them.
__device__ __forceinline__ void end_block(Rows& rows, const Call& call, const Place& block) {
    int group = made_here(threadIdx.x % 32 / 4), quad_lane = made_here(threadIdx.x % 4);
    int first_column = part() * COLUMNS + 2 * group;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        double natural = call.scale * rows.best[i] + SMALL * LN2, sum = rows.sum[i];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            int source = quad_lane * 8 + e * 4;  // a lane that has the sum of the row whose columns are here
            double base = __shfl_sync(~0u, natural, source), total = __shfl_sync(~0u, sum, source);
            int64 row = block.row + made_here(first_row()) + 8 * i + 2 * quad_lane + e;
            bool exists = row < call.query_tokens, writer = exists && group == 0 && part() == 0;
            RowEnd end = end_of_row<double>(call, block, row, base, total, exists, writer);
            if (!exists) continue;
            end_elements<double, 2 * COLUMN_TILES>(
                call, block, row, end, [&](int n) { return first_column + n / 2 * 16 + n % 2; },
                [&](int n) -> double& { return rows.acc[n / 2][i][n % 2 * 2 + e]; });
        }
    }
}

// Ask for the current tile of `walk`.
__device__ __forceinline__ void fetch(
    const Call& call, const Place& block, const Walk<BLOCK_KEYS>& walk, double* keys, double* values) {
    const Piece& piece = call.pieces[walk.piece];
    const double* key = static_cast<const double*>(piece.keys) + element_of(call.key_strides, block, walk.offset);
    const double* value = static_cast<const double*>(piece.values) + element_of(call.value_strides, block, walk.offset);
    int count = walk.count(call);
    if (call.aligned) {
        copy_tile<2, BLOCK_KEYS, HEAD_DIM, KEY_PITCH, THREADS>(
            keys, key, call.key_strides.token, count, call.head_dim);
        copy_tile<2, BLOCK_KEYS, VALUE_DIM, VALUE_PITCH, THREADS>(
            values, value, call.value_strides.token, count, call.value_dim);
    } else {
        copy_tile<1, BLOCK_KEYS, HEAD_DIM, KEY_PITCH, THREADS>(
            keys, key, call.key_strides.token, count, call.head_dim);
        copy_tile<1, BLOCK_KEYS, VALUE_DIM, VALUE_PITCH, THREADS>(
            values, value, call.value_strides.token, count, call.value_dim);
    }
    copies_issued();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend(const __grid_constant__ Call call) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Place block = place_of<BLOCK_ROWS>(call);
    const BlockView& view = view_of_rows<THREADS>(call, block.row, BLOCK_ROWS);
    Walk<BLOCK_KEYS> walk(call, view);
    if (walk.more(call)) fetch(call, block, walk, shared.keys[0], shared.values[0]);
    if (threadIdx.x == 0) shared.tiles[0] = walk;
    if (threadIdx.x < 16) shared.powers[threadIdx.x] = POWERS[threadIdx.x];
    Kept kept;
    load_queries(kept, shared.queries, call, block);
    copies_arrived();
    __syncthreads();

    int group = threadIdx.x % 32 / 4, quad_lane = threadIdx.x % 4;
    const Pair* queries = shared.queries + (first_row() / 2 + group) * QUERY_PITCH + 2 * quad_lane;
    int key_at = group * KEY_PITCH + 2 * quad_lane;
    int value_at = 2 * quad_lane * VALUE_PITCH + part() * COLUMNS + 2 * group;
    const double c = call.scale * (16 * LOG2E);
    Totals totals;
    Rows rows;
    rows.clear();
    bool first = true, last = !walk.more(call);  // span
    int span_keys = 0;
    for (int stage = 0; !last; stage ^= 1) {
        Walk<BLOCK_KEYS> tile = shared.tiles[stage], next = tile;
        next.step(call, view);
        last = !next.more(call), span_keys += BLOCK_KEYS;
        if (!last) fetch(call, block, next, shared.keys[stage ^ 1], shared.values[stage ^ 1]);
        if (threadIdx.x == 0) shared.tiles[stage ^ 1] = next;
        bool full = tile.full(call, view);
        if (!full && irregular(shared.values[stage])) {
            copies_arrived();
            return simple_rows<ELEMENT, double, BLOCK_ROWS, BLOCK_KEYS, THREADS>(call, block, view);
        }
#pragma unroll 1
        for (int begin = 0; begin < BLOCK_KEYS; begin += STEP_KEYS) {
            Scores scores;
            score_tile(scores, kept, queries, shared.keys[stage] + key_at + begin * KEY_PITCH);
            if (!full) {
                tile = shared.tiles[stage];
                hide(scores, call, block.row, tile.token(call) + begin, tile.count(call) - begin);
            }
            soften(scores, rows, c, shared.powers);
            add_values(rows, scores, shared.values[stage] + value_at + begin * VALUE_PITCH);
        }
        if (!last && span_keys >= call.span_keys)
            close_span(rows, totals, first, c, shared.powers), first = false, span_keys = 0;
        copies_arrived();
        __syncthreads();
    }
    if (!first) join_totals(rows, totals, c, shared.powers);
    // Two warps of the same rows read m and l; the first writes them, and comes last.
    for (int turn = PARTS - 1; turn >= 0; --turn) {
        if (part() == turn) end_block(rows, call, block);
        if (turn > 0) __syncthreads();
    }
}
