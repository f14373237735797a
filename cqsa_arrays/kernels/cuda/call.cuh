// What one launch computes: the contract of every CUDA kernel of this folder.
//
// For each of batch x heads and each of `query_tokens` rows, the softmax statistics over the keys of `pieces` that the
// row sees, merged into the row's state or finished:
//
//   score  s_j = scale * q . k_j                    for keys  low(row) <= j < high(row)
//   state  l = sum exp(s_j - m),  acc = sum exp(s_j - m) v_j,  m such that l is near 1   natural logarithm, acc row-major
//   output acc / l,  lse = m + log(l)               a row that saw no key: output 0, lse -inf
//
//           pieces[0]        pieces[1]       keys, piece by piece, in tiles of BLOCK_KEYS
//   rows  +---+---+---+    +---+---+--
//   of a  |   |   |   |    |   |   |         a block of BLOCK_ROWS rows walks the tiles from left to right;
//   block +---+---+---+    +---+---+--       tiles that none of its rows sees are skipped,
//                                            rows are tested only in tiles that some row sees in part
//
// Every `span_keys` keys are accumulated from zero (in double.cu from what rounding has left of the spans before); the spans
// of a launch are added up from zero, and merged into the state once, so that the error does not grow with the number of
// keys (Blanchard, Higham and Mary, "A class of fast and accurate summation algorithms", 2020). Rows are independent,
// nothing is added atomically: the same call gives the same bits.
//
// This file needs no header of the toolkit: NVRTC compiles it as it is.
#pragma once

typedef long long int64;
typedef unsigned int uint32;

constexpr int MAX_PIECES = 64;
constexpr double LN2 = 0.693147180559945309417, LOG2E = 1.44269504088896340736;

// `tokens` keys and values (fewer than 2^30), the first being token `start`; addresses of batch 0, head 0.
struct Piece {
    const void *keys, *values;
    int64 start, tokens;
};

// Steps in elements from one batch entry, head and token to the next; vectors are contiguous.
struct Strides {
    int64 batch, head, token;
};

enum ElementKind { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 };

struct Call {
    Piece pieces[MAX_PIECES];
    const void *queries;
    void *acc, *m, *l;                 // the state; null where no state goes in or out
    void *out, *lse;                   // null unless the rows are finished by this call; lse may be null
    const int64 *row_low, *row_high;   // (query_tokens): the keys that each row sees; null: the diagonals below
    Strides query_strides, key_strides, value_strides, acc_strides, out_strides;
    Strides stat_strides, lse_strides; // of m and l, and of lse
    int64 query_start, query_tokens;   // the first row is token `query_start`; fewer than 2^31 rows
    int64 low_diagonal, high_diagonal; // row r sees  r + low_diagonal <= j <= r + high_diagonal
    int64 span_keys;                   // a multiple of every BLOCK_KEYS, below 2^30
    double scale;
    int piece_count, batches, heads, head_dim, value_dim;
    int fresh;                         // 1: no row has seen a key; the state is not read
    int out_kind;                      // ElementKind of out
    int aligned;                       // 1: every query, key and value vector is whole 16-byte words on their borders
};

// The keys  low <= j < high.
struct Interval {
    int64 low, high;
};

__device__ __forceinline__ Interval visible_keys(const Call& call, int64 row) {
    if (call.row_low) return {call.row_low[row], call.row_high[row]};
    int64 token = call.query_start + row;
    return {token + call.low_diagonal, token + call.high_diagonal + 1};
}

// What the rows of a block see: every row sees [inner.low, inner.high), no row sees a key outside [outer.low, outer.high).
struct BlockView {
    Interval inner, outer;
};

__device__ __forceinline__ int64 least(int64 a, int64 b) { return a < b ? a : b; }
__device__ __forceinline__ int64 most(int64 a, int64 b) { return a > b ? a : b; }

__device__ __forceinline__ BlockView joined(const BlockView& a, const BlockView& b) {
    return {{most(a.inner.low, b.inner.low), least(a.inner.high, b.inner.high)},
            {least(a.outer.low, b.outer.low), most(a.outer.high, b.outer.high)}};
}

// The view of the rows first .. first + rows - 1 that exist, in shared memory. All THREADS threads take part; a barrier.
template <int THREADS>
__device__ const BlockView& view_of_rows(const Call& call, int64 first, int rows) {
    __shared__ BlockView views[THREADS / 32];
    constexpr int64 FAR = 1ll << 62;
    BlockView view = {{-FAR, FAR}, {FAR, -FAR}};
    for (int64 row = first + threadIdx.x; row < least(first + rows, call.query_tokens); row += THREADS) {
        Interval seen = visible_keys(call, row);
        view = joined(view, {seen, seen});
    }
    for (int offset = 16; offset; offset >>= 1) {
        BlockView other = {{__shfl_xor_sync(~0u, view.inner.low, offset), __shfl_xor_sync(~0u, view.inner.high, offset)},
                           {__shfl_xor_sync(~0u, view.outer.low, offset), __shfl_xor_sync(~0u, view.outer.high, offset)}};
        view = joined(view, other);
    }
    if (threadIdx.x % 32 == 0) views[threadIdx.x / 32] = view;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < THREADS / 32; ++warp) views[0] = joined(views[0], views[warp]);
    __syncthreads();
    return views[0];
}

// The tiles of TILE keys that a block of rows sees, in order. Tiles begin at multiples of TILE from their piece's start.
template <int TILE>
struct Walk {
    int piece, offset, end;  // of the current tile and of what is seen, in tokens of the piece

    __device__ void enter(const Call& call, const BlockView& view) {
        for (; piece < call.piece_count; ++piece) {
            const Piece& p = call.pieces[piece];
            offset = int(least(most(view.outer.low - p.start, 0), p.tokens)) / TILE * TILE;
            end = int(most(least(view.outer.high - p.start, p.tokens), 0));
            if (offset < end) return;
        }
    }
    __device__ Walk(const Call& call, const BlockView& view) : piece(0), offset(0), end(0) { enter(call, view); }
    // The walk as it was when its tile began at `begin` of piece `in`.
    __device__ static Walk back_at(const Call& call, const BlockView& view, int in, int begin) {
        Walk walk(call, view);
        walk.piece = in, walk.enter(call, view), walk.offset = begin;
        return walk;
    }
    __device__ bool more(const Call& call) const { return piece < call.piece_count; }
    __device__ void step(const Call& call, const BlockView& view) {
        offset += TILE;
        if (offset >= end) ++piece, enter(call, view);
    }
    // Keys of the current tile that exist in the piece.
    __device__ int count(const Call& call) const { return min(int(call.pieces[piece].tokens) - offset, TILE); }
    // The token of the tile's first key.
    __device__ int64 token(const Call& call) const { return call.pieces[piece].start + offset; }
    // Whether every row sees every key of the tile, and all of its keys exist.
    __device__ bool full(const Call& call, const BlockView& view) const {
        int64 first = token(call);
        return first >= view.inner.low && first + TILE <= view.inner.high && count(call) == TILE;
    }
};

// Which block of rows of which head this thread block has: last rows first, for under a causal mask they see most keys.
struct Place {
    int batch, head;
    int64 row;
};

template <int ROWS>
__device__ __forceinline__ Place place_of(const Call& call) {
    int64 pairs = int64(call.batches) * call.heads, blocks = (call.query_tokens + ROWS - 1) / ROWS;
    int64 pair = blockIdx.x % pairs;
    return {int(pair / call.heads), int(pair % call.heads), (blocks - 1 - blockIdx.x / pairs) * ROWS};
}

__device__ __forceinline__ int64 element_of(const Strides& strides, const Place& place, int64 row) {
    return place.batch * strides.batch + place.head * strides.head + row * strides.token;
}
