"""The CUDA kernels, launched directly: every family and the simple one against float64 by the formula.

Outputs and states hold NaN before each launch wherever they may not be read, and in a margin that may not be written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest
from gpu_cases import BFLOAT16, TOLERANCE, assert_close, assert_lse_close, exact_where, host, normal

from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.kernels.base import KeyBlock
from cqsa_arrays.kernels.cuda.variants import choose_variant, simple_variant
from cqsa_arrays.masks import UNBOUNDED_DIAGONAL

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
packing = pytest.importorskip("cqsa_arrays.kernels.cuda.call")
kernels = pytest.importorskip("cqsa_arrays.kernels.cuda.kernel")
pytestmark = pytest.mark.usefixtures("gpu")

EVERYTHING = packing.RowMask(-UNBOUNDED_DIAGONAL, UNBOUNDED_DIAGONAL)
SPAN = 1 << 20
# Name: element type, whether products are split, whether it is the plain kernel.
FAMILIES = {
    "half": ("float16", False, False),
    "half, bfloat16": ("bfloat16", False, False),
    "single": ("float32", False, False),
    "split": ("float32", True, False),
    "double": ("float64", False, False),
    "simple, float16": ("float16", False, True),
    "simple, bfloat16": ("bfloat16", False, True),
    "simple, float32": ("float32", False, True),
    "simple, float64": ("float64", False, True),
}
by_family = pytest.mark.parametrize("family", FAMILIES)
# First token and number of tokens of each piece: gaps, a single key, less and more than a tile.
PIECES = ((0, 130), (200, 1), (300, 77), (1000, 311), (1311, 64))


@dataclass
class Case:
    """Queries of consecutive tokens and pieces of keys and values, on the host."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pieces: tuple[tuple[int, int], ...] = PIECES
    query_start: int = 0
    scale: float = 0.125

    @property
    def tokens(self) -> np.ndarray:
        return np.concatenate([np.arange(start, start + count) for start, count in self.pieces])

    @property
    def rows(self) -> np.ndarray:
        return self.query_start + np.arange(self.q.shape[2])

    def exact(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen = (self.tokens >= low[:, None]) & (self.tokens < high[:, None])
        return exact_where(self.q, self.k, self.v, seen, self.scale)

    def part(self, first: int, last: int) -> Case:
        """With the pieces first .. last - 1 only."""
        ends = np.cumsum([0, *(count for _, count in self.pieces)])
        keys = np.s_[:, :, ends[first] : ends[last]]
        return Case(self.q, self.k[keys], self.v[keys], self.pieces[first:last], self.query_start, self.scale)


def case(family: str, dim=64, value_dim=None, rows=200, heads=3, batch=2, pieces=PIECES, seed=0, **more) -> Case:
    dtype = FAMILIES[family][0]
    dtype = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    keys = sum(count for _, count in pieces)
    shapes = ((rows, dim), (keys, dim), (keys, value_dim or dim))
    q, k, v = (normal(batch, heads, *shape, dtype=dtype, seed=3 * seed + i) for i, shape in enumerate(shapes))
    return Case(q, k, v, tuple(pieces), scale=dim**-0.5, **more)


def state_dtype(family: str) -> str:
    return "float64" if FAMILIES[family][0] == "float64" else "float32"


@functools.cache
def kernel_of(family: str, dim: int, value_dim: int):
    """A CudaKernel with the variant of ``family``, whatever it would choose by itself."""
    dtype, split, simple = FAMILIES[family]
    made = kernels.CudaKernel(dtype, head_dim=dim, value_dim=value_dim, scale=1.0)
    capability = cupy.cuda.Device().compute_capability
    version = int(capability[:-1]), int(capability[-1])
    variant = simple_variant(dtype) if simple else choose_variant(dtype, dim, value_dim, version, split=split)
    made.variant, made._function = variant, kernels.load(variant, cupy.cuda.Device().id)
    return made


class Guarded:
    """An array of NaN inside a larger one of NaN."""

    def __init__(self, shape: tuple[int, ...], dtype: object) -> None:
        self._whole = cupy.asarray(np.full([length + 2 for length in shape], np.nan, dtype))
        self._inside = tuple(slice(1, 1 + length) for length in shape)
        self.array = self._whole[self._inside]

    def checked(self) -> np.ndarray:
        """What was written, on the host, and nothing around it was."""
        whole = host(self._whole)
        found = whole[self._inside].copy()
        whole[self._inside] = np.nan
        assert np.isnan(whole).all()
        return found


def empty_state(one: Case, family: str, poisoned: bool = False) -> BlockStatistics:
    shape, dtype = one.q.shape[:3], state_dtype(family)
    if not poisoned:
        return BlockStatistics.empty(shape, one.v.shape[3], dtype, cupy)
    guarded = (Guarded((*shape, one.v.shape[3]), dtype), Guarded(shape, dtype), Guarded(shape, dtype))
    return BlockStatistics(*(each.array for each in guarded))


def on_device(one: Case, view=cupy.asarray):
    """Queries and key blocks there, slices of one array as a launch asks; ``view`` makes it of the host array."""
    ends, keys, values = np.cumsum([0, *(count for _, count in one.pieces)]), view(one.k), view(one.v)
    blocks = [
        KeyBlock(start, keys[:, :, a:b], values[:, :, a:b])
        for (start, _), a, b in zip(one.pieces, ends, ends[1:], strict=False)
    ]
    return view(one.q), blocks


def launch(
    family, one, *, low=None, high=None, mask=EVERYTHING, state=None, fresh=True, span=SPAN, finish=True,
    out_dtype=None, view=cupy.asarray,
):  # fmt: skip
    """One launch: output and log-sum-exp, NaN beforehand, or None, None where ``finish`` is false."""
    kernel = kernel_of(family, one.q.shape[3], one.v.shape[3])
    queries, blocks = on_device(one, view)
    rows, dtype = one.q.shape[:3], state_dtype(family)
    out, lse = Guarded((*rows, one.v.shape[3]), out_dtype or dtype), Guarded(rows, dtype)
    ends = packing.Finish(out.array, lse.array) if finish else None
    call = packing.pack_call(
        queries, one.query_start, blocks, state, ends, mask=mask, scale=one.scale, span_keys=span, fresh=fresh
    )
    intervals = [None if bound is None else cupy.asarray(bound, "int64") for bound in (low, high)]
    if low is not None:
        call["row_low"], call["row_high"] = (bound.data.ptr for bound in intervals)
    kernel._launch(call)
    cupy.cuda.Device().synchronize()
    written = out.checked(), lse.checked()
    return written if finish else (None, None)


def close(family: str, one: Case, low, high, out, lse) -> None:
    expected, expected_lse = one.exact(np.asarray(low), np.asarray(high))
    dtype = BFLOAT16 if "bfloat16" in family else FAMILIES[family][0]
    assert_close(out, expected, dtype)
    assert_lse_close(lse, expected_lse)


def everything(one: Case) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(one.q.shape[2], "i8"), np.full(one.q.shape[2], 1 << 60)


def intervals(one: Case, kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What each row sees: anything, also nothing, less than nothing and keys that are not there."""
    rng, rows, last = np.random.default_rng(seed), one.q.shape[2], int(one.tokens[-1]) + 1
    if kind == "random":
        return np.sort(rng.integers(-50, last + 50, (2, rows)), axis=0)
    if kind == "some rows see nothing":
        low, high = np.sort(rng.integers(0, last, (2, rows)), axis=0)
        return low, np.where(rng.random(rows) < 0.5, low - rng.integers(0, 9, rows), high)
    if kind == "only gaps":
        return np.full(rows, 201), np.full(rows, 300)
    low = np.where(np.arange(rows) < rows // 2, 0, 1000)
    return low, np.where(np.arange(rows) < rows // 2, 130, 1375)


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
    if dim == 64:  # the same arithmetic, however elements are fetched
        assert np.array_equal(out, launch(family, one, low=low, high=high)[0])


def test_one_head_of_keys_for_all_heads():
    one = case("half", seed=13)
    one.k[:], one.v[:] = one.k[:, :1], one.v[:, :1]

    def view(array):
        return (
            cupy.asarray(array) if array.shape[2] == 200 else cupy.broadcast_to(cupy.asarray(array[:, :1]), array.shape)
        )

    close("half", one, *everything(one), *launch("half", one, view=view))


@pytest.mark.parametrize("family", ["half", "single", "split", "double", "simple, float16"])
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


# ---- NaN and infinities


def finite_elsewhere(family: str, one: Case, low, high, out) -> None:
    """NaN and infinities exactly where the formula has them, everything else as exact as ever."""
    expected, _ = one.exact(low, high)
    assert np.array_equal(np.isnan(out), np.isnan(expected))
    infinite = np.isinf(expected)
    assert np.array_equal(out[infinite], expected[infinite])
    left = np.isfinite(expected)
    assert left.any()
    tolerance = TOLERANCE[FAMILIES[family][0]]
    assert np.linalg.norm(out[left] - expected[left]) <= tolerance * np.linalg.norm(expected[left])


@by_family
@pytest.mark.parametrize("span", [None, 128], ids=["one span", "spans of 128"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("where", ["query", "keys", "values", "everywhere"])
def test_what_is_not_finite_reaches_exactly_the_rows_that_see_it(family, where, bad, span):
    one = case(family, seed=15)
    low, high = intervals(one, "random", 6)
    if where in ("query", "everywhere"):
        one.q[0, 1, 77, 5] = bad
    if where in ("keys", "everywhere"):
        one.k[0, 0, [3, 135, 400], 9] = bad
        one.k[1, 2, -1] = bad
    if where in ("values", "everywhere"):
        one.v[1, 0, [0, 140, 518], 63] = bad
        one.v[1, 1, 300, 0] = bad
    state = empty_state(one, family, poisoned=True) if span else None
    out, _ = launch(family, one, low=low, high=high, span=span or SPAN, state=state)
    finite_elsewhere(family, one, low, high, out)


@by_family
def test_infinities_of_both_signs_in_one_column_make_nan_for_rows_that_see_both(family):
    one = case(family, seed=16)
    one.v[0, 0, 10, 3], one.v[0, 0, 500, 3] = np.inf, -np.inf
    low, high = intervals(one, "random", 7)
    finite_elsewhere(family, one, low, high, launch(family, one, low=low, high=high)[0])


@by_family
def test_scores_of_minus_infinity_weigh_nothing(family):
    """Rows all of whose keys are such are rows that saw no key."""
    one = case(family, seed=17)
    one.q[..., 0] = 1
    one.k[:, :, 100:300, 0] = -np.inf
    low, high = intervals(one, "random", 8)
    low[:60], high[:60] = one.tokens[105], one.tokens[290]
    for state in (None, empty_state(one, family, poisoned=True)):
        out, lse = launch(family, one, low=low, high=high, state=state, span=128 if state else SPAN)
        close(family, one, low, high, out, lse)
        assert (out[:, :, :60] == 0).all()
        assert (lse[:, :, :60] == -np.inf).all()


@by_family
def test_values_of_keys_that_weigh_nothing_but_are_far_below_the_largest(family):
    """Scores hundreds apart: the weights of most keys are 0, and nothing overflows."""
    one = case(family, seed=18)
    one.scale = 40.0
    low, high = intervals(one, "random", 9)
    out, lse = launch(family, one, low=low, high=high)
    assert np.isfinite(out).all()
    assert np.isfinite(lse[lse != -np.inf]).all()
    assert (np.abs(out) <= np.abs(one.v.astype("f8")).max() * 1.01).all()


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
