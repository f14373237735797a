"""Attributes of netCDF, MATLAB and others that give a data set another meaning: refused by name everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from command_line import run_command
from h5py import h5d, h5t
from storage_files import create_low_level, normal, qkv

import cqsa_arrays as cqsa
from cqsa_arrays import ArgumentError
from cqsa_arrays.storage import describe

X = normal((60, 8))


def marked(path: Path, array: np.ndarray = X, **attributes: object) -> Path:
    """q, k and v with attributes as h5py writes them."""
    qkv(path, array)
    with h5py.File(path, "r+") as file:
        for name, value in attributes.items():
            for one in "qkv":
                file[one].attrs[name] = value
    return path


VALUES = [
    ("scale_factor", np.float32(0.5)),
    ("scale_factor", np.array([0.5])),  # as netCDF4 writes it
    ("scale_factor", np.array([1.0, 2.0])),
    ("scale_factor", "0.5"),
    ("add_offset", 10.0),
    ("add_offset", np.nan),
    ("_FillValue", np.float32(9.96921e36)),
    ("_FillValue", np.float32(0)),
    ("missing_value", np.array([-999.0, np.nan])),
    ("valid_min", 0.0),
    ("valid_max", np.float32(1)),
    ("valid_range", np.array([-np.inf, 100.0])),
    ("_Unsigned", "true"),
    ("ScaleFactor", 2.0),  # HDF-EOS
    ("MissingValue", np.float32(-9999)),
    ("scale_factor", h5py.Empty("f4")),
]


def every_way(path: Path) -> list[Callable[[], object]]:
    """Each public way to inputs in the file ``path``, by name and as open h5py data sets."""

    def with_datasets(call: Callable[..., object]) -> object:
        with h5py.File(path) as file:
            return call(*(file[name] for name in "qkv"))

    named = [f"{path}:/{name}" for name in "qkv"]
    calls = (cqsa.attention, cqsa.plan, cqsa.statistics)
    ways = [lambda: cqsa.open(path), lambda: with_datasets(lambda q, k, v: cqsa.compare(q, X))]
    ways.append(lambda: with_datasets(lambda q, k, v: cqsa.compare(X, v)))
    ways += [lambda call=call: call(*named) for call in calls]
    return ways + [lambda call=call: with_datasets(call) for call in calls]


@pytest.mark.parametrize(("name", "value"), VALUES, ids=lambda one: str(one).replace("\n", " "))
def test_values_that_are_not_those_stored_are_refused_by_name(tmp_path, name, value):
    path = marked(tmp_path / "x.nc", **{name: value})
    for way in every_way(path):
        with pytest.raises(ArgumentError, match=rf"x\.nc:/[qv] with the attribute {name} = .*delete the attribute"):
            way()
    note = describe(path).datasets[0].note
    assert note is not None
    assert name in note


@pytest.mark.parametrize("program", ["plan", "attend", "info", "compare"])
def test_the_command_says_it_too(tmp_path, capsys, program):
    path = marked(tmp_path / "x.nc", scale_factor=0.5, add_offset=10.0)
    more = {"attend": ["-o", tmp_path / "out.h5"], "compare": [f"{path}:/k"]}.get(program, [])
    done = run_command(capsys, program, f"{path}:/q" if program == "compare" else path, *more)
    assert done.code == (0 if program == "info" else 2)
    assert "add_offset = 10.0 and scale_factor = 0.5" in done.out + done.err
    assert list(tmp_path.iterdir()) == [path]


def test_values_packed_into_integers_are_named_as_such(tmp_path):
    path = marked(tmp_path / "x.nc", X.astype("i2"), scale_factor=0.01)
    with pytest.raises(ArgumentError, match=r"scale_factor = 0\.01"):
        cqsa.open(path)


HARMLESS = {
    "scale_factor": np.array([1.0]), "add_offset": np.float32(0), "_FillValue": np.float32("nan"),
    "missing_value": np.array([np.nan, np.nan]), "valid_min": -np.inf, "valid_max": np.float64(1e300),
    "valid_range": np.array([-np.inf, np.inf]), "_Unsigned": "false", "units": "K",
    "actual_range": np.array([0.0, 1.0]), "DIMENSION_LABELS": ["tokens", "dim"], "TITLE": h5py.Empty("S1"),
}  # fmt: skip


def test_attributes_that_change_nothing_pass(tmp_path):
    """xarray writes a _FillValue of NaN to every variable."""
    opened = cqsa.open(marked(tmp_path / "x.nc", **HARMLESS))
    assert np.array_equal(opened.q[...], X)


def test_verify_refuses_inputs_whose_values_mean_something_else(tmp_path):
    """As outputs of earlier versions may name them: nothing of the file has changed since."""
    path = marked(tmp_path / "x.nc", add_offset=0.0)
    cqsa.attention(*(f"{path}:/{name}" for name in "qkv"), out=tmp_path / "out.h5")
    before = path.stat()
    with h5py.File(path, "r+") as file:
        file["k"].attrs.modify("add_offset", 3.0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(ArgumentError, match=r"k: .*add_offset = 3\.0"):
        cqsa.verify(tmp_path / "out.h5")


# ---- MATLAB, Octave


def test_axes_that_matlab_reverses_are_refused_unless_the_layout_is_named(tmp_path, capsys):
    path = marked(tmp_path / "x.mat", np.ascontiguousarray(X.T), MATLAB_class=np.bytes_(b"single"))
    says = r"x\.mat:/[qv] with the attribute MATLAB_class: stored as 8 x 60, shown by MATLAB as 60 x 8.*layout='nd'"
    for way in every_way(path):
        with pytest.raises(ArgumentError, match=says):
            way()
    assert "MATLAB_class" in str(describe(path))
    assert "--layout nd" in run_command(capsys, "plan", path).err

    opened = cqsa.open(path, layout="nd")
    assert opened.q.shape == (8, 60)
    expected = cqsa.attention(*(np.ascontiguousarray(X.T),) * 3)
    assert np.array_equal(cqsa.attention(opened.q, opened.k, opened.v), expected)
    with h5py.File(path) as file:
        assert np.array_equal(cqsa.attention(*(file[name] for name in "qkv"), layout="nd"), expected)
    assert run_command(capsys, "attend", path, "-o", tmp_path / "out.h5", "--layout", "nd").code == 0
    assert run_command(capsys, "verify", tmp_path / "out.h5").code == 0
    assert run_command(capsys, "compare", f"{path}:/q", f"{path}:/k", "--layout", "nd").code == 0


def test_an_attribute_layout_does_not_say_in_which_order_matlab_has_the_axes(tmp_path):
    path = marked(tmp_path / "x.mat", MATLAB_class=np.bytes_(b"single"), layout="nd")
    with pytest.raises(ArgumentError, match="MATLAB_class"):
        cqsa.open(path)


def test_other_arrays_of_matlab_are_refused_by_name(tmp_path):
    with h5py.File(tmp_path / "x.mat", "w") as file:
        file["q"] = np.array([0, 16], "u8")
        file["q"].attrs["MATLAB_class"] = np.bytes_(b"double")
        file["q"].attrs["MATLAB_empty"] = np.uint8(1)
        sparse = file.create_group("k")
        sparse["data"], sparse.attrs["MATLAB_sparse"] = np.ones(3), np.uint64(16)
    for name, says in (("q", "MATLAB_empty"), ("k", r"a sparse matrix of MATLAB.*full\(x\)")):
        with pytest.raises(ArgumentError, match=says):
            cqsa.plan(f"{tmp_path}/x.mat:/{name}", X, X)


def test_variables_of_octave_are_refused_by_name(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        group = file.create_group("q")
        group["value"], group.attrs["OCTAVE_NEW_FORMAT"] = X, np.uint8(1)
    with pytest.raises(ArgumentError, match=r"a variable of Octave .*x\.h5:/q/value"):
        cqsa.plan(f"{tmp_path}/x.h5:/q", X, X)
    with pytest.raises(ArgumentError, match=r"OCTAVE_NEW_FORMAT: stored as 60 x 8, shown by Octave as 8 x 60"):
        cqsa.plan(f"{tmp_path}/x.h5:/q/value", X, X)
    assert cqsa.plan(f"{tmp_path}/x.h5:/q/value", X, X, layout="nd")


# ---- layouts


@pytest.mark.parametrize(
    "value", ["NCHW", "bhnd", "", 5, b"dn", np.array([1, 2]), ["nd", "nd"], h5py.Empty("f4"), np.nan]
)
def test_a_foreign_attribute_layout_is_named_and_overridden(tmp_path, capsys, value):
    path = marked(tmp_path / "x.h5", layout=value)
    says = r"q: found the attribute layout = .* of .*x\.h5:/q, .*one of bhnd, bnhd, hnd, nhd, nd.*layout=\.\.\."
    with pytest.raises(ArgumentError, match=says):
        cqsa.open(path)
    with pytest.raises(ArgumentError, match=says):
        cqsa.plan(f"{path}:/q", X, X)
    assert cqsa.open(path, layout="nd").q.shape == X.shape
    with h5py.File(path) as file:
        assert cqsa.plan(*(file[name] for name in "qkv"), layout="nd")
    assert run_command(capsys, "plan", path, "--layout", "nd").code == 0


def test_an_attribute_layout_may_be_an_array_of_one_text(tmp_path):
    assert cqsa.open(marked(tmp_path / "x.h5", normal((10, 2, 8)), layout=["nhd"])).q.layout.name == "nhd"


# ---- opaque values of two bytes


def opaque(path: Path, tag: bytes, **attributes: str) -> Path:
    stored = h5t.create(h5t.OPAQUE, 2)
    stored.set_tag(tag)
    with h5py.File(path, "w") as file:
        for name in "qkv":
            made = create_low_level(file, name, stored, X.shape, h5d.CONTIGUOUS, h5d.ALLOC_TIME_EARLY)
            bits = X.astype(ml_dtypes.bfloat16).view("V2")
            made.id.write(h5py.h5s.ALL, h5py.h5s.ALL, bits, stored)
            made.attrs.update(attributes)
    return path


@pytest.mark.parametrize(
    ("tag", "attributes"), [(b"", {}), (b"bfloat16", {}), (b"BFLOAT16", {}), (b"bits", {"dtype": "bfloat16"})]
)  # fmt: skip
def test_opaque_values_that_are_said_to_be_bfloat16_are_read(tag, attributes, tmp_path):
    q = cqsa.open(opaque(tmp_path / "x.h5", tag, **attributes)).q
    assert q.dtype == ml_dtypes.bfloat16
    assert np.array_equal(q[...], X.astype(ml_dtypes.bfloat16))
    assert ("opaque values taken for bfloat16" in str(cqsa.plan(q, q, q))) == (not attributes and not tag)


@pytest.mark.parametrize(
    ("tag", "attributes"),
    [(b"RGB565", {}), (b"NUMPY:<i2", {}), (b"", {"dtype": "int16"}), (b"bfloat16", {"dtype": "u2"})],
)
def test_other_opaque_values_are_refused_by_name(tag, attributes, tmp_path):
    path = opaque(tmp_path / "x.h5", tag, **attributes)
    says = f"q: found opaque values of 2 bytes in /q, tagged '{tag.decode()}'.*say so by the attribute dtype='bfloat16'"
    with pytest.raises(ArgumentError, match=says):
        cqsa.open(path)


# ---- files that the programs themselves wrote


def test_files_of_xarray_and_netcdf4(tmp_path):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("netCDF4")
    variables = xarray.Dataset(dict.fromkeys("qkv", (("tokens", "dim"), X)))
    variables.to_netcdf(tmp_path / "plain.nc")
    assert np.array_equal(cqsa.open(tmp_path / "plain.nc").q[...], X)
    packed = {name: {"scale_factor": 0.5, "dtype": "f4", "_FillValue": np.float32(1e20)} for name in "qkv"}
    variables.to_netcdf(tmp_path / "packed.nc", encoding=packed)
    with pytest.raises(ArgumentError, match=r"_FillValue = .* and scale_factor = 0\.5"):
        cqsa.open(tmp_path / "packed.nc")
