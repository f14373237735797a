"""Layouts: what is parsed, and that views go there and back without a copy."""

import numpy as np
import pytest
from storage_files import AXES, layout_shape, normal

from cqsa_arrays.errors import ArgumentError
from cqsa_arrays.storage import LAYOUTS, Layout, parse_layout


@pytest.mark.parametrize("name", LAYOUTS)
def test_logical_and_physical_views_are_inverse_and_copy_nothing(name):
    array = normal(layout_shape(name))
    logical = Layout(name).logical(array)
    assert logical.shape == tuple(AXES[axis] if axis in name else 1 for axis in "bhnd")
    assert np.shares_memory(logical, array)
    assert np.array_equal(Layout(name).physical(logical), array)
    assert Layout(name).physical_shape(logical.shape) == array.shape
    assert Layout(name).logical_shape(array.shape) == logical.shape


def test_logical_view_puts_every_element_where_its_axes_say():
    array = normal((2, 50, 3, 8))
    assert np.array_equal(Layout("bnhd").logical(array)[1, 2, 7], array[1, 7, 2])


@pytest.mark.parametrize(("rank", "name"), [(4, "bhnd"), (3, "hnd"), (2, "nd")])
def test_usual_layout_of_a_rank(rank, name):
    assert parse_layout(None, rank, "q").name == name


@pytest.mark.parametrize(("name", "outside"), [("bnhd", True), ("nhd", True), ("bhnd", False), ("nd", False)])
def test_tokens_outside_heads(name, outside):
    assert Layout(name).tokens_outside_heads is outside


@pytest.mark.parametrize(
    ("name", "shape"), [("bhnd", (2, 3, 50)), ("bnhd", (2, 3, 50)), ("hnd", (3, 50)), ("nhd", (3, 50)), ("nd", (50,))]
)
def test_log_sum_exp_has_tokens_last(name, shape):
    logical = tuple(AXES[axis] if axis in name else 1 for axis in "bhnd")
    assert Layout(name).lse_shape(logical) == shape


@pytest.mark.parametrize(
    ("name", "rank", "said"),
    [
        pytest.param("bdhn", 4, "unknown layout 'bdhn'", id="unknown"),
        pytest.param("BHND", 4, "unknown layout 'BHND'", id="capitals"),
        pytest.param("", 4, "unknown layout ''", id="empty"),
        pytest.param("bhn", 3, "unknown layout 'bhn'", id="log-sum-exp"),
        pytest.param("bhnd", 3, "found 3 dimensions; expected 4", id="rank"),
        pytest.param(None, 1, "found 1 dimensions", id="vector"),
        pytest.param(None, 5, "found 5 dimensions", id="five"),
    ],
)
def test_bad_layouts_are_named(name, rank, said):
    with pytest.raises(ArgumentError, match=said) as caught:
        parse_layout(name, rank, "k")
    assert caught.value.argument == "k"


def test_a_layout_without_batch_cannot_hold_two_batches():
    with pytest.raises(ArgumentError, match="2 batch"):
        Layout("hnd").physical_shape((2, 3, 50, 8))
