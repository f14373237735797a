"""An output held against the same rows computed again on another device, both against float64."""

import h5py
import numpy as np
import pytest

from cqsa_arrays import ArgumentError, Options, StorageError, attention, causal
from cqsa_arrays.recomputation import compare_with_device

MASKS = {"full": None, "causal": causal(), "offset": causal(offset=-7)}


def made(folder, dtype, mask) -> str:
    rng = np.random.default_rng(0)
    with h5py.File(folder / "in.h5", "w") as file:
        for name, tokens in (("q", 900), ("k", 700), ("v", 700)):
            file[name] = rng.standard_normal((2, tokens, 24)).astype(dtype)
    sources = [f"{folder}/in.h5:/{name}" for name in "qkv"]
    out = str(folder / "out.h5")
    attention(*sources, mask=mask, device="cpu", out=out, options=Options(overwrite=True))
    return out


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_same_path_has_the_same_errors(tmp_path, dtype, mask) -> None:
    report = compare_with_device(made(tmp_path, dtype, mask), "cpu", rows=100, seed=3)
    assert report.passed
    assert len(report.rows) == 100
    assert report.again.frobenius == pytest.approx(report.stored.frobenius, rel=1e-6)
    assert "PASSED" in str(report)


@pytest.mark.parametrize(("change", "why"), [(1e-5, "less exact than the dtype"), (np.nan, "NaN never passes")])
def test_changed_rows_fail(tmp_path, change, why) -> None:
    out = made(tmp_path, "float32", None)
    with h5py.File(out, "r+") as file:
        file["out"][...] *= 1 + change
    report = compare_with_device(out, "cpu", rows=900)
    assert not report.passed, why
    assert report.again.passed
    assert "FAILED" in str(report)


def test_an_error_within_the_tolerance_but_far_above_the_other_path_fails(tmp_path) -> None:
    out = made(tmp_path, "float32", None)
    with h5py.File(out, "r+") as file:
        file["out"][...] = file["out"][...] * np.float32(1 + 1.9e-6)
    report = compare_with_device(out, "cpu", rows=900)
    assert report.stored.frobenius > 5 * report.again.frobenius + 0.1 * report.stored.tolerance.frobenius
    assert not report.passed


def test_what_cannot_be_compared_is_refused(tmp_path) -> None:
    out = made(tmp_path, "float32", None)
    with pytest.raises(ArgumentError, match="rows"):
        compare_with_device(out, "cpu", rows=0)
    with pytest.raises(ArgumentError, match="device"):
        compare_with_device(out, "abacus")
    with pytest.raises(ArgumentError, match="an output of cqsa attend"):
        compare_with_device(str(tmp_path / "in.h5"), "cpu")
    (tmp_path / "in.h5").rename(tmp_path / "gone.h5")
    with pytest.raises((ArgumentError, StorageError)):
        compare_with_device(out, "cpu")
