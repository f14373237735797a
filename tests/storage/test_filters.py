"""Data compressed by filters that HDF5 has not here: named with the remedy, before anything is read."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from command_line import environment, run_command
from h5py import h5d, h5p, h5s, h5t, h5z
from storage_files import normal

import cqsa_arrays as cqsa
from cqsa_arrays import StorageError
from cqsa_arrays.storage import describe

X = normal((100, 16))
ZSTD, BLOSC, MADE_UP = 32015, 32001, 40000


def filtered(path: Path, *filters: int, mask: int = 0) -> Path:
    """q, k and v in one chunk that says that it passed through ``filters``, except for those in ``mask``."""
    with h5py.File(path, "w") as file:
        for name in "qkv":
            properties = h5p.create(h5p.DATASET_CREATE)
            properties.set_chunk(X.shape)
            for code in filters:
                properties.set_filter(code, h5z.FLAG_OPTIONAL, (3,))
            made = h5d.create(file.id, name.encode(), h5t.IEEE_F32LE, h5s.create_simple(X.shape), properties)
            made.write_direct_chunk((0, 0), X.tobytes(), mask)
    return path


@pytest.fixture(autouse=True)
def without_hdf5plugin(monkeypatch):
    """As if it were not installed."""
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    if h5z.filter_avail(ZSTD):
        pytest.skip("the filter is installed")


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        ((ZSTD,), r"the filter zstd \(32015\) is not installed: install hdf5plugin.*HDF5_PLUGIN_PATH"),
        ((2, BLOSC), r"the filter blosc \(32001\) is not installed: install hdf5plugin"),
        ((ZSTD, BLOSC), r"the filters zstd \(32015\) and blosc \(32001\) are not installed"),
        ((MADE_UP,), r"the filter of an unknown name \(40000\) is not installed: set the variable HDF5_PLUGIN_PATH"),
    ],
)
def test_a_missing_filter_is_named_by_all_that_would_read(filters, says, tmp_path):
    path = filtered(tmp_path / "x.h5", *filters)
    with pytest.warns(UserWarning, match=rf"x\.h5:/q cannot be read: {says}") as warned:
        opened = cqsa.open(path)
    assert [one.filename for one in warned] == [__file__]
    assert opened.q.shape == X.shape
    assert "not readable: the filter" in repr(opened.q)
    calls = [lambda: opened.q[:3], lambda: cqsa.compare(opened.q, X)]
    calls += [lambda call=call: call(opened.q, X, X) for call in (cqsa.attention, cqsa.plan, cqsa.statistics)]
    with h5py.File(path) as file:
        calls += [lambda: cqsa.plan(X, file["k"], X), lambda: cqsa.compare(X, file["k"])]
        for call in calls:
            with pytest.raises(StorageError, match=rf"x\.h5:/[qk] cannot be read: {says}") as caught:
                call()
            assert "damaged" not in str(caught.value)


def test_the_command_names_it(tmp_path, capsys):
    path = filtered(tmp_path / "x.h5", ZSTD)
    for argv in (["plan", path], ["attend", path, "-o", tmp_path / "out.h5"], ["compare", f"{path}:/q", f"{path}:/k"]):
        done = run_command(capsys, *argv)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "x.h5:/q cannot be read: the filter zstd (32015) is not installed" in done.err
    assert "the filter zstd (32015)" in run_command(capsys, "info", path).out
    assert list(tmp_path.iterdir()) == [path]


def test_an_optional_filter_that_no_chunk_went_through_is_not_missed(tmp_path):
    """HDF5 writes a chunk as it is where an optional filter fails, or is not there."""
    path = filtered(tmp_path / "x.h5", ZSTD, mask=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(cqsa.open(path).q[...], X)
    assert describe(path).datasets[0].note == "chunked"


def test_hdf5plugin_is_imported_only_where_a_filter_is_missing(tmp_path):
    """A package of that name that says when it is imported."""
    (tmp_path / "hdf5plugin.py").write_text("print('imported')\nraise ImportError('broken here')\n")
    filtered(tmp_path / "zstd.h5", ZSTD)
    with h5py.File(tmp_path / "gzip.h5", "w") as file:
        for name in "qkv":
            file.create_dataset(name, data=X, compression="gzip")
    program = "import sys, cqsa_arrays as c; c.open('gzip.h5'); print('gzip'); c.open('zstd.h5')"
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("gzip\nimported\n")
    assert "(hdf5plugin is installed, but its import fails: broken here)" in done.stderr


def test_data_compressed_by_hdf5plugin_are_read(tmp_path):
    """In a process of its own: its filters stay registered."""
    program = (
        "import sys, numpy as np, h5py, hdf5plugin\n"
        "with h5py.File('x.h5', 'w') as f:\n"
        "    for name, how in zip('qkv', (hdf5plugin.Zstd(), hdf5plugin.Blosc2(), hdf5plugin.Bitshuffle())):\n"
        "        f.create_dataset(name, data=np.ones((9, 4), 'f4'), **how)\n"
    )
    reads = "import sys, cqsa_arrays as c; q = c.open('x.h5'); print(q.q[...].sum(), q.k[...].sum(), q.v[...].sum())"
    found = []
    for one in (program, reads):
        argv = [sys.executable, "-c", one]
        done = subprocess.run(argv, env=environment(), cwd=tmp_path, capture_output=True, text=True)
        if "No module named 'hdf5plugin'" in done.stderr:
            pytest.skip("hdf5plugin is not installed")
        found.append((done.returncode, done.stdout, done.stderr))
    assert found[1] == (0, "36.0 36.0 36.0\n", "")
