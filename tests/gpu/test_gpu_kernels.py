"""The CUDA kernels, launched directly: every family and the simple one against float64 by the formula.

Outputs and states hold NaN before each launch wherever they may not be read, and in a margin that may not be written.
"""

from __future__ import annotations

import numpy as np
import pytest
from gpu_cases import BFLOAT16, TOLERANCE, assert_lse_close
from kernel_launches import (
    EVERYTHING,
    FAMILIES,
    SPAN,
    Case,
    Guarded,
    by_family,
    case,
    close,
    cupy,
    empty_state,
    everything,
    host,
    intervals,
    kernel_of,
    launch,
    on_device,
    packing,
    state_dtype,
)

from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.kernels.base import KeyBlock
from cqsa_arrays.kernels.cuda.variants import PADDED
from cqsa_arrays.masks import UNBOUNDED_DIAGONAL

pytestmark = pytest.mark.usefixtures("gpu")


# ---- against float64


@by_family
@pytest.mark.parametrize("kind", ["random", "some rows see nothing", "only gaps", "halves"])
def test_any_interval_for_each_row(family, kind):
    one = case(family)
    low, high = intervals(one, kind)
    close(family, one, low, high, *launch(family, one, low=low, high=high))


@by_family
@pytest.mark.parametrize(
    ("low", "high", "start"),
    [(None, 0, 0), (None, 900, 0), (None, -150, 0), (-40, 25, 250), (-400, -300, 1300), (None, 0, 5000)],
    ids=str,
)
def test_diagonals(family, low, high, start):
    one = case(family, query_start=start, seed=1)
    mask = packing.RowMask(-UNBOUNDED_DIAGONAL if low is None else low, high)
    bounds = (np.full(len(one.rows), -(1 << 60)) if low is None else one.rows + low), one.rows + high + 1
    close(family, one, *bounds, *launch(family, one, mask=mask))


@by_family
@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (33, 57), (40, 24), (100, 128), (256, 200)], ids=str)
def test_dimensions(family, dim, value_dim):
    one = case(family, dim, value_dim, seed=2)
    low, high = intervals(one, "random", 3)
    close(family, one, low, high, *launch(family, one, low=low, high=high))


@pytest.mark.parametrize("family", ["half", "hopper", "single", "split", "double"])
@pytest.mark.parametrize("dim", PADDED)
@pytest.mark.parametrize("value_dim", PADDED)
def test_every_pair_of_widths_that_kernels_are_compiled_for(family, dim, value_dim):
    one = case(family, dim, value_dim, heads=1, seed=17)
    low, high = intervals(one, "random", 5)
    close(family, one, low, high, *launch(family, one, low=low, high=high))


@pytest.mark.parametrize("family", ["single", "split", "double"])
@pytest.mark.parametrize("dim", [64, 192])
@pytest.mark.parametrize("keys", [4096 + 127, 70_000])
def test_the_mean_of_values_near_the_largest_number(family, dim, keys):
    """Totals of many spans must stay finite: here a row's sum of weights is more than that of the first 4096 keys."""
    one = case(family, dim, rows=5, heads=1, batch=1, pieces=((0, keys),), seed=18)
    largest = 0.99 * float(np.finfo(one.v.dtype).max)
    one.q, one.v = np.zeros_like(one.q), np.full_like(one.v, largest)
    out, _ = launch(family, one, span=kernel_of(family, dim, dim).variant.span_keys)
    np.testing.assert_allclose(out, largest, rtol=1e-5)


@by_family
@pytest.mark.parametrize("rows", [1, 15, 127, 129, 300])
@pytest.mark.parametrize("keys", [1, 17, 128, 257])
def test_numbers_of_rows_and_keys(family, rows, keys):
    one = case(family, 40, rows=rows, heads=1, batch=1, pieces=((5, keys),), seed=4)
    close(family, one, *everything(one), *launch(family, one))


@by_family
def test_tokens_beyond_32_bits(family):
    far = (1 << 40) + 5
    one = case(family, pieces=((far, 300), (far + 500, 70)), query_start=far + 100, seed=5)
    mask = packing.RowMask(-60, 200)
    close(family, one, one.rows - 60, one.rows + 201, *launch(family, one, mask=mask))


@by_family
@pytest.mark.parametrize("out_dtype", ["float16", BFLOAT16, "float32", "float64"], ids=lambda one: np.dtype(one).name)
def test_the_output_is_rounded_once_to_any_type(family, out_dtype):
    one = case(family, 40, seed=6)
    wide, lse = launch(family, one)
    out, same = launch(family, one, out_dtype=out_dtype)
    if np.dtype(out_dtype).itemsize == 2:  # float64 gets there by way of float32
        wide = wide.astype("f4")
    assert np.array_equal(out, wide.astype(out_dtype))
    assert np.array_equal(same, lse)


@by_family
def test_the_fast_kernel_and_the_plain_one_agree_on_fresh_inputs(family):
    for seed in range(3):
        one = case(family, 64, 64, seed=100 + seed)
        low, high = intervals(one, "random", seed)
        plain = next(name for name, (dtype, _, simple) in FAMILIES.items() if simple and dtype == FAMILIES[family][0])
        out, lse = launch(family, one, low=low, high=high)
        plain_out, plain_lse = launch(plain, one, low=low, high=high)
        tolerance = 2 * TOLERANCE[FAMILIES[family][0]]
        assert np.linalg.norm(out - plain_out) <= tolerance * np.linalg.norm(plain_out)
        assert_lse_close(lse, plain_lse.astype("f8"))


# ---- states


@by_family
@pytest.mark.parametrize("span", [128, 384])
def test_short_spans_go_through_the_state(family, span):
    one = case(family, seed=7)
    low, high = intervals(one, "some rows see nothing", 1)
    state = empty_state(one, family, poisoned=True)
    close(family, one, low, high, *launch(family, one, low=low, high=high, state=state, span=span))


@pytest.mark.parametrize("family", ["half", "hopper", "split", "double"])
@pytest.mark.parametrize("dim", [128, 256])
def test_more_keys_than_a_span(family, dim):
    """As the engine launches it: a span that is not whole tiles would never end."""
    one = case(family, dim, rows=70, heads=1, batch=1, pieces=((0, 18688), (18688, 18688), (37376, 77)), seed=15)
    state = empty_state(one, family, poisoned=True)
    span = kernel_of(family, dim, dim).variant.span_keys
    close(family, one, *everything(one), *launch(family, one, state=state, span=span))


@by_family
@pytest.mark.parametrize("dims", [(128, 128), (96, 96), (32, 96), (8, 128), (128, 64)], ids=str)
@pytest.mark.parametrize("span", [384, SPAN])
def test_longer_vectors_in_spans(family, dims, span):
    one = case(family, *dims, seed=16)
    low, high = intervals(one, "random", 6)
    state = empty_state(one, family, poisoned=True)
    close(family, one, low, high, *launch(family, one, low=low, high=high, state=state, span=span))


@by_family
@pytest.mark.parametrize("span", [128, SPAN])
def test_states_go_out_and_in_again(family, span):
    one = case(family, seed=8)
    low, high = intervals(one, "random", 2)
    state = empty_state(one, family, poisoned=True)  # of a fresh state nothing is read
    launch(family, one.part(0, 2), low=low, high=high, state=state, finish=False, span=span)
    seen = host(state.m) != -np.inf
    kept = BlockStatistics(*(host(part) for part in (state.acc, state.m, state.l)))
    _, lse = one.part(0, 2).exact(low, high)
    assert_lse_close(np.where(seen, kept.m + np.log(np.where(seen, kept.l, 1)), -np.inf), lse)
    assert (kept.l[~seen] == 0).all()
    launch(family, one.part(2, 4), low=low, high=high, state=state, fresh=False, finish=False, span=span)
    out, lse = launch(family, one.part(4, 5), low=low, high=high, state=state, fresh=False, span=span)
    close(family, one, low, high, out, lse)


@by_family
def test_keys_that_no_row_sees_leave_the_state_bit_for_bit(family):
    one = case(family, seed=9)
    state = empty_state(one, family)
    launch(family, one, state=state, fresh=False, finish=False)
    before = [host(part).tobytes() for part in (state.acc, state.m, state.l)]
    nothing = np.zeros(one.q.shape[2], "i8")
    launch(family, one, low=nothing, high=nothing, state=state, fresh=False, finish=False)
    assert before == [host(part).tobytes() for part in (state.acc, state.m, state.l)]


@by_family
def test_finish_without_keys(family):
    one = case(family, 40, 24, seed=10)
    low, high = intervals(one, "some rows see nothing", 4)
    state = empty_state(one, family)
    launch(family, one, low=low, high=high, state=state, fresh=False, finish=False)
    rows, dtype = one.q.shape[:3], state_dtype(family)
    for with_lse in (True, False):
        out, lse = Guarded((*rows, 24), dtype), Guarded(rows, dtype)
        ends = packing.Finish(out.array, lse.array if with_lse else None)
        kernel_of(family, 40, 24).finish(state, ends, fresh=False)
        written = lse.checked()
        close(family, one, low, high, out.checked(), written if with_lse else one.exact(low, high)[1])
        assert with_lse or np.isnan(written).all()


@by_family
def test_more_pieces_than_one_launch_takes(family):
    pieces = tuple((3 * index, 2) for index in range(2 * packing.MAX_PIECES + 7))
    one = case(family, pieces=pieces, seed=11)
    kernel, state, told = kernel_of(family, 64, 64), empty_state(one, family), []
    queries, blocks = on_device(one)
    kernel.accumulate(queries, 0, blocks, state, diagonal=50, scale=one.scale, done=told.append)
    kernel.drain()
    assert len(told) == 6
    out, lse = host(state.output()), host(state.lse())
    close(family, one, np.zeros(200), one.rows + 51, out, lse)


# ---- where arrays lie


def inside(gap: int, order: str):
    """A view of each array that begins ``gap`` elements into its memory, with vectors ``gap`` elements apart."""

    def view(array: np.ndarray):
        axes = (0, 2, 1, 3) if order == "tokens outside heads" else (0, 1, 2, 3)
        shape = [array.shape[axis] for axis in axes]
        whole = np.full((*shape[:3], shape[3] + 2 * gap), np.nan, array.dtype)
        whole[..., gap : gap + shape[3]] = array.transpose(axes)
        return cupy.asarray(whole)[..., gap : gap + shape[3]].transpose(axes)

    return view


@by_family
@pytest.mark.parametrize("gap", [1, 8])
@pytest.mark.parametrize("order", ["heads outside tokens", "tokens outside heads"])
@pytest.mark.parametrize("dim", [33, 64])
def test_any_strides_and_any_borders(family, gap, order, dim):
    one = case(family, dim, seed=12)
    low, high = intervals(one, "random", 5)
    out, lse = launch(family, one, low=low, high=high, view=inside(gap, order))
    close(family, one, low, high, out, lse)
    # The same arithmetic, however elements are fetched; one kernel leaves what is not whole words to another.
    if dim == 64 and ("hopper" not in family or gap % 8 == 0):
        assert np.array_equal(out, launch(family, one, low=low, high=high)[0])


@pytest.mark.parametrize("family", ["half", "hopper"])
def test_one_head_of_keys_for_all_heads(family):
    one = case(family, seed=13)
    one.k[:], one.v[:] = one.k[:, :1], one.v[:, :1]

    def view(array):
        return (
            cupy.asarray(array) if array.shape[2] == 200 else cupy.broadcast_to(cupy.asarray(array[:, :1]), array.shape)
        )

    close(family, one, *everything(one), *launch(family, one, view=view))


@pytest.mark.parametrize("family", ["half", "hopper", "single", "split", "double", "simple, float16"])
def test_offsets_beyond_2_to_the_31_elements(family):
    """Every array of the call is spread over one large piece of memory: the last token is 1.2 * 2^31 elements off."""
    rows, dim, itemsize = 96, 64, np.dtype(state_dtype(family)).itemsize
    size_bytes = 5 * (1 << 29) * itemsize
    cupy.get_default_memory_pool().free_all_blocks()
    if cupy.cuda.runtime.memGetInfo()[0] < size_bytes + (1 << 30):
        pytest.skip(f"{size_bytes >> 30} GiB of device memory are needed")
    whole = cupy.cuda.MemoryPointer(cupy.cuda.Memory(size_bytes), 0)
    one = case(family, dim, rows=rows, heads=1, batch=1, pieces=((0, rows),), seed=14)
    taken = 0

    def spread(shape: tuple[int, ...], dtype: object):
        nonlocal taken
        dtype = np.dtype(dtype)
        step = int(1.2 * 2**31 / rows) // 64 * 64 * dtype.itemsize
        strides = (0, 0, step, dtype.itemsize)[: len(shape)]
        found = cupy.ndarray(shape, dtype, memptr=whole + taken, strides=strides)
        taken += 1024
        return found

    def view(array: np.ndarray):
        made = spread(array.shape, array.dtype)
        made[...] = cupy.asarray(array)
        return made

    dtype, shape = state_dtype(family), one.q.shape[:3]
    state = BlockStatistics(spread((*shape, dim), dtype), spread(shape, dtype), spread(shape, dtype))
    out, lse = spread((*shape, dim), dtype), spread(shape, dtype)
    queries, blocks = on_device(one, view)
    mask = packing.RowMask(-UNBOUNDED_DIAGONAL, 0)
    for ends in (None, packing.Finish(out, lse)):
        call = packing.pack_call(
            queries, 0, blocks, state, ends, mask=mask, scale=one.scale, span_keys=SPAN, fresh=ends is None
        )
        kernel_of(family, dim, dim)._launch(call)
    twice = Case(
        one.q, np.tile(one.k, (1, 1, 2, 1)), np.tile(one.v, (1, 1, 2, 1)), ((0, rows), (0, rows)), 0, one.scale
    )
    close(family, twice, np.zeros(rows), one.rows + 1, host(out), host(lse))


# ---- the same bits


@by_family
def test_the_same_call_gives_the_same_bits(family):
    one = case(family, seed=19, rows=500, heads=8)
    low, high = intervals(one, "random", 10)
    runs = [launch(family, one, low=low, high=high) for _ in range(2)]
    assert runs[0][0].tobytes() == runs[1][0].tobytes()
    assert runs[0][1].tobytes() == runs[1][1].tobytes()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "split"])
def test_a_row_does_not_depend_on_the_rows_beside_it(family):
    """Blocks of rows that see tiles in full and those that see them in part compute the same."""
    one = case(family, rows=300, seed=20)
    whole = launch(family, one)[0]
    alone = Case(one.q[:, :, 131:132], one.k, one.v, one.pieces, 131, one.scale)
    assert np.array_equal(launch(family, alone)[0], whole[:, :, 131:132])


def test_key_blocks_of_different_strides_are_refused():
    """A launch has one set of strides for all of its blocks."""
    queries, state = cupy.zeros((1, 2, 8, 64), "f2"), BlockStatistics.empty((1, 2, 8), 64, "float32", cupy)
    blocks = [KeyBlock(start, *(cupy.zeros((1, 2, n, 64), "f2"),) * 2) for start, n in ((0, 16), (16, 17))]
    with pytest.raises(ValueError, match="strides"):
        packing.pack_call(queries, 0, blocks, state, None, mask=EVERYTHING, scale=1, span_keys=SPAN, fresh=True)
