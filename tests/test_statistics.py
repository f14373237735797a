"""The state (acc, m, l): merging, finishing, and every documented case at the edge."""

import functools
import sys
import types
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cqsa_arrays.block_statistics import BlockStatistics, array_namespace, merge
from cqsa_arrays.errors import ArgumentError

INF, NAN = np.inf, np.nan
FIELDS = ("acc", "m", "l")


@pytest.fixture(params=["numpy", "cupy"], scope="module")
def xp(request):
    if request.param == "numpy":
        return np
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no CUDA device: {error}")
    return cupy


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def host(array):
    return array.get() if hasattr(array, "get") else np.asarray(array)


def state_of(scores, values, xp=np, dtype=np.float64):
    """The formula of the module's docstring, with the documented state of rows whose scores are all -inf."""
    scores, values = np.asarray(scores, dtype), np.asarray(values, dtype)
    with np.errstate(all="ignore"):
        m = scores.max(axis=-1, initial=-INF)
        weights = np.exp(scores - np.where(m == -INF, 0, m)[..., None]).astype(dtype)
        acc = np.where((m == -INF)[..., None], 0, weights @ values).astype(dtype)
        return BlockStatistics(xp.asarray(acc), xp.asarray(m.astype(dtype)), xp.asarray(weights.sum(axis=-1)))


def random_state(rng, xp=np, dtype=np.float64, keys=7, rows=(2, 5), value_dim=3):
    return state_of(rng.normal(scale=5, size=(*rows, keys)), rng.normal(size=(keys, value_dim)), xp, dtype)


def same_bits(a, b):
    return all(host(getattr(a, f)).tobytes() == host(getattr(b, f)).tobytes() for f in FIELDS)


def close(a, b, tolerance=1e-13):
    return all(
        np.allclose(host(x), host(y), rtol=tolerance, atol=tolerance)
        for x, y in [(a.output(), b.output()), (a.lse(), b.lse())]
    )


def test_one_block_is_softmax(xp):
    scores, values = np.log([[1.0, 2.0, 5.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    state = state_of(scores, values, xp)
    np.testing.assert_allclose(host(state.output()), [[11 / 8, 12 / 8]], rtol=1e-15)
    np.testing.assert_allclose(host(state.lse()), [np.log(8)], rtol=1e-15)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_keys_split_anywhere_merge_to_the_whole(xp, seed, cuts):
    rng = np.random.default_rng(seed)
    scores, values = rng.normal(scale=20, size=(4, 60)), rng.normal(size=(60, 3))
    whole = state_of(scores, values, np)
    for dtype, tolerance in ((np.float64, 1e-13), (np.float32, 1e-5)):
        parts = np.split(np.arange(60), sorted(cuts))
        states = [state_of(scores[:, part], values[part], xp, dtype) for part in parts]
        merged = functools.reduce(merge, states)
        assert merged.acc.dtype == merged.m.dtype == merged.l.dtype == merged.output().dtype == dtype
        assert close(merged, whole, tolerance)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_merge_is_commutative_bit_for_bit_and_associative_within_rounding(xp, seed):
    rng = np.random.default_rng(seed)
    a, b, c = (random_state(rng, xp) for _ in range(3))
    assert same_bits(merge(a, b), merge(b, a))
    assert same_bits(a.merge(b), merge(a, b))
    assert close(merge(merge(a, b), c), merge(a, merge(b, c)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_that_saw_no_key_change_nothing_bit_for_bit(xp, dtype):
    state = random_state(np.random.default_rng(1), xp, dtype)
    state.acc[0, 0] = xp.asarray([-0.0, INF, NAN], dtype=dtype)
    state.m[0, 1], state.l[0, 1] = NAN, NAN
    empty = BlockStatistics.empty((2, 5), 3, dtype, xp)
    assert same_bits(merge(state, empty), state)
    assert same_bits(merge(empty, state), state)
    assert same_bits(merge(empty, empty), empty)


def test_each_row_of_one_state_is_merged_by_itself(xp):
    a, b = (random_state(np.random.default_rng(seed), xp) for seed in (1, 2))
    a.acc[0, 0], a.m[0, 0], a.l[0, 0] = 0, -INF, 0
    merged, whole = merge(a, b), merge(random_state(np.random.default_rng(1), xp), b)
    for field in FIELDS:
        m, w, only_b = (host(getattr(state, field)) for state in (merged, whole, b))
        assert m[0, 0].tobytes() == only_b[0, 0].tobytes()
        assert m[1].tobytes() == w[1].tobytes()


def test_rows_that_saw_no_key_end_as_zero_and_minus_inf(xp):
    empty = BlockStatistics.empty((4,), 2, np.float32, xp)
    assert host(empty.saw_no_key).all()
    assert (host(empty.output()) == 0).all()
    assert (host(empty.lse()) == -INF).all()


def test_minus_inf_scores_weigh_nothing(xp):
    values = [[1.0], [100.0], [3.0]]
    assert close(state_of([[0.0, -INF, 1.0]], values, xp), state_of([[0.0, 1.0]], [[1.0], [3.0]], xp), 1e-15)
    all_masked = state_of([[-INF, -INF, -INF]], values, xp)
    assert same_bits(all_masked, BlockStatistics.empty((1,), 1, np.float64, xp))
    assert same_bits(merge(all_masked, all_masked), all_masked)


def ends_as_nan(state):
    return np.isnan(host(state.output())).all() and np.isnan(host(state.lse())).all()


@pytest.mark.parametrize("poison", [INF, NAN])
@pytest.mark.parametrize("others", [[], [0.0, 1.0], [-INF, -INF], [INF], [NAN]])
def test_plus_inf_and_nan_scores_end_as_nan_through_any_merge(xp, poison, others):
    state = state_of([[poison, 2.0]], [[1.0], [2.0]], xp)
    other = state_of([others], np.ones((len(others), 1)), xp)
    assert ends_as_nan(state)
    for merged in (merge(state, other), merge(other, state), merge(merge(other, state), other)):
        assert ends_as_nan(merged)


@pytest.mark.parametrize("m", [-INF, -3.0, INF, NAN])
def test_a_nan_sum_is_never_taken_for_no_key_whatever_the_maximum(xp, m):
    state = BlockStatistics(xp.zeros((1, 1)), xp.asarray([m]), xp.asarray([NAN]))
    assert not host(state.saw_no_key).any()
    for merged in (
        state,
        merge(state, state),
        merge(state, random_state(np.random.default_rng(0), xp, rows=(1,), value_dim=1)),
    ):
        assert ends_as_nan(merged)


@pytest.mark.parametrize(("value", "expected"), [(NAN, NAN), (INF, INF), (-INF, -INF)])
def test_values_that_are_not_finite_reach_the_output(xp, value, expected):
    state = merge(state_of([[0.0]], [[1.0, value]], xp), state_of([[0.5]], [[1.0, 1.0]], xp))
    np.testing.assert_array_equal(host(state.output())[0, 1], expected)
    np.testing.assert_allclose(host(state.output())[0, 0], 1.0)


def test_weight_zero_times_inf_value_is_nan_as_in_the_formula(xp):
    assert np.isnan(host(merge(state_of([[-1e5]], [[INF]], xp), state_of([[0.0]], [[1.0]], xp)).output())).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_do_not_overflow(xp, sign):
    scores, values = sign * np.array([[1e4, 1e4 + 1, 1e4 - 90]]), np.array([[1.0], [2.0], [3.0]])
    states = [state_of(scores[:, [j]], values[[j]], xp, np.float32) for j in range(3)]
    merged = functools.reduce(merge, states)
    assert close(merged, state_of(scores, values), 1e-6)
    extreme = BlockStatistics(xp.ones((1, 1)), xp.asarray([sign * 1.7e308]), xp.ones(1))
    assert np.isfinite(host(merge(extreme, BlockStatistics(xp.ones((1, 1)), -extreme.m, extreme.l)).lse())).all()


def test_output_dtype(xp):
    state = BlockStatistics(xp.asarray([[1e6, 3.0]], dtype="float32"), xp.zeros(1, "float32"), xp.ones(1, "float32"))
    narrow = state.output(np.float16)
    assert narrow.dtype == np.float16
    assert host(narrow).tolist() == [[INF, 3.0]]
    assert state.output().dtype == np.float32
    assert state.output() is not state.acc


def test_merge_and_finish_leave_their_inputs_alone(xp):
    a, b = (random_state(np.random.default_rng(seed), xp) for seed in (1, 2))
    before = [host(getattr(s, f)).copy() for s in (a, b) for f in FIELDS]
    merged = merge(a, b)
    merged.output()[:] = 0
    after = [host(getattr(s, f)) for s in (a, b) for f in FIELDS]
    assert all(x.tobytes() == y.tobytes() for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("acc", "m", "l", "argument"),
    [
        (np.zeros((3, 2)), np.zeros(2), np.zeros(3), "m"),
        (np.zeros((3, 2)), np.zeros(3), np.zeros((3, 1)), "l"),
        (np.zeros((3, 2)), np.zeros(3, np.float32), np.zeros(3), "m"),
        (np.zeros((3, 2), np.float16), np.zeros(3, np.float16), np.zeros(3, np.float16), "acc"),
        (np.zeros((3, 2), np.int64), np.zeros(3, np.int64), np.zeros(3, np.int64), "acc"),
        (np.zeros(2), np.zeros(()), np.zeros(()), "m"),
        ([[0.0]], np.zeros(1), np.zeros(1), "acc"),
    ],
)
def test_arrays_that_are_no_state_are_refused(acc, m, l, argument):  # noqa: E741
    with pytest.raises(ArgumentError) as caught:
        BlockStatistics(acc, m, l)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    "other", [((5,), 2, "float64"), ((4,), 3, "float64"), ((4,), 2, "float32"), ((1, 4), 2, "float64")]
)
def test_states_of_other_rows_do_not_merge(xp, other):
    with pytest.raises(ArgumentError, match="state like a"):
        merge(BlockStatistics.empty((4,), 2, np.float64, xp), BlockStatistics.empty(*other, xp))


def test_cupy_is_found_by_its_arrays_and_libraries_do_not_mix(monkeypatch):
    class Device(np.lib.mixins.NDArrayOperatorsMixin):
        """As much of a CuPy array as the checks look at."""

        def __init__(self, shape):
            self.shape, self.dtype = shape, np.dtype("float64")

    fake = types.ModuleType("cupy")
    fake.ndarray = Device
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with pytest.raises(ArgumentError, match="Device"):
        array_namespace(Device((3,)))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    assert array_namespace(Device((3,))) is fake
    with pytest.raises(ArgumentError, match="one array library"):
        BlockStatistics(Device((3, 2)), np.zeros(3), np.zeros(3))
    on_device = BlockStatistics(Device((3, 2)), Device((3,)), Device((3,)))
    with pytest.raises(ArgumentError, match="state like a"):
        merge(BlockStatistics.empty((3,), 2, np.float64), on_device)
