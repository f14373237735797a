"""Error reports: what is measured, where it is found, and above all what must not pass."""

import json
import warnings
from dataclasses import replace

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cqsa_arrays.comparison as compare_module
from cqsa_arrays.comparison import TOLERANCES, RowError, Tolerance, compare, compare_rows
from cqsa_arrays.errors import ArgumentError
from cqsa_arrays.reference import ReferenceRows

INF, NAN = np.inf, np.nan
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.fixture(params=[1 << 20, 60, 3], ids=["one block", "blocks", "pieces of rows"])
def block_elements(request, monkeypatch):
    monkeypatch.setattr(compare_module, "_BLOCK_ELEMENTS", request.param)


def random_array(shape=(2, 3, 50, 8), seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_equal_arrays_pass_with_no_error(block_elements):
    report = compare(random_array(), random_array())
    assert report.passed
    assert report.frobenius == report.worst_row.error == report.worst_element.error == 0
    assert (report.nans, report.infs, report.mismatches, report.rows) == (0, 0, 0, 300)


def test_measures_equal_their_definitions(block_elements):
    reference, noise = random_array(), random_array(seed=1)
    out = reference + 1e-4 * noise
    report = compare(out, reference, tolerance=1.0)
    assert report.frobenius == pytest.approx(np.linalg.norm(out - reference) / np.linalg.norm(reference), rel=1e-12)
    element = np.unravel_index(np.argmax(np.abs(out - reference)), out.shape)
    assert report.worst_element.index == element
    assert report.worst_element.got == out[element]
    assert report.worst_element.expected == reference[element]
    assert report.worst_element.error == abs(out[element] - reference[element])


def test_the_worst_row_is_relative_to_its_norm_or_the_median_of_its_neighbours():
    reference, noise = random_array(), random_array(seed=1)
    norms = np.linalg.norm(reference, axis=-1)
    errors = np.linalg.norm(1e-4 * noise, axis=-1) / np.maximum(norms, np.sort(norms)[..., 25:26])
    report = compare(reference + 1e-4 * noise, reference, tolerance=1.0)
    assert report.worst_row.index == np.unravel_index(np.argmax(errors), errors.shape)
    assert report.worst_row.error == pytest.approx(errors.max(), rel=1e-9)


@pytest.mark.parametrize("shape", [(7,), (300,), (1, 5), (4, 100), (3, 1, 2, 2), (2, 2, 2, 2, 100)])
def test_every_place_of_any_shape_is_read_and_named(block_elements, shape):
    reference = 1 + random_array(shape) ** 2
    for flat in np.linspace(0, reference.size - 1, 5).astype(int):
        index = np.unravel_index(flat, shape)
        out = reference.copy()
        out[index] += 1e3
        report = compare(out, reference)
        assert not report.passed
        assert report.worst_element.index == index
        assert report.worst_row.index == index[:-1]
        assert report.rows == reference[..., 0].size


@pytest.mark.parametrize("name", DTYPES)
def test_one_rounding_passes_and_ten_times_the_tolerance_fails(name):
    reference = random_array()
    assert compare(reference.astype(DTYPES[name]), reference).passed
    scaled = (reference * (1 + 10 * TOLERANCES[name].frobenius)).astype(DTYPES[name])
    report = compare(scaled, reference)
    assert not report.passed
    assert report.tolerance == TOLERANCES[name]


@pytest.mark.parametrize("name", DTYPES)
def test_one_wholly_wrong_row_cannot_hide(name):
    reference = random_array((1, 1, 20_000, 4))
    out = reference.copy()
    out[0, 0, 12_345] = 0
    report = compare(out, reference, tolerance=Tolerance(0.02))  # the norm alone would pass
    assert report.frobenius <= 0.02
    assert report.worst_row.index == (0, 0, 12_345)
    assert not report.passed
    assert not compare(out.astype(DTYPES[name]), reference).passed


def test_rows_small_by_cancellation_pass_and_heads_of_other_scale_are_judged_by_themselves():
    reference = random_array((1, 2, 400, 1))
    reference[0, 0, 7] = 1e-9
    assert compare((reference + 5e-8).astype(np.float32), reference).passed
    reference[0, 1] *= 1e-12
    out = reference.copy()
    out[0, 1, 9] = 0
    assert not compare(out, reference, tolerance=1e-3).passed


def test_all_zero_results_fail_and_zero_references_are_absolute():
    reference = random_array()
    for scale in (1, 1e-200, 1e200):
        report = compare(np.zeros_like(reference), scale * reference)
        assert report.frobenius == pytest.approx(1)
        assert not report.passed
    assert compare(np.zeros(5), np.zeros(5)).passed
    assert not compare(np.full(5, 1e-3), np.zeros(5)).passed
    assert compare(np.full(5, 1e-3), np.zeros(5), tolerance=1e-2).passed


def test_zero_rows_are_relative_to_their_neighbours():
    reference = 1e-6 * random_array((1, 1, 20, 8))
    reference[0, 0, :15] = 0
    assert compare(reference, reference).passed
    out = reference.copy()
    out[0, 0, 0, 0] = 1e-6
    report = compare(out, reference, tolerance=Tolerance(1.0 / 20))
    assert report.worst_row.index == (0, 0, 0)
    assert 0.1 < report.worst_row.error < 1


@pytest.mark.parametrize(
    ("got", "expected"),
    [(NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, INF), (INF, -INF), (NAN, INF), (INF, NAN), (NAN, 0.0)],
)
def test_what_is_not_finite_on_one_side_only_never_passes(block_elements, got, expected):
    out, reference = random_array(), random_array()
    out[1, 2, 3, 4], reference[1, 2, 3, 4] = got, expected
    report = compare(out, reference, tolerance=1e300)
    assert not report.passed
    assert report.mismatches == 1
    assert report.frobenius == report.worst_row.error == INF
    assert report.worst_element.index == (1, 2, 3, 4)
    assert report.worst_row.index == (1, 2, 3)
    np.testing.assert_equal([report.worst_element.got, report.worst_element.expected], [got, expected])


@pytest.mark.parametrize(("value", "nans", "infs"), [(NAN, 8, 0), (INF, 0, 8), (-INF, 0, 8)])
def test_what_is_not_finite_on_both_sides_agrees_and_is_reported(value, nans, infs):
    reference = random_array()
    reference[0, 1, 2] = value
    report = compare(reference, reference)
    assert report.passed
    assert (report.nans, report.infs, report.mismatches) == (nans, infs, 0)
    out = reference.copy()
    out[0, 0, 0, 0] += 1
    assert not compare(out, reference).passed
    assert compare(np.full(3, NAN), np.full(3, NAN)).nans == 3


def test_norms_beyond_float64_never_pass_and_nan_is_no_tolerance():
    huge = np.full((2, 4), 1.7e308)
    assert np.isnan(compare(huge / 2, huge).frobenius)
    assert not compare(huge / 2, huge).passed
    assert not compare(-huge, huge).passed
    with pytest.raises(ArgumentError, match="tolerance"):
        compare(huge, huge, tolerance=NAN)


@pytest.mark.parametrize(
    "change",
    [
        {"frobenius": NAN},
        {"worst_row": RowError((0, 0), NAN)},
        {"lse": RowError((0, 0), NAN)},
        {"mismatches": 1},
        {"frobenius": 2.1e-6},
        {"worst_row": RowError((0, 0), 2.1e-5)},
        {"lse": RowError((0, 0), 5.1e-6)},
    ],
    ids=str,
)
def test_each_measure_alone_can_fail_a_report(change):
    exact = rows_of_reference()
    good = compare_rows(exact.out, exact.lse, exact, "float32")
    assert good.passed
    assert not replace(good, **change).passed


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_report_passes_only_if_every_element_is_close_or_alike(data):
    value = st.floats(width=32) | st.just(1.0)
    out, reference = (np.array(data.draw(st.lists(value, min_size=12, max_size=12))).reshape(3, 4) for _ in range(2))
    if compare(out, reference, tolerance=1e-3).passed:
        finite = np.isfinite(reference)
        np.testing.assert_array_equal(out[~finite], reference[~finite])
        bound = 1e-3 * max(1, np.linalg.norm(reference[finite]))
        assert (np.abs(out[finite] - reference[finite]) <= bound).all()


def test_hdf5_memory_maps_and_device_arrays_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_module, "_BLOCK_ELEMENTS", 100)
    reference = random_array()
    out = reference.astype(np.float32)

    class OnDevice:
        """A CuPy array as seen here: sliced on the device, brought by ``get``, never converted implicitly."""

        shape, dtype, largest = out.shape, out.dtype, 0

        def __init__(self, array):
            self.array = array

        def __getitem__(self, index):
            return OnDevice(self.array[index])

        def __array__(self, *args, **kwargs):
            raise TypeError("implicit conversion")

        def get(self):
            OnDevice.largest = max(OnDevice.largest, self.array.size)
            return self.array

    mapped = np.memmap(tmp_path / "out", np.float32, "w+", shape=out.shape)
    mapped[:] = out
    with h5py.File(tmp_path / "out.h5", "w") as file:
        dataset = file.create_dataset("out", data=out)
        reports = [compare(array, reference) for array in (out, dataset, mapped, OnDevice(out))]
    assert reports[0].passed
    assert all(report == reports[0] for report in reports)
    assert 0 < OnDevice.largest <= 100
    assert compare([1.0, 2.0], [1.0, 2.0]).passed


@pytest.mark.parametrize(
    ("out", "reference", "argument"),
    [
        (np.ones((2, 3)), np.ones((3, 2)), "out"),
        (np.ones((2, 3)), np.ones(3), "out"),
        (np.ones((0, 3)), np.ones((0, 3)), "out"),
        (np.ones((3, 0)), np.ones((3, 0)), "out"),
        (np.ones(()), np.ones(()), "out"),
        (np.ones(3, int), np.ones(3), "dtype"),
    ],
)
def test_what_cannot_be_compared_is_refused(out, reference, argument):
    with pytest.raises(ArgumentError) as caught:
        compare(out, reference)
    assert caught.value.argument == argument


def rows_of_reference(seed=0):
    rng = np.random.default_rng(seed)
    rows = np.array([0, 40, 99])
    return ReferenceRows(rows, rng.normal(size=(2, 3, 3, 8)), rng.normal(scale=50, size=(2, 3, 3)))


def test_rows_within_tolerance_pass_with_the_log_sum_exp():
    exact = rows_of_reference()
    for name, dtype in DTYPES.items():
        for given_dtype in (name, dtype, np.dtype(dtype)):
            lse = exact.lse.astype(np.float64 if name == "float64" else np.float32)
            report = compare_rows(exact.out.astype(dtype), lse, exact, given_dtype, seed=5)
            assert report.passed
            assert (report.rows, report.seed, report.tolerance) == (18, 5, TOLERANCES[name])
    assert compare_rows(exact.out, None, exact, "float64").lse is None


def test_rows_are_named_by_token():
    exact = rows_of_reference()
    out, lse = exact.out.copy(), exact.lse.copy()
    out[1, 2, 1, 6] += 1
    lse[0, 1, 2] += 1
    report = compare_rows(out, lse, exact, "float32")
    assert report.worst_row.index == (1, 2, 40)
    assert report.worst_element.index == (1, 2, 40, 6)
    assert report.lse.index == (0, 1, 99)
    assert report.lse.error == pytest.approx(1 / max(1, abs(exact.lse[0, 1, 2])))


@pytest.mark.parametrize("got", [NAN, INF, -INF])
@pytest.mark.parametrize("expected", [NAN, INF, -INF, 0.5])
def test_a_log_sum_exp_that_is_not_finite_must_be_so_on_both_sides(got, expected):
    exact = rows_of_reference()
    exact.lse[0, 0, 0] = expected
    lse = exact.lse.copy()
    lse[0, 0, 0] = got
    report = compare_rows(exact.out, lse, exact, "float64")
    alike = got == expected or (np.isnan(got) and np.isnan(expected))
    assert report.passed == alike
    assert report.lse.error == (0 if alike else INF)


def test_only_the_log_sum_exp_wrong_fails():
    exact = rows_of_reference()
    assert not compare_rows(exact.out, exact.lse * (1 + 1e-4), exact, "float16").passed
    with pytest.raises(ArgumentError, match="lse"):
        compare_rows(exact.out, exact.lse[..., None], exact, "float16")
    with pytest.raises(ArgumentError, match="int32"):
        compare_rows(exact.out, None, exact, np.int32)


def test_reports_read_well_and_travel_as_strict_json():
    exact = rows_of_reference()
    good = compare_rows(exact.out, exact.lse, exact, "float32", seed=11)
    assert str(good).startswith(
        "PASSED: relative Frobenius error 0 (tolerance 2e-06) over 18 rows, sampled with seed 11"
    )
    out = exact.out.copy()
    out[1, 0, 2, 3] = NAN
    bad = compare_rows(out, None, exact, "float32")
    assert str(bad).startswith("FAILED")
    assert "worst element (1, 0, 99, 3): off by inf, got nan" in str(bad)
    assert "1 NaN, 0 inf; 1 not as in the reference" in str(bad)
    fields = json.loads(bad.to_json(), parse_constant=pytest.fail)
    assert fields["passed"] is False
    assert fields["worst_element"]["index"] == [1, 0, 99, 3]
    assert fields["worst_element"]["got"] == "nan"
    assert fields["tolerance"] == {"frobenius": 2e-6, "row": pytest.approx(2e-5), "lse": 5e-6}
    assert json.loads(good.to_json())["lse"]["error"] == 0
