// Copies of rows from global to shared memory, 16 bytes at a time and asynchronous where the caller's arrays allow it.
#pragma once
#include "element.cuh"

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
    return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, or zeros where `wanted` is false; L2 only, for tiles are read once by each block.
__device__ __forceinline__ void copy_word(uint32 to, const void* from, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted ? 16 : 0));
}
__device__ __forceinline__ void copies_issued() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copies_arrived() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// ROWS rows of `columns` ELEMENTs, the first at `from`, `stride` elements apart, to rows of WIDTH elements PITCH elements
// apart in shared memory. Rows from `count` on and columns from `columns` on become zero. By THREADS threads.
template <typename ELEMENT_TYPE, int ROWS, int WIDTH, int PITCH, int THREADS>
__device__ __forceinline__ void copy_rows(
    ELEMENT_TYPE* to, const ELEMENT_TYPE* from, int64 stride, int count, int columns, bool aligned) {
    constexpr int WORD = 16 / sizeof(ELEMENT_TYPE), WORDS = WIDTH / WORD;
    if (aligned) {
        static_assert(PITCH % WORD == 0, "rows begin with a word");
        constexpr int PASSES = (ROWS * WORDS + THREADS - 1) / THREADS;
#pragma unroll
        for (int i = 0; i < PASSES; ++i) {
            int word = threadIdx.x + i * THREADS, row = word / WORDS, column = word % WORDS * WORD;
            if (ROWS * WORDS % THREADS != 0 && word >= ROWS * WORDS) break;
            bool wanted = row < count && column < columns;
            copy_word(shared_address(to + row * PITCH + column), wanted ? from + row * stride + column : from, wanted);
        }
    } else {
#pragma unroll 1  // unrolled, it would take registers from the loop around it
        for (int i = threadIdx.x; i < ROWS * WIDTH; i += THREADS) {
            int row = i / WIDTH, column = i % WIDTH;
            to[row * PITCH + column] = row < count && column < columns ? from[row * stride + column] : ELEMENT_TYPE(0);
        }
    }
}
