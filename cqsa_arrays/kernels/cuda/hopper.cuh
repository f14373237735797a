// Shared memory of the kernel for compute capability 9.0, and the group of warps that fills it. Defines as in hopper.cu.
#pragma once
constexpr int THREADS = 32 * WARPS, GROUPS = WARPS / 4 - 1, COMPUTING = 128 * GROUPS, ROW_TILES = 1;

#include "simple.cuh"
#include "softmax.cuh"
#include "wgmma.cuh"

constexpr int COPYING = 128;  // threads
constexpr int KEY_ATOMS = (HEAD_DIM + ATOM - 1) / ATOM, VALUE_ATOMS = (VALUE_DIM + ATOM - 1) / ATOM;
static_assert(BLOCK_ROWS == 64 * GROUPS && THREADS == COMPUTING + COPYING, "64 rows a group");

enum TileFlags { PARTIAL = 1, ENDS_SPAN = 2, LAST = 4 };

// The keys of a stage: tokens `offset` .. of a piece. `irregular`, written with the values: an infinity or NaN is among
// those that some rows do not see.
struct Tile {
    int piece, offset, flags, irregular;
};

struct Shared {
    uint16 queries[KEY_ATOMS][BLOCK_ROWS][ATOM];
    uint16 keys[STAGES][KEY_ATOMS][BLOCK_KEYS][ATOM];
    uint16 values[STAGES][VALUE_ATOMS][BLOCK_KEYS][ATOM];
    Tile tiles[STAGES];
    Place block;  // here, for registers are short and it is looked at once in many tiles
    unsigned long long key_full[STAGES], key_empty[STAGES], value_full[STAGES], value_empty[STAGES];  // barriers
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host computes the same size");

// Stage by stage, round and round; waiting for a barrier's first phase with parity 1 does not wait.
struct Ring {
    uint32 stage, parity;

    __device__ __forceinline__ Ring next() const {
        return stage + 1 == STAGES ? Ring{0, parity ^ 1} : Ring{stage + 1, parity};
    }
};

__device__ __forceinline__ uint32 barrier_of(const unsigned long long (&barriers)[STAGES], Ring at) {
    return shared_address(barriers) + 8 * at.stage;
}

__device__ __forceinline__ void begin_barriers(Shared& shared) {
    for (uint32 s = 0; s < STAGES; ++s) {
        barrier_init(barrier_of(shared.key_full, {s, 0}), COPYING), barrier_init(barrier_of(shared.value_full, {s, 0}), COPYING);
        barrier_init(barrier_of(shared.key_empty, {s, 0}), 4 * GROUPS);
        barrier_init(barrier_of(shared.value_empty, {s, 0}), 4 * GROUPS);
        shared.tiles[s].irregular = 0;  // and once it is 1, the whole block is computed again
    }
}

// The 16-byte words of an atom that a thread of a copying group copies: `word` of the rows `row`, `row` + PASS ...
struct Words {
    static constexpr int PASS = 128 / 8;
    int row = threadIdx.x % 128 / 8, word = threadIdx.x % 8;
};

// TOKENS rows of `columns` elements to ATOMS atoms, by 128 threads; rows from `count` on and columns from `columns` on
// become zero.
template <int ATOMS, int TOKENS>
__device__ __forceinline__ void copy_atoms(uint32 to, const uint16* from, int64 stride, int count, int columns) {
    constexpr int PASS = Words::PASS;
    static_assert(TOKENS % PASS == 0 && PASS % 8 == 0, "whole passes, whole turns of the swizzle");
    auto [row, word] = Words();
#pragma unroll
    for (int atom = 0; atom < ATOMS; ++atom) {
        bool wanted = atom * ATOM + word * 8 < columns;
        const uint16* source = from + row * stride + atom * ATOM + word * 8;
#pragma unroll 8
        for (int pass = 0; pass < TOKENS / PASS; ++pass, source += PASS * stride) {
            bool there = wanted && row + pass * PASS < count;
            copy_word(to + atom * TOKENS * 128 + swizzled(row + pass * PASS, word), there ? source : from, there);
        }
    }
}

// Whether an infinity or NaN is among what this thread copied.
template <int ATOMS, int TOKENS>
__device__ __forceinline__ bool copied_irregular(const uint16 (&atoms)[ATOMS][TOKENS][ATOM]) {
    auto [row, word] = Words();
    bool found = false;
#pragma unroll 1
    for (int atom = 0; atom < ATOMS; ++atom)
#pragma unroll 1
        for (int at = row; at < TOKENS; at += Words::PASS) {
            auto pairs = *reinterpret_cast<const uint4*>(&atoms[atom][at][8 * (word ^ at % 8)]);
            found |= irregular_pair(pairs.x) || irregular_pair(pairs.y) || irregular_pair(pairs.z) || irregular_pair(pairs.w);
        }
    return found;
}

// What the copying threads have under way: `full` is the barrier that says when it has arrived, 0 if nothing is.
// `unseen` is the stage if these are values that some rows do not see, whose weights of 0 keep no infinity from them.
struct Copies {
    Shared& shared;
    uint32 full = 0;
    int unseen = -1;

    __device__ __forceinline__ void arrived() {
        if (unseen >= 0 && copied_irregular(shared.values[unseen])) shared.tiles[unseen].irregular = 1;
        show_to_products();
        barrier_arrive(full);
        full = 0;
    }
    // The next copies are issued; those before them arrive first.
    __device__ __forceinline__ void issued(uint32 barrier, int unseen_stage) {
        copies_issued();
        if (full) {
            asm volatile("cp.async.wait_group 1;" ::: "memory");
            arrived();
        }
        full = barrier, unseen = unseen_stage;
    }
    __device__ __forceinline__ void finish() {
        copies_arrived();
        if (full) arrived();
    }
    // Until a place is empty; who waits for what is under way is told of it before.
    __device__ __forceinline__ void wait(uint32 empty, uint32 parity) {
        if (barrier_passed(empty, parity)) return;
        finish();
        barrier_wait(empty, parity);
    }
};

// All tiles that the block sees, in order, through the ring.
__device__ __forceinline__ void copy_tiles(const Call& call, const BlockView& view, Shared& shared) {
    const Place block = shared.block;
    Walk<BLOCK_KEYS> walk(call, view);
    Copies copies = {shared};
    int span_keys = 0;
    for (Ring ring = {0, 1}; walk.more(call); ring = ring.next()) {
        const Piece& piece = call.pieces[walk.piece];
        Tile tile = {walk.piece, walk.offset, walk.full(call, view) ? 0 : PARTIAL, 0};
        int count = walk.count(call);
        walk.step(call, view), span_keys += BLOCK_KEYS;
        if (!walk.more(call)) tile.flags |= LAST | ENDS_SPAN;
        if (span_keys >= call.span_keys) tile.flags |= ENDS_SPAN, span_keys = 0;
        copies.wait(barrier_of(shared.key_empty, ring), ring.parity);
        if (threadIdx.x % 128 == 0) {
            Tile& place = shared.tiles[ring.stage];
            place.piece = tile.piece, place.offset = tile.offset, place.flags = tile.flags;
        }
        auto keys = static_cast<const uint16*>(piece.keys) + element_of(call.key_strides, block, tile.offset);
        copy_atoms<KEY_ATOMS, BLOCK_KEYS>(
            shared_address(shared.keys[ring.stage]), keys, call.key_strides.token, count, call.head_dim);
        copies.issued(barrier_of(shared.key_full, ring), -1);
        copies.wait(barrier_of(shared.value_empty, ring), ring.parity);
        auto values = static_cast<const uint16*>(piece.values) + element_of(call.value_strides, block, tile.offset);
        copy_atoms<VALUE_ATOMS, BLOCK_KEYS>(
            shared_address(shared.values[ring.stage]), values, call.value_strides.token, count, call.value_dim);
        copies.issued(barrier_of(shared.value_full, ring), tile.flags & PARTIAL ? int(ring.stage) : -1);
    }
    copies.finish();
}
