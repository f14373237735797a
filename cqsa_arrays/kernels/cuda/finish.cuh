// The end of rows for kernels that keep them in fragments: a warp stages 16 rows in shared memory, then one lane ends one
// row and all lanes take its columns. It is a function of its own, small and called once a launch.
#pragma once
#include "state.cuh"

// Rows first .. first + 15 of the block's head, row r at staged + r * pitch; lanes r and r + 16 hold base and sum of row r.
// The reads of 8 rows are under way at once: with one wait for each row and 32 columns the ends took a tenth to a quarter
// of the time.
__device__ __noinline__ void end_rows(
    const Call& call, Place block, int64 first, const float* staged, int pitch, double base, double sum) {
    int lane = threadIdx.x % 32, exist = int(least(call.query_tokens - first, 16));
    __syncwarp();  // the rows are staged
    bool exists = lane % 16 < exist;
    RowEnd mine = end_of_row<float>(call, block, first + lane % 16, base, sum, exists, exists && lane < 16);
    uint32 read = __ballot_sync(~0u, exists && mine.has_old && !mine.skip), write = __ballot_sync(~0u, exists && !mine.skip);
    int64 step = call.acc_strides.token, out_step = call.out_strides.token;
    for (int begin = 0; begin < call.value_dim; begin += 32) {
        int column = begin + lane;
        bool wanted = column < call.value_dim;
        float* acc = static_cast<float*>(call.acc) + element_of(call.acc_strides, block, first) + column;
        int64 out = element_of(call.out_strides, block, first) + column;
#pragma unroll 1
        for (int from = 0; from < 16; from += 8) {
            float before[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) before[i] = wanted && read >> (from + i) & 1 ? acc[(from + i) * step] : 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                int r = from + i;
                RowEnd end = {__shfl_sync(~0u, mine.old, r), __shfl_sync(~0u, mine.fresh, r), bool(read >> r & 1),
                              bool(__shfl_sync(~0u, mine.has_fresh, r)), false};
                if (!wanted || !(write >> r & 1)) continue;
                float value = merged<float, float>(end, staged[r * pitch + column], before[i]);
                if (call.out) {
                    store_element(call.out, call.out_kind, out + r * out_step, value);
                } else {
                    acc[r * step] = value;
                }
            }
        }
    }
    __syncwarp();  // the place may be taken again
}
