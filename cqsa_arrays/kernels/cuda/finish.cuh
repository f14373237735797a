// The end of a span for kernels that keep rows in fragments: a warp stages 16 rows in shared memory, then one lane ends
// one row and all lanes take its columns. It is a function of its own, small and called once in thousands of tiles.
#pragma once
#include "state.cuh"

// Rows first .. first + 15 of the block's head, row r at staged + r * pitch; lanes r and r + 16 hold base and sum of row r.
template <typename REAL>
__device__ __noinline__ void end_rows(
    const Call& call, Place block, int64 first, const REAL* staged, int pitch, double base, REAL sum, SpanEnds ends) {
    int lane = threadIdx.x % 32;
    __syncwarp();  // the rows are staged
    int64 mine = first + lane % 16;
    bool exists = mine < call.query_tokens;
    RowEnd<REAL> row_end = end_of_span<REAL>(call, block, mine, base, sum, ends, exists, exists && lane < 16);
    for (int r = 0; r < 16 && first + r < call.query_tokens; ++r) {
        RowEnd<REAL> end = {
            __shfl_sync(~0u, row_end.old, r), __shfl_sync(~0u, row_end.fresh, r), bool(__shfl_sync(~0u, row_end.has_old, r)),
            bool(__shfl_sync(~0u, row_end.has_fresh, r)), bool(__shfl_sync(~0u, row_end.skip, r))};
        for (int column = lane; column < call.value_dim; column += 32)
            end_element<REAL>(call, block, first + r, column, end, ends.last, staged[r * pitch + column]);
    }
    __syncwarp();  // the place may be taken again
}
