"""Offsets past 2^31 bytes and 2^32 elements, token numbers past 2^32.

The arrays lie in a sparse file of 32 GiB of which a few hundred pages are touched. The strides between tokens are what
makes the offsets large, so an offset that was cut to 32 bits would read or write another, empty page.
"""

import numpy as np
import pytest
from kernel_cases import FULL, GuardedState, PoisonedKernel, blocks_of, check_exact, exact, normal, nothing, run_fast

from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.kernels.base import KeyBlock

SPACE_BYTES = 32 << 30
ROWS, TOKENS, WIDTH = 60, 110, 5


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        try:
            file.truncate(SPACE_BYTES)
        except OSError as error:
            pytest.skip(f"no sparse files of 32 GiB here: {error}")
    try:
        mapped = np.memmap(path, np.uint8, "r+")
    except (OSError, ValueError) as error:
        pytest.skip(f"no 32 GiB of address space: {error}")
    yield mapped
    del mapped
    path.unlink()


def spread(space, number, tokens, width, dtype, token_bytes):
    """(1, 1, tokens, width) in ``space`` with ``token_bytes`` between tokens; arrays of other numbers are elsewhere."""
    first = space[number * 4096 :]
    itemsize = np.dtype(dtype).itemsize
    assert number * 4096 + (tokens - 1) * token_bytes + width * itemsize <= SPACE_BYTES
    flat = np.ndarray((tokens, width), dtype, first, 0, (token_bytes, itemsize))
    return flat[None, None]


# Bytes between tokens: 110 keys end at 29 GB, past 2^32 elements of 4 bytes and past 2^31 of 8; 60 rows at 31 GB.
KEY_STRIDE, VALUE_STRIDE, ROW_STRIDE = (256 << 20) + 64, (256 << 20) + 4096 * 9, (512 << 20) + 64


@pytest.mark.parametrize("diagonal", [FULL, 50], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_strides_that_pass_32_bits(space, dtype, diagonal):
    rng = np.random.default_rng(64)
    queries, keys, values = (normal(rng, 1, 1, n, WIDTH, dtype=dtype) for n in (ROWS, TOKENS, TOKENS))
    far = [
        spread(space, 0, ROWS, WIDTH, dtype, ROW_STRIDE),
        spread(space, 2000, TOKENS, WIDTH, dtype, KEY_STRIDE),
        spread(space, 4000, TOKENS, WIDTH, dtype, VALUE_STRIDE),
    ]
    for place, array in zip(far, (queries, keys, values), strict=True):
        place[:] = array
    state = BlockStatistics(
        spread(space, 6000, ROWS, WIDTH, dtype, ROW_STRIDE),
        spread(space, 8000, ROWS, 1, dtype, ROW_STRIDE)[..., 0],
        spread(space, 10000, ROWS, 1, dtype, ROW_STRIDE)[..., 0],
    )
    state.acc[:], state.m[:], state.l[:] = 0, -np.inf, 0
    kernel = PoisonedKernel(dtype, rows=ROWS, head_dim=WIDTH, value_dim=WIDTH, threads=2)
    kernel.accumulate(far[0], 0, blocks_of(*far[1:]), state, diagonal=diagonal, scale=0.4, done=nothing)
    kernel.close()
    check_exact(state, *exact(queries, 0, blocks_of(keys, values), diagonal=diagonal, scale=0.4))
    assert all((place == array).all() for place, array in zip(far, (queries, keys, values), strict=True))


@pytest.mark.parametrize("axis", ["heads", "batches"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_heads_and_batches_that_are_far_apart(space, dtype, axis):
    rng = np.random.default_rng(65)
    arrays = [
        spread(space, number, 3, n * WIDTH, dtype, 12 << 30).reshape(1, 3, n, WIDTH)
        for number, n in ((0, ROWS), (2000, TOKENS), (4000, TOKENS))
    ]
    for array in arrays:
        assert np.shares_memory(array, space)
        array[:] = rng.standard_normal(array.shape)
    queries, keys, values = (array if axis == "heads" else array.swapaxes(0, 1) for array in arrays)
    blocks, arguments = blocks_of(keys, values), {"diagonal": 20, "scale": 0.4}
    check_exact(run_fast(queries, 0, blocks, **arguments), *exact(queries, 0, blocks, **arguments))


@pytest.mark.parametrize("first", [(1 << 31) - 60, (1 << 32) - 60, 1 << 40], ids=["2^31", "2^32", "2^40"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_token_numbers_past_32_bits(dtype, first):
    rng = np.random.default_rng(66)
    queries, keys, values = (normal(rng, 1, 1, n, WIDTH, dtype=dtype) for n in (150, 200, 200))
    for diagonal in (0, 7, -first, FULL):
        blocks = blocks_of(keys, values, (90,), start=first if diagonal >= 0 else 0)
        arguments = {"diagonal": diagonal, "scale": 0.4}
        check_exact(run_fast(queries, first, blocks, **arguments), *exact(queries, first, blocks, **arguments))


def test_a_distant_block_of_keys_is_not_seen():
    """Token numbers that differ by 2^32 are different."""
    rng = np.random.default_rng(67)
    queries, keys, values = (normal(rng, 1, 1, 50, WIDTH, dtype="float32") for _ in range(3))
    guarded = GuardedState((1, 1, 50), WIDTH, "float32")
    kernel = PoisonedKernel("float32", rows=50, head_dim=WIDTH, value_dim=WIDTH, threads=1)
    kernel.accumulate(queries, 0, [KeyBlock(1 << 32, keys, values)], guarded.state, diagonal=0, scale=1.0, done=nothing)
    kernel.close()
    guarded.check()
    assert guarded.state.saw_no_key.all()
