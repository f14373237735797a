"""NaN, infinities and extreme scores in the CUDA kernels: they reach exactly the rows that see them."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_cases import TOLERANCE
from kernel_launches import (
    FAMILIES,
    SPAN,
    Case,
    by_family,
    case,
    close,
    empty_state,
    intervals,
    launch,
)

pytestmark = pytest.mark.usefixtures("gpu")


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
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_rows_without_any_weight_are_zero_whatever_values_they_see(family, bad):
    """All scores are minus infinity, in tiles that are wholly visible."""
    one = case(family, seed=19)
    one.q[..., 0], one.k[..., 0] = 1, -np.inf
    one.v[:, :, 5, 3] = bad
    for state in (None, empty_state(one, family, poisoned=True)):
        out, lse = launch(family, one, state=state, span=128 if state else SPAN)
        assert (out == 0).all()
        assert (lse == -np.inf).all()


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
