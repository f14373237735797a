"""The float64 reference against the textbook formula, and every documented case at the edge."""

import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cqsa_arrays.errors import ArgumentError
from cqsa_arrays.masks import Causal, Full
from cqsa_arrays.ranges import Range
from cqsa_arrays.reference import reference_rows, sample_rows

INF, NAN = np.inf, np.nan


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@dataclass
class InMemory:
    """Token blocks of one array, which checks how it is asked and counts the tokens read."""

    array: np.ndarray
    tokens_read: list = field(default_factory=list)

    @property
    def shape(self):
        return self.array.shape

    def read(self, batch, heads, tokens, out):
        assert out.dtype == np.float64
        assert out.flags.c_contiguous
        assert out.shape == (len(batch), len(heads), len(tokens), self.shape[3])
        out[:] = self.array[batch.slice, heads.slice, tokens.slice]
        self.tokens_read.append(tokens)


@dataclass
class Window:
    """Row r sees the keys from r - left to r."""

    left: int

    def keys_of(self, row, key_tokens):
        stop = min(row + 1, key_tokens)
        return Range(min(max(0, row - self.left), stop), stop)


def dense_attention(q, k, v, mask, scale):
    """The textbook: all scores of all rows, one row and its visible keys at a time."""
    group = q.shape[1] // k.shape[1]
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -INF)
    with np.errstate(all="ignore"):
        for b, h, row in np.ndindex(*q.shape[:3]):
            seen = mask.keys_of(row, k.shape[2]).slice
            scores = scale * (k[b, h // group, seen] @ q[b, h, row])
            if len(scores) and not (scores == -INF).all():
                weights = np.exp(scores - scores.max())
                out[b, h, row] = weights @ v[b, h // group, seen] / weights.sum()
                lse[b, h, row] = scores.max() + np.log(weights.sum())
    return out, lse


def random_qkv(seed, batch=2, heads=4, key_heads=2, queries=30, keys=37, dim=5, value_dim=3):
    rng = np.random.default_rng(seed)
    shapes = (batch, heads, queries, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, value_dim)
    return [rng.normal(scale=2, size=shape) for shape in shapes]


def reference(q, k, v, rows=None, *, mask=None, scale=0.7, **options):
    rows = np.arange(q.shape[2]) if rows is None else rows
    return reference_rows(InMemory(q), InMemory(k), InMemory(v), rows, mask=mask or Full(), scale=scale, **options)


def assert_matches(found, dense, rows=slice(None)):
    np.testing.assert_allclose(found.out, dense[0][:, :, rows], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.lse, dense[1][:, :, rows], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("block_tokens", [1, 5, 37, 4096])
@pytest.mark.parametrize(
    "mask", [Full(), Causal(), Causal(7), Causal(-12), Causal(-100), Window(4), Window(0)], ids=repr
)
def test_streamed_rows_equal_the_textbook(mask, block_tokens):
    q, k, v = random_qkv(0)
    found = reference(q, k, v, mask=mask, block_tokens=block_tokens)
    assert found.out.dtype == found.lse.dtype == np.float64
    assert found.rows.tolist() == list(range(30))
    assert_matches(found, dense_attention(q, k, v, mask, 0.7))


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.lists(st.integers(0, 29), min_size=1, max_size=12),
    block_tokens=st.integers(1, 50),
    heads=st.sampled_from([(1, 1), (3, 3), (6, 2), (4, 1)]),
    offset=st.integers(-35, 40),
)
def test_any_rows_blocks_heads_and_offset(seed, rows, block_tokens, heads, offset):
    q, k, v = random_qkv(seed, heads=heads[0], key_heads=heads[1])
    found = reference(q, k, v, np.array(rows), mask=Causal(offset), block_tokens=block_tokens)
    assert_matches(found, dense_attention(q, k, v, Causal(offset), 0.7), rows)


def test_more_rows_than_pass_at_once():
    q, k, v = random_qkv(1, batch=1, queries=301, keys=11)
    assert_matches(reference(q, k, v, mask=Causal()), dense_attention(q, k, v, Causal(), 0.7))


def test_large_scores_do_not_overflow():
    q, k, v = random_qkv(2)
    found = reference(q, k, v, scale=1e4)
    assert np.isfinite(found.out).all()
    assert np.abs(found.lse).max() > 1e4
    assert_matches(found, dense_attention(q, k, v, Full(), 1e4))


def test_rows_without_a_visible_key_are_zero_and_minus_inf():
    found = reference(*random_qkv(3), mask=Causal(-12))
    assert (found.out[:, :, :12] == 0).all()
    assert (found.lse[:, :, :12] == -INF).all()
    assert (found.lse[:, :, 12:] > -INF).all()


def test_rows_of_only_minus_inf_scores_are_zero_even_with_nan_values():
    q, k, v = random_qkv(4)
    q[..., 0], k[:], v[0] = 1.0, 0.0, NAN
    k[..., 0] = -INF
    found = reference(q, k, v)
    assert (found.out == 0).all()
    assert (found.lse == -INF).all()


@pytest.mark.parametrize("block_tokens", [4, 4096])
@pytest.mark.parametrize("where", ["k", "v", "both"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_hidden_keys_never_touch_a_row_and_visible_ones_follow_the_formula(poison, where, block_tokens):
    q, k, v = random_qkv(5, queries=37)
    clean = dense_attention(q, k, v, Causal(), 0.7)
    if where != "v":
        k[:, :, 20] = poison
    if where != "k":
        v[:, :, 20, 1] = poison
    found = reference(q, k, v, mask=Causal(), block_tokens=block_tokens)
    np.testing.assert_allclose(found.out[:, :, :20], clean[0][:, :, :20], rtol=1e-12)
    assert_matches(found, dense_attention(q, k, v, Causal(), 0.7))
    assert not np.isfinite(found.out[:, :, 20:]).all()


def test_nan_and_inf_scores_make_rows_nan_and_minus_inf_weighs_nothing():
    q, k, v = np.ones((1, 1, 1, 1)), np.zeros((1, 1, 3, 1)), np.arange(3.0).reshape(1, 1, 3, 1)
    for score, out, lse in ((NAN, NAN, NAN), (INF, NAN, NAN), (-INF, 0.5, np.log(2))):
        k[0, 0, 2] = score
        found = reference(q, k, v, scale=1.0)
        np.testing.assert_allclose([found.out.item(), found.lse.item()], [out, lse], rtol=1e-15)


def test_visible_weight_zero_times_inf_is_nan():
    q, k = np.ones((1, 1, 1, 1)), np.array([0.0, -1e5]).reshape(1, 1, 2, 1)
    assert np.isnan(reference(q, k, np.array([1.0, INF]).reshape(1, 1, 2, 1), scale=1.0).out).all()


def test_reads_are_bounded_and_leave_out_what_no_row_sees():
    q, k, v = (InMemory(array) for array in random_qkv(6, batch=1, heads=1, key_heads=1, queries=90, keys=90))
    rows = np.array([3, 4, 5, 80])
    reference_rows(q, k, v, rows, mask=Window(4), scale=1.0, block_tokens=10)
    assert q.tokens_read == [Range(3, 6), Range(80, 81)]
    assert v.tokens_read == [Range(0, 10), Range(70, 80), Range(80, 81)]
    assert k.tokens_read == 2 * v.tokens_read


@pytest.mark.parametrize(
    ("tokens", "count"), [(1, 1), (1, 5), (2, 1), (3, 2), (10, 4), (10, 9), (10, 50), (2**40, 256)]
)
def test_sampled_rows(tokens, count):
    rows = sample_rows(tokens, count, seed=3)
    assert rows.dtype == np.int64
    assert len(rows) == min(tokens, max(count, 2))
    assert (np.diff(rows) > 0).all()
    assert rows[0] == 0
    assert rows[-1] == tokens - 1
    assert (rows == sample_rows(tokens, count, seed=3)).all()


def test_the_seed_chooses_the_rows():
    assert (sample_rows(1000, 20, seed=1) != sample_rows(1000, 20, seed=2)).any()
    chosen = np.concatenate([sample_rows(6, 3, seed) for seed in range(100)])
    assert set(chosen.tolist()) == set(range(6))


@pytest.mark.parametrize(("tokens", "count"), [(0, 5), (5, 0), (-1, 5), (5, -1)])
def test_no_rows_to_sample(tokens, count):
    with pytest.raises(ArgumentError):
        sample_rows(tokens, count, seed=0)


@pytest.mark.parametrize("rows", [[], [30], [-1], [[1]], [1.5], [True]])
def test_rows_that_are_none_are_refused(rows):
    with pytest.raises(ArgumentError, match="rows"):
        reference(*random_qkv(0), np.array(rows))


@pytest.mark.parametrize("change", [{"heads": 3}, {"key_heads": 0}], ids=["no multiple", "no key heads"])
def test_head_counts_that_do_not_fit_are_refused(change):
    with pytest.raises(ArgumentError, match="multiple of Hkv"):
        reference(*random_qkv(0, **change), np.array([0]))


@pytest.mark.parametrize(("index", "axis"), [(0, 0), (0, 3), (1, 0), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2)])
def test_shapes_that_do_not_fit_are_refused(index, axis):
    arrays = random_qkv(0)
    arrays[index] = arrays[index].take([0], axis=axis)
    with pytest.raises(ArgumentError, match="shapes"):
        reference(*arrays, np.array([0]))


def test_arguments_that_are_not_four_dimensional_or_blocks_of_nothing_are_refused():
    q, k, v = random_qkv(0)
    with pytest.raises(ArgumentError, match="shapes"):
        reference(q, k[0], v, np.array([0]))
    with pytest.raises(ArgumentError, match="block_tokens"):
        reference(q, k, v, np.array([0]), block_tokens=0)
