// attend, float16 and bfloat16 on the warpgroup products of compute capability 9.0: wgmma, float32 accumulation.
//
// A block has GROUPS groups of four warps that compute, each with 64 rows for good, and one that copies tiles of BLOCK_KEYS
// keys and their values into a ring of STAGES places. Barriers in shared memory say which places are full and empty.
//
//   copying     K0 V0 K1 V1 K2 V2 ...                      as places become empty
//   group g     S0 | softmax 0 | S1 V0 | softmax 1 | ...   V0 runs beside softmax 1; groups issue products in turns
//
// Scores S = Q K^T and outputs O += P V are products of 64 rows whose weights P stay in registers. Vectors have to be whole
// 16-byte words; half.cu takes others. Registers of the group that copies go to those that compute (setmaxnreg),
// which the compiler does only where these call no function: all is inlined.
//
// Shared memory: queries and the ring, in atoms of 64 columns (wgmma.cuh), and the barriers:
//   SHARED_BYTES = 2 * (BLOCK_ROWS H + STAGES BLOCK_KEYS (H + V)) + 48 STAGES + 16,  H and V rounded up to multiples of 64
//
// Sources: Shah et al., "FlashAttention-3", arXiv 2407.08608 (groups that copy and compute, turns, products beside the
// softmax); PTX ISA on wgmma, mbarrier and setmaxnreg.
// Defines: ELEMENT (FLOAT16 or BFLOAT16), HEAD_DIM, VALUE_DIM, BLOCK_ROWS, BLOCK_KEYS, WARPS, STAGES, SHARED_BYTES.
#include "hopper.cuh"

// Of a thread, together those of a multiprocessor.
constexpr int COPYING_REGISTERS = GROUPS == 3 ? 32 : 40, COMPUTING_REGISTERS = GROUPS == 3 ? 160 : 232;
constexpr uint32 KEY_TILE = sizeof(Shared::keys) / STAGES, VALUE_TILE = sizeof(Shared::values) / STAGES;

__device__ __forceinline__ void issue_scores(Scores& scores, uint32 queries, uint32 keys) {
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k) {
        uint32 inside = k % 4 * 32, atom = k / 4 * 128;
        Product<BLOCK_KEYS>::of_shared(
            scores.at[0][0], matrix_at(queries + atom * BLOCK_ROWS + inside, 0),
            matrix_at(keys + atom * BLOCK_KEYS + inside, 0), k > 0);
    }
    products_issued();
}

__device__ __forceinline__ void issue_values(Rows& rows, const Weights& weights, uint32 values) {
#pragma unroll
    for (int k = 0; k < BLOCK_KEYS / 16; ++k)
        Product<VALUE_DIM>::add_of_registers(
            rows.acc[0][0], weights.at[k][0], matrix_at(values + k * 16 * 128, BLOCK_KEYS * 128));
    products_issued();
}

// Group g issues products after group g - 1 and before group g + 1: barrier 2 + g is passed by those two.
__device__ __forceinline__ void take_turn(int group) { asm volatile("bar.sync %0, 256;" ::"r"(group + 2) : "memory"); }
__device__ __forceinline__ void pass_turn(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"((group + 1) % GROUPS + 2) : "memory");
}

// Read by the lane that leaves the place, for all of its warp.
__device__ __forceinline__ Tile tile_at(const Shared& shared, Ring at) {
    Tile tile = {};
    if (threadIdx.x % 32 == 0) {
        const Tile& here = shared.tiles[at.stage];
        tile.piece = here.piece, tile.offset = here.offset, tile.flags = here.flags;
    }
    return {__shfl_sync(~0u, tile.piece, 0), __shfl_sync(~0u, tile.offset, 0), __shfl_sync(~0u, tile.flags, 0), 0};
}

// Until the values of a tile are there; by the same lane is kept whether some rows must not meet them.
__device__ __forceinline__ void await_values(const Shared& shared, Ring at, int& irregular) {
    barrier_wait(barrier_of(shared.value_full, at), at.parity);
    if (threadIdx.x % 32 == 0) irregular |= shared.tiles[at.stage].irregular;
}

// Hide the scores of a tile that some rows do not see.
__device__ __forceinline__ void hide_unseen(Scores& scores, const Call& call, const Shared& shared, Ring at) {
    const Tile tile = tile_at(shared, at);
    const Piece& piece = call.pieces[tile.piece];
    hide(scores, call, shared.block.row, piece.start + tile.offset, int(least(piece.tokens - tile.offset, BLOCK_KEYS)));
}

// A warp leaves a place of the ring, which none of its lanes reads any more.
__device__ __forceinline__ void leave(const unsigned long long (&empty)[STAGES], Ring at) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier_of(empty, at));
}

// The tiles of one span, the first of which is here; the ring stands behind the last one then. Whether no keys come after
// it. `irregular`, of one lane of a warp: a weight of 0 does not keep a value of these tiles from a row.
__device__ __forceinline__ bool attend_span(
    Rows& rows, const Call& call, const Shared& shared, Ring& ring, int group, float c, int& irregular) {
    const uint32 queries = shared_address(shared.queries[0][group * 64]);
    const uint32 keys = shared_address(shared.keys), values = shared_address(shared.values);
    Scores scores;
    Weights weights;
    take_turn(group);
    products_begin();
    issue_scores(scores, queries, keys + ring.stage * KEY_TILE);
    pass_turn(group);
    products_done<0>();
    int flags = tile_at(shared, ring).flags;
    if (flags & PARTIAL) hide_unseen(scores, call, shared, ring);
    leave(shared.key_empty, ring);
    soften(scores, rows, c, [](const float(&)[ROWS]) {});  // nothing is accumulated yet
    pack(weights, scores);
    while (!(flags & ENDS_SPAN)) {
        const Ring next = ring.next();
        barrier_wait(barrier_of(shared.key_full, next), next.parity);
        flags = tile_at(shared, next).flags;
        take_turn(group);
        products_begin();
        issue_scores(scores, queries, keys + next.stage * KEY_TILE);
        await_values(shared, ring, irregular);
        issue_values(rows, weights, values + ring.stage * VALUE_TILE);
        pass_turn(group);
        products_done<1>();
        if (flags & PARTIAL) hide_unseen(scores, call, shared, next);
        leave(shared.key_empty, next);
        bool grew = false;
        float alpha[ROWS];
        soften(scores, rows, c, [&](const float(&by)[ROWS]) {
            grew = true;
            for (int i = 0; i < ROWS; ++i) alpha[i] = by[i];
        });
        products_done<0>();
        if (__builtin_expect(grew, 0)) rescale(rows, alpha);
        leave(shared.value_empty, ring);
        pack(weights, scores);
        ring = next;
    }
    await_values(shared, ring, irregular);
    take_turn(group);
    products_begin();
    issue_values(rows, weights, values + ring.stage * VALUE_TILE);
    pass_turn(group);
    products_done<0>();
    leave(shared.value_empty, ring);
    ring = ring.next();
    return flags & LAST;
}

// Merge the rows into the state, or finish them: every quad of lanes its two rows, 32 bytes of float32 at once.
__device__ __forceinline__ void end_block(Rows& rows, const Call& call, const Place& block) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        int64 row = block.row + row_of(threadIdx.x, i);
        bool exists = row < call.query_tokens;
        RowEnd end = end_of_row<float>(
            call, block, row, natural_base(rows.base[i]), rows.sum[i], exists, exists && lane % 4 == 0);
        if (!exists) continue;
        end_elements<float, 2 * VALUE_TILES>(
            call, block, row, end, [&](int n) { return n / 2 * 8 + lane % 4 * 2 + n % 2; },
            [&](int n) -> float& { return rows.acc[0][n / 2][i % 2 * 2 + n % 2]; });
    }
}

// The rows of the computing groups, span by span.
__device__ __forceinline__ void attend_rows(const Call& call, const BlockView& view, Shared& shared) {
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    const float c = float(call.scale * LOG2E);
    Ring ring = {0, 0};
    int irregular = 0;
    Totals totals;
    Rows rows;
    rows.clear();
    if (group == GROUPS - 1) pass_turn(group);
    for (bool first = true, last = false; !last; first = false) {
        barrier_wait(barrier_of(shared.key_full, ring), ring.parity);
        last = attend_span(rows, call, shared, ring, group, c, irregular);
        close_span(rows, totals, first, last);
    }
    if (group == 0) take_turn(group);  // the last group's
    if (__shfl_sync(~0u, irregular, 0))
        return simple_rows_here<ELEMENT, float, BLOCK_ROWS, BLOCK_KEYS, COMPUTING>(call, shared.block, view);
    end_block(rows, call, shared.block);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend(const __grid_constant__ Call call) {
    extern __shared__ __align__(1024) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Place block = place_of<BLOCK_ROWS>(call);
    const BlockView& view = view_of_rows<THREADS>(call, block.row, BLOCK_ROWS);
    const bool computing = threadIdx.x < COMPUTING;
    if (!Walk<BLOCK_KEYS>(call, view).more(call)) {
        if (!computing) return;
        Rows rows;
        rows.clear();
        return end_block(rows, call, block);
    }
    if (threadIdx.x == 0) shared.block = block, begin_barriers(shared);
    if (threadIdx.x < 128) {
        auto query = static_cast<const uint16*>(call.queries) + element_of(call.query_strides, block, block.row);
        copy_atoms<KEY_ATOMS, BLOCK_ROWS>(
            shared_address(shared.queries), query, call.query_strides.token,
            int(least(call.query_tokens - block.row, BLOCK_ROWS)), call.head_dim);
        copies_issued();
        copies_arrived();
        show_to_products();
    }
    __syncthreads();
    if (!computing) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPYING_REGISTERS));
        return copy_tiles(call, view, shared);
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COMPUTING_REGISTERS));
    attend_rows(call, view, shared);
}
