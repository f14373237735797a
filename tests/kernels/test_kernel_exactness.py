"""The fast CPU kernel and the plain one, each against float64: shapes, offsets, pieces of keys, states, strides."""

import numpy as np
import pytest
from kernel_cases import (
    FIELDS,
    FULL,
    RUNS,
    GuardedState,
    PoisonedKernel,
    blocks_of,
    check_exact,
    exact,
    normal,
    nothing,
    run_fast,
    run_simply,
    same_bits,
)

from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.kernels.base import KeyBlock
from cqsa_arrays.kernels.cpu.attend import attend_group
from cqsa_arrays.kernels.cpu.kernel import CpuKernel, load

DTYPES = ("float32", "float64")
LENGTHS = (1, 2, 47, 48, 49, 95, 96, 97, 191, 193, 700)
# Head dimension of queries and keys, of values.
DIMENSIONS = (
    (1, 1), (1, 5), (2, 3), (3, 2), (5, 8), (7, 9), (8, 7), (9, 16), (16, 1), (31, 33), (33, 31), (64, 64), (64, 100),
    (100, 64), (128, 128), (200, 7), (256, 200), (512, 1), (2, 512), (1000, 31), (9, 1000), (1024, 1024),
)  # fmt: skip
MASKS = {"full": FULL, "causal": 0, "ahead": 31, "behind": -60, "just-full": 192, "far-behind": -(1 << 40)}
# Two masks for each pair of dimensions, in turn.
MASKED_DIMENSIONS = [
    pytest.param(dims, mask, id=f"D{dims[0]}-Dv{dims[1]}-{mask}")
    for i, dims in enumerate(DIMENSIONS)
    for mask in (list(MASKS)[i % 6], list(MASKS)[(i + 3) % 6])
]


@pytest.fixture(params=RUNS)
def run(request):
    return RUNS[request.param]


@pytest.fixture
def rng():
    return np.random.default_rng(20604)


def check_case(
    run,
    rng,
    dtype,
    *,
    rows,
    tokens,
    head_dim,
    value_dim,
    diagonal,
    query_start=0,
    outer=(1, 1),
    ends=(),
    tolerance=None,
):
    queries = normal(rng, *outer, rows, head_dim, dtype=dtype)
    keys, values = (normal(rng, *outer, tokens, width, dtype=dtype) for width in (head_dim, value_dim))
    blocks, scale = blocks_of(keys, values, ends), head_dim**-0.5
    state = run(queries, query_start, blocks, diagonal=diagonal, scale=scale)
    assert state.acc.dtype == state.m.dtype == state.l.dtype == dtype
    check_exact(state, *exact(queries, query_start, blocks, diagonal=diagonal, scale=scale), tolerance)


@pytest.mark.parametrize(("dims", "mask"), MASKED_DIMENSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dimensions(run, rng, dtype, dims, mask):
    head_dim, value_dim = dims
    check_case(
        run, rng, dtype, rows=97, tokens=193, head_dim=head_dim, value_dim=value_dim, diagonal=MASKS[mask], ends=(50,)
    )


@pytest.mark.parametrize("run_name", ["fast", "simple"])
def test_long_dot_products(run_name):
    """float32 at head dimension 1000 is as exact as promised, whatever the input."""
    for seed in range(3):
        check_case(
            RUNS[run_name], np.random.default_rng(seed), "float32", rows=96, tokens=700, head_dim=1000, value_dim=31,
            diagonal=FULL,
        )  # fmt: skip


@pytest.mark.parametrize("tokens", LENGTHS, ids=lambda n: f"Nk{n}")
@pytest.mark.parametrize("rows", LENGTHS, ids=lambda n: f"Nq{n}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(rng, dtype, rows, tokens):
    for diagonal in (FULL, 0, tokens - rows):
        check_case(run_fast, rng, dtype, rows=rows, tokens=tokens, head_dim=8, value_dim=5, diagonal=diagonal)


@pytest.mark.parametrize("tokens", [1, 2, 97, 700], ids=lambda n: f"Nk{n}")
@pytest.mark.parametrize("rows", [1, 2, 97, 700], ids=lambda n: f"Nq{n}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_in_the_plain_kernel(rng, dtype, rows, tokens):
    """Which has no tiles."""
    # It adds 700 products one after the other: 1.1e-6 was seen over one row (the fast kernel: 5e-7).
    tolerance = 2e-6 if dtype == "float32" else None
    for diagonal in (FULL, 0, tokens - rows):
        check_case(
            run_simply, rng, dtype, rows=rows, tokens=tokens, head_dim=8, value_dim=5, diagonal=diagonal,
            tolerance=tolerance,
        )  # fmt: skip


# Query start, diagonal: relative to each other and to the 193 keys. Row r sees j <= r + diagonal, r counted from 0.
OFFSETS = {
    "start": (90, 0),
    "start-odd": (37, 5),
    "start-behind": (150, -100),
    "all-see-one": (0, -96),
    "one-sees-one": (10, -106),
    "none": (10, -107),
    "all-but-last-key": (192, -1),
    "far-start": (1 << 50, -(1 << 50) + 20),
    "far-start-full": (1 << 50, FULL),
    "negative-far": (0, -FULL),
}


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets(run, rng, dtype, offset):
    query_start, diagonal = OFFSETS[offset]
    check_case(
        run, rng, dtype, rows=97, tokens=193, head_dim=16, value_dim=9, query_start=query_start, diagonal=diagonal,
        outer=(2, 3),
    )  # fmt: skip


# Borders of pieces of 500 keys, the order in which the pieces come, and which of them come.
PIECES = {
    "one": ((), (0,)),
    "in-order": ((100, 101, 350), (0, 1, 2, 3)),
    "backwards": ((100, 101, 350), (3, 2, 1, 0)),
    "shuffled": ((96, 144, 200, 499), (2, 4, 0, 3, 1)),
    "not-adjacent": ((60, 200, 260, 400), (0, 2, 4)),
    "not-adjacent-backwards": ((60, 200, 260, 400), (3, 1)),
    "with-empty": ((96, 96, 300), (0, 1, 2, 3)),
    "last-only": ((430,), (1,)),
}


@pytest.mark.parametrize("mask", ["full", "causal", "behind"])
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_of_keys_in_any_order(rng, dtype, pieces, mask):
    ends, order = PIECES[pieces]
    queries, keys, values = (normal(rng, 2, 2, n, width, dtype=dtype) for n, width in ((130, 9), (500, 9), (500, 12)))
    cut = blocks_of(keys, values, ends, start=70)
    blocks, arguments = [cut[i] for i in order], {"diagonal": MASKS[mask], "scale": 0.4}
    wanted = exact(queries, 400, blocks, **arguments)
    check_exact(run_fast(queries, 400, blocks, **arguments), *wanted)
    solid = [block for block in blocks if block.keys.shape[2]]
    check_exact(run_simply(queries, 400, solid, **arguments), *wanted)


@pytest.mark.parametrize("mask", ["full", "causal", "behind"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_continuing_a_state_equals_one_call(run, rng, dtype, mask):
    queries, keys, values = (normal(rng, 2, 2, n, width, dtype=dtype) for n, width in ((130, 9), (500, 9), (500, 12)))
    blocks, arguments = blocks_of(keys, values, (96, 130, 131, 400)), {"diagonal": MASKS[mask], "scale": 0.4}
    state = None
    for block in reversed(blocks):
        before = {field: getattr(state, field).copy() for field in FIELDS} if state else {}
        following = run(queries, 200, [block], state=state, **arguments)
        assert all((getattr(state, field) == before[field]).all() for field in before)
        state = following
    check_exact(state, *exact(queries, 200, blocks, **arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_with_the_larger_maximum_and_one_with_the_smaller(run, rng, dtype):
    queries, keys, values = (normal(rng, 1, 2, n, width, dtype=dtype) for n, width in ((60, 4), (300, 4), (300, 6)))
    keys[:, :, :100] *= 8
    blocks, arguments = blocks_of(keys, values, (100,)), {"diagonal": FULL, "scale": 1.0}
    wanted = exact(queries, 0, blocks, **arguments)
    for first, second in (blocks, blocks[::-1]):
        state = run(queries, 0, [second], state=run(queries, 0, [first], **arguments), **arguments)
        check_exact(state, *wanted, tolerance={"float32": 4e-6, "float64": 2e-14}[dtype])  # scores reach 60


def test_the_state_is_natural_and_row_major(rng):
    """l and acc are relative to m, and l is near 1: what every kernel family and ``merge`` agree on."""
    queries, keys, values = (normal(rng, 1, 1, n, 8, dtype="float64") for n in (50, 120, 120))
    state = run_fast(queries, 0, blocks_of(keys, values), diagonal=FULL, scale=0.5)
    scores = 0.5 * queries[0, 0] @ keys[0, 0].T
    weights = np.exp(scores - state.m[0, 0][:, None])
    np.testing.assert_allclose(state.m[0, 0], np.log(np.exp(scores).sum(1)), rtol=1e-14)
    np.testing.assert_allclose(state.l[0, 0], 1, rtol=1e-14)
    np.testing.assert_allclose(state.l[0, 0], weights.sum(1), rtol=1e-13)
    np.testing.assert_allclose(state.acc[0, 0], weights @ values[0, 0], rtol=0, atol=1e-12)


def padded(rng, batches, heads, tokens, width, dtype):
    """(batch, heads, tokens, width) with NaN before and after every token."""
    around = np.full((batches, heads, tokens + 2, width + 3), np.nan, dtype)
    view = around[:, :, 1:-1, 1 : width + 1]
    view[:] = rng.standard_normal(view.shape)
    return view


def token_major(rng, batches, heads, tokens, width, dtype):
    return normal(rng, batches, tokens, heads, width, dtype=dtype).swapaxes(1, 2)


def second_tokens(rng, batches, heads, tokens, width, dtype):
    whole = normal(rng, batches, heads, 2 * tokens, width, dtype=dtype)
    whole[:, :, 1::2] = np.nan
    return whole[:, :, ::2]


def fused(rng, batches, heads, tokens, width, dtype):
    """One part of a (batch, tokens, 3, heads, width) projection, the others being NaN."""
    whole = np.full((batches, tokens, 3, heads, width), np.nan, dtype)
    whole[:, :, 1] = rng.standard_normal((batches, tokens, heads, width))
    return whole[:, :, 1].swapaxes(1, 2)


def backwards(rng, batches, heads, tokens, width, dtype):
    return normal(rng, batches, heads, tokens, width, dtype=dtype)[:, :, ::-1]


def one_for_all_heads(rng, batches, heads, tokens, width, dtype):
    return np.broadcast_to(normal(rng, batches, 1, tokens, width, dtype=dtype), (batches, heads, tokens, width))


def one_for_all_tokens(rng, batches, heads, tokens, width, dtype):
    return np.broadcast_to(normal(rng, batches, heads, 1, width, dtype=dtype), (batches, heads, tokens, width))


def read_only(rng, batches, heads, tokens, width, dtype):
    array = normal(rng, batches, heads, tokens, width, dtype=dtype)
    array.flags.writeable = False
    return array


# Makers of queries, keys, values.
STRIDES = {
    "padded": (padded, padded, padded),
    "token-major": (token_major, token_major, token_major),
    "second-tokens": (second_tokens, second_tokens, second_tokens),
    "fused": (fused, fused, fused),
    "unequal": (padded, token_major, second_tokens),
    "unequal-too": (token_major, fused, padded),
    "backwards": (backwards, backwards, backwards),
    "shared-heads": (padded, one_for_all_heads, one_for_all_heads),
    "shared-tokens": (token_major, padded, one_for_all_tokens),
    "read-only": (read_only, read_only, read_only),
}


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_give_the_bits_of_contiguous_ones(rng, dtype, strides, mask):
    makers = STRIDES[strides]
    queries, keys, values = (
        maker(rng, 2, 3, n, width, dtype) for maker, n, width in zip(makers, (100, 210, 210), (17, 17, 10), strict=True)
    )
    arguments = {"diagonal": MASKS[mask], "scale": -0.3}
    state = run_fast(queries, 60, blocks_of(keys, values, (97,)), **arguments)
    packed = [np.ascontiguousarray(array) for array in (queries, keys, values)]
    again = run_fast(packed[0], 60, blocks_of(*packed[1:], (97,)), **arguments)
    assert same_bits(state, again)
    wanted = exact(queries, 60, blocks_of(keys, values), **arguments)
    check_exact(state, *wanted)
    check_exact(run_simply(queries, 60, blocks_of(keys, values, (97,)), **arguments), *wanted)


@pytest.mark.parametrize("rows", [1, 130])
def test_a_kernel_for_more_rows_gives_the_same_bits(rng, rows):
    """Also after other calls: nothing stays in the scratch."""
    queries, keys, values = (normal(rng, 1, 2, n, 8, dtype="float32") for n in (rows, 200, 200))
    blocks, arguments = blocks_of(keys, values), {"diagonal": 70, "scale": 0.3}
    wanted = run_fast(queries, 0, blocks, **arguments)
    kernel = PoisonedKernel("float32", rows=5000, head_dim=8, value_dim=8, threads=2)
    for _ in range(3):
        guarded = GuardedState((1, 2, rows), 8, "float32")
        kernel.accumulate(queries, 0, blocks, guarded.state, done=nothing, **arguments)
        guarded.check()
        assert same_bits(guarded.state, wanted)
    kernel.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do(rng, dtype):
    """No rows; no blocks: the state stays as it is."""
    queries, keys, values = (normal(rng, 1, 2, n, 4, dtype=dtype) for n in (60, 100, 100))
    before = run_fast(queries, 0, blocks_of(keys, values), diagonal=FULL, scale=1.0)
    kernel = CpuKernel(dtype, rows=60, head_dim=4, value_dim=4, threads=2)
    state = BlockStatistics(before.acc.copy(), before.m.copy(), before.l.copy())
    told = []
    kernel.accumulate(queries, 0, [], state, diagonal=FULL, scale=1.0, done=told.append)
    assert same_bits(state, before)
    assert sum(len(part) for part in told) == 2 * 60
    none = BlockStatistics.empty((1, 2, 0), 4, dtype)
    kernel.accumulate(queries[:, :, :0], 0, blocks_of(keys, values), none, diagonal=0, scale=1.0, done=told.append)
    kernel.close()


def test_no_call_compiles_a_further_variant(rng):
    """Contiguous, strided, read-only and one-row arguments all run what ``load`` compiled."""
    for dtype in DTYPES:
        load(dtype)
        one = normal(rng, 1, 1, 1, 1, dtype=dtype)
        for scale in (1, 1.0, np.float32(1), np.float64(1)):
            run_fast(one, 0, [KeyBlock(0, one, one)], diagonal=0, scale=scale)
        for maker in (normal_contiguous, padded, token_major, read_only):
            x = maker(rng, 1, 2, 50, 4, dtype)
            run_fast(x, np.int64(0), blocks_of(x, x), diagonal=np.int64(0), scale=1.0)
    assert len(attend_group.signatures) == len(DTYPES)


def normal_contiguous(rng, *shape_and_dtype):
    *shape, dtype = shape_and_dtype
    return normal(rng, *shape, dtype=dtype)
