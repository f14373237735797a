"""NaN, infinities, rows without keys, extreme scores: each reaches exactly the rows and columns that see it."""

import numpy as np
import pytest
from kernel_cases import FIELDS, FULL, RUNS, blocks_of, check_exact, exact, normal, run_fast, run_simply, same_bits

from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.kernels.base import KeyBlock

INF, NAN = np.inf, np.nan
DTYPES = ("float32", "float64")
ROWS, TOKENS, HEAD_DIM, VALUE_DIM = 200, 200, 6, 11
# Keys at the borders of panels and blocks, and inside of them.
PLACES = (0, 1, 47, 48, 60, 95, 96, 130, 191, 192, 199)
# Cuts of the 200 keys, and the order in which the pieces come.
CUTS = {"one": ((), (0,)), "two": ((96,), (0, 1)), "four-backwards": ((1, 60, 131), (3, 2, 1, 0))}
by_place_and_cut = pytest.mark.parametrize(
    ("place", "cut"),
    [(place, cut) for i, place in enumerate(PLACES) for cut in ("one", ("two", "four-backwards")[i % 2])],
)


@pytest.fixture(params=RUNS)
def run(request):
    return RUNS[request.param]


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture
def arrays(dtype):
    rng = np.random.default_rng(88)
    shapes = ((ROWS, HEAD_DIM), (TOKENS, HEAD_DIM), (TOKENS, VALUE_DIM))
    return [normal(rng, 1, 2, *shape, dtype=dtype) for shape in shapes]


def attend(run, queries, keys, values, cut="one", *, diagonal=0, scale=0.4, state=None):
    ends, order = CUTS[cut]
    pieces = blocks_of(keys, values, ends)
    blocks = [pieces[i] for i in order]
    return run(queries, 0, blocks, diagonal=diagonal, scale=scale, state=state)


def check_only(state, clean, spoilt):
    """Outputs where ``spoilt`` (rows, Dv) are NaN, all others have the bits of the clean run."""
    out = state.output()[0, 1]
    assert np.isnan(out[spoilt]).all()
    assert (out[~spoilt] == clean.output()[0, 1][~spoilt]).all()
    assert np.isfinite(out[~spoilt]).all()
    assert same_bits(*(BlockStatistics(s.acc[:, :1], s.m[:, :1], s.l[:, :1]) for s in (state, clean)))  # the other head


@by_place_and_cut
def test_nan_in_a_key_reaches_the_rows_that_see_it(run, arrays, place, cut):
    queries, keys, values = arrays
    clean = attend(run, *arrays, cut)
    keys[0, 1, place, 3] = NAN
    state = attend(run, queries, keys, values, cut)
    seeing = np.arange(ROWS) >= place
    check_only(state, clean, np.broadcast_to(seeing[:, None], (ROWS, VALUE_DIM)))
    assert (np.isnan(state.lse()[0, 1]) == seeing).all()


@by_place_and_cut
def test_nan_in_a_value_reaches_its_column_in_the_rows_that_see_it(run, arrays, place, cut):
    queries, keys, values = arrays
    clean = attend(run, *arrays, cut)
    values[0, 1, place, 7] = NAN
    state = attend(run, queries, keys, values, cut)
    seeing = (np.arange(ROWS) >= place)[:, None] & (np.arange(VALUE_DIM) == 7)
    check_only(state, clean, seeing)
    assert (state.lse() == clean.lse()).all()


@pytest.mark.parametrize("sign", [1, -1], ids=["+inf", "-inf"])
@by_place_and_cut
def test_infinite_value_reaches_its_column_in_the_rows_that_see_it(run, arrays, place, cut, sign):
    queries, keys, values = arrays
    clean = attend(run, *arrays, cut).output()[0, 1]
    values[0, 1, place, VALUE_DIM - 1] = sign * INF
    out = attend(run, queries, keys, values, cut).output()[0, 1]
    seeing = (np.arange(ROWS) >= place)[:, None] & (np.arange(VALUE_DIM) == VALUE_DIM - 1)
    assert (out[seeing] == sign * INF).all()
    assert (out[~seeing] == clean[~seeing]).all()


@pytest.mark.parametrize("row", PLACES)
def test_nan_in_a_query_stays_in_its_row(run, arrays, row):
    queries, keys, values = arrays
    clean = attend(run, *arrays, "two")
    queries[0, 1, row, 0] = NAN
    spoilt = np.broadcast_to((np.arange(ROWS) == row)[:, None], (ROWS, VALUE_DIM))
    check_only(attend(run, queries, keys, values, "two"), clean, spoilt)


@pytest.mark.parametrize("diagonal", [0, 100, FULL], ids=["causal", "ahead", "full"])
@pytest.mark.parametrize("place", PLACES)
def test_plus_infinite_score_makes_nan_rows_and_minus_infinite_none(run, arrays, place, diagonal):
    """An infinite key: +inf for queries on its side, -inf, which is as if it were not there, for the others."""
    queries, keys, values = arrays
    keys[0, 1, place] = 0
    keys[0, 1, place, 2] = INF
    state = attend(run, queries, keys, values, diagonal=diagonal)
    sees = np.arange(ROWS) + diagonal >= place
    nan_rows = sees & (queries[0, 1, :, 2] > 0)
    out = state.output()[0, 1]
    assert np.isnan(out[nan_rows]).all()
    assert np.isnan(state.lse()[0, 1, nan_rows]).all()
    # The others are as without the infinite key; those that see no other are 0.
    blocks = [KeyBlock(a, keys[:, 1:, a:b], values[:, 1:, a:b]) for a, b in ((0, place), (place + 1, TOKENS))]
    wanted_out, wanted_lse = (x[0, 0] for x in exact(queries[:, 1:], 0, blocks, diagonal=diagonal, scale=0.4))
    assert (out[~nan_rows & (wanted_lse == -INF)] == 0).all()
    np.testing.assert_allclose(out[~nan_rows], wanted_out[~nan_rows], rtol=0, atol=2e-6)
    np.testing.assert_allclose(state.lse()[0, 1, ~nan_rows], wanted_lse[~nan_rows], rtol=0, atol=2e-6)


def test_infinite_scores_leave_the_documented_state(run, dtype):
    """m, l, acc as the table in ``statistics`` says: all -inf, some -inf, one +inf."""
    queries = np.ones((1, 1, 1, 1), dtype)
    for scores, m, normalizer, acc in (
        ([-INF, -INF], -INF, 0, 0),
        ([-INF] * 200, -INF, 0, 0),
        ([-INF, 2.0, -INF], 2, 1, 3),
        ([-INF] * 150 + [2.0] + [-INF] * 150, 2, 1, 3),
        ([2.0, INF], INF, NAN, NAN),
        ([INF] + [2.0] * 150, INF, NAN, NAN),
    ):
        keys = np.array(scores, dtype).reshape(1, 1, -1, 1)
        state = run(queries, 0, [KeyBlock(0, keys, np.full_like(keys, 3))], diagonal=FULL, scale=1.0)
        np.testing.assert_array_equal([state.m.item(), state.l.item(), state.acc.item()], [m, normalizer, acc])


@pytest.mark.parametrize("place", [0, 60, 39_000], ids=["first", "first-span", "second-span"])
@pytest.mark.parametrize("what", ["key", "value", "inf-score"])
def test_nan_stays_through_every_later_block_and_span(dtype, what, place):
    rng = np.random.default_rng(5)
    queries, keys, values = (normal(rng, 1, 1, n, 2, dtype=dtype) for n in (3, 70_000, 70_000))
    queries = np.abs(queries)
    (values if what == "value" else keys)[0, 0, place, 1] = INF if what == "inf-score" else NAN
    state = run_fast(queries, 0, blocks_of(keys, values, (50_000,)), diagonal=FULL, scale=0.1)
    out = state.output()[0, 0]
    assert np.isnan(out[:, 1]).all()
    assert (np.isnan(out[:, 0]) == (what != "value")).all()
    later = run_fast(queries, 0, blocks_of(keys[:, :, :5], np.ones_like(values[:, :, :5])), diagonal=FULL, scale=0.0)
    again = run_fast(queries, 0, blocks_of(keys[:, :, -5:], values[:, :, -5:]), diagonal=FULL, scale=0.1, state=state)
    assert np.isnan(again.output()[0, 0, :, 1]).all()
    assert np.isnan(state.merge(later).output()[0, 0, :, 1]).all()


def odd_state(rng, rows, value_dim, dtype):
    """A state whose bits are easily lost: -0.0, denormals, NaN with a payload, infinities, rows that saw no key."""
    acc, m, normalizer = (normal(rng, 1, 1, *shape, dtype=dtype) for shape in ((rows, value_dim), (rows,), (rows,)))
    tiny = np.finfo(dtype).smallest_subnormal
    acc[0, 0, ::2, 0], acc[0, 0, ::3, 0], acc[0, 0, ::5, 0], m[0, 0, ::7] = -0.0, tiny, INF, -INF
    normalizer[0, 0, ::7], acc[0, 0, ::7] = 0, 0
    payload = np.array([0x7FC12345 if dtype == "float32" else 0x7FF8000000012345], f"u{np.dtype(dtype).itemsize}")
    acc[0, 0, 1], normalizer[0, 0, 1] = payload.view(dtype)[0], payload.view(dtype)[0]
    return BlockStatistics(acc, m, normalizer)


@pytest.mark.parametrize(
    ("first_token", "diagonal"), [(0, -200), (0, -100), (100, 0), (1000, 0)], ids=["none", "half", "later", "far"]
)
def test_rows_that_see_no_key_keep_the_bits_of_their_state(run, dtype, first_token, diagonal):
    rng = np.random.default_rng(6)
    before = odd_state(rng, ROWS, 3, dtype)
    queries, keys, values = (normal(rng, 1, 1, n, width, dtype=dtype) for n, width in ((ROWS, 4), (90, 4), (90, 3)))
    keys[0, 0, 4], values[0, 0, 4] = NAN, NAN
    blocks = [KeyBlock(first_token, keys, values)]
    after = run(queries, 0, blocks, diagonal=diagonal, scale=1.0, state=before)
    blind = np.arange(ROWS) + diagonal < first_token
    assert blind.any()
    for field in FIELDS:
        assert getattr(after, field)[0, 0, blind].tobytes() == getattr(before, field)[0, 0, blind].tobytes()


@pytest.mark.parametrize("keys_seen", [1, 96, 500])
def test_rows_whose_scores_are_all_minus_infinite_keep_the_bits_of_their_state(run, dtype, keys_seen):
    rng = np.random.default_rng(7)
    before = odd_state(rng, 60, 3, dtype)
    queries, values = np.ones((1, 1, 60, 2), dtype), normal(rng, 1, 1, keys_seen, 3, dtype=dtype)
    keys = np.full((1, 1, keys_seen, 2), -INF, dtype)
    after = run(queries, 0, [KeyBlock(0, keys, values)], diagonal=FULL, scale=1.0, state=before)
    assert same_bits(after, before)


def test_a_row_that_sees_only_minus_infinity_at_first_is_exact_later(run, dtype):
    rng = np.random.default_rng(8)
    queries, keys, values = (normal(rng, 1, 1, n, 2, dtype=dtype) for n in (60, 400, 400))
    queries = np.abs(queries)
    keys[0, 0, :200] = -INF
    state = run(queries, 0, blocks_of(keys, values), diagonal=FULL, scale=1.0)
    wanted = exact(queries, 0, blocks_of(keys[:, :, 200:], values[:, :, 200:]), diagonal=FULL, scale=1.0)
    check_exact(state, *wanted, tolerance={"float32": 2e-6, "float64": 2e-14}[dtype])


@pytest.mark.parametrize("base", [10_000, -10_000, 0], ids=["1e4", "-1e4", "mixed"])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_scores_of_ten_thousand(run, dtype, base, scale):
    """Scores are small integers around ``base`` (or both around 1e4 and -1e4), so that float32 holds them exactly."""
    rng = np.random.default_rng(9)
    queries, keys = np.ones((1, 1, 60, 2), dtype), np.zeros((1, 1, 300, 2), dtype)
    queries[..., 0] = rng.integers(1, 3, (1, 1, 60))
    keys[..., 0] = rng.integers(-4, 5, 300)
    keys[..., 1] = base or rng.choice([-10_000, 10_000], 300)
    values = normal(rng, 1, 1, 300, 4, dtype=dtype)
    blocks = blocks_of(keys, values, (100,))
    for diagonal in (FULL, 0):
        wanted = exact(queries, 0, blocks, diagonal=diagonal, scale=scale)
        check_exact(run(queries, 0, blocks, diagonal=diagonal, scale=scale), *wanted)


def test_growing_and_falling_scores(run, dtype):
    """Every block raises the maximum by far, so that all before it weighs nothing; and the other way round."""
    queries = np.ones((1, 1, 50, 1), dtype)
    values = normal(np.random.default_rng(10), 1, 1, 500, 3, dtype=dtype)
    for keys in (np.arange(500), -np.arange(500), np.arange(500) // 100 * 200, np.arange(500) % 2 * 150 - 75):
        blocks = blocks_of(keys.astype(dtype).reshape(1, 1, 500, 1), values)
        wanted = exact(queries, 0, blocks, diagonal=100, scale=1.0)
        check_exact(run(queries, 0, blocks, diagonal=100, scale=1.0), *wanted)


@pytest.mark.parametrize("scale", [0.0, -0.3, -1.0, 1e-30])
def test_scales(run, arrays, dtype, scale):
    state = attend(run, *arrays, "two", scale=scale)
    queries, keys, values = arrays
    check_exact(state, *exact(queries, 0, blocks_of(keys, values), diagonal=0, scale=scale))
    if scale == 0:
        counts = np.exp(state.m.astype("f8")) * state.l
        np.testing.assert_allclose(counts[0, 0], np.arange(1, ROWS + 1), rtol=4 * np.finfo(dtype).eps)


def test_denormal_inputs_are_not_flushed(run, dtype):
    """Denormal values average exactly; denormal queries and keys score 0 or next to it."""
    tiny = np.finfo(dtype).smallest_subnormal
    ones = np.ones((1, 1, 60, 1), dtype)
    values = np.full((1, 1, 128, 2), 1000 * tiny, dtype)
    values[:, :, ::2] *= 3
    state = run(ones * tiny, 0, [KeyBlock(0, np.ones((1, 1, 128, 1), dtype), values)], diagonal=FULL, scale=1.0)
    assert (np.abs(state.output() - 2000 * tiny) <= tiny).all()
    count = np.log(np.array(128, dtype))
    assert (state.m == count).all()
    state = run(ones, 0, [KeyBlock(0, np.full((1, 1, 128, 1), tiny, dtype), values)], diagonal=FULL, scale=1.0)
    assert (state.m == count).all()
    np.testing.assert_allclose(state.l, 1, rtol=np.finfo(dtype).eps)


def test_tiny_weights(run, dtype):
    """A weight is exact down to 2^-100 (2^-960 in float64); below that it is the true one or 0, never NaN."""
    smallest = {"float32": 2.0**-100, "float64": 2.0**-960}[dtype]
    queries = np.ones((1, 1, 1, 1), dtype)
    for gap in -np.log(smallest) * np.linspace(0.8, 1.6, 80):
        keys = np.array([0, -gap], dtype).reshape(1, 1, 2, 1)
        values = np.array([0, 1], dtype).reshape(1, 1, 2, 1)
        out = run(queries, 0, [KeyBlock(0, keys, values)], diagonal=FULL, scale=1.0).output().item()
        wanted = np.exp(float(keys[0, 0, 1, 0]))
        if wanted > smallest * 1.01:
            assert abs(out - wanted) <= {"float32": 1e-5, "float64": 3e-13}[dtype] * wanted
        else:
            assert 0 <= out <= smallest * 1.01


@pytest.mark.parametrize("width", [1, 2, 5, 8, 48, 49, 96])
def test_hidden_nan_and_infinity_do_no_harm(run, dtype, width):
    """Keys and values past the diagonal may hold anything: only the first ``width`` keys are ever seen."""
    rng = np.random.default_rng(11)
    queries, keys, values = (normal(rng, 2, 1, n, 5, dtype=dtype) for n in (130, 300, 300))
    for wild in (NAN, INF, -INF):
        keys[:, :, width:], values[:, :, width:] = wild, wild
        blocks = blocks_of(keys, values)
        # Row r of 130 sees the keys j <= r + diagonal: the last one sees ``width`` keys, earlier ones fewer.
        diagonal = width - 130
        state = run(queries, 0, blocks, diagonal=diagonal, scale=0.5)
        wanted = exact(queries, 0, blocks_of(keys[:, :, :width], values[:, :, :width]), diagonal=diagonal, scale=0.5)
        check_exact(state, *wanted)


def test_the_plain_kernel_and_the_fast_one_agree_on_special_values(dtype):
    """Random mixtures: the same outputs are NaN, the same infinite, the rest is close."""
    rng = np.random.default_rng(12)
    for _ in range(30):
        queries, keys, values = (normal(rng, 1, 2, n, 3, dtype=dtype) for n in (120, 230, 230))
        for array in (queries, keys, values):
            flat = array.reshape(-1)
            flat[rng.integers(0, flat.size, 2)] = rng.choice([NAN, INF, -INF, 0.0, -0.0], 2)
        blocks = blocks_of(keys, values, (int(rng.integers(1, 229)),))
        arguments = {"diagonal": int(rng.integers(-100, 200)), "scale": 0.3}
        fast, simple = (r(queries, 0, blocks, **arguments) for r in (run_fast, run_simply))
        np.testing.assert_allclose(fast.output(), simple.output(), rtol=0, atol=2e-6)
        np.testing.assert_allclose(fast.lse(), simple.lse(), rtol=0, atol=2e-6)
