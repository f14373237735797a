// attend_simple: any element type, head dimension, mask and scale. Compiled with -DELEMENT=<ElementKind> -DARITHMETIC=float or double.
// Grid: blocks of BLOCK_ROWS rows x heads x batches; block: THREADS threads; no dynamic shared memory.
#include "simple.cuh"

constexpr int BLOCK_ROWS = 8, BLOCK_KEYS = 32, THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) attend(const __grid_constant__ Call call) {
    Place block = place_of<BLOCK_ROWS>(call);
    const BlockView& view = view_of_rows<THREADS>(call, block.row, BLOCK_ROWS);
    simple_rows<ELEMENT, ARITHMETIC, BLOCK_ROWS, BLOCK_KEYS, THREADS>(call, block, view);
}
