"""Contiguous data sets by positioned reads: every offset, layout, type and range, straight or widened."""

import itertools
import os

import h5py
import numpy as np
import pytest
from h5py import h5d, h5t
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storage_files import (
    BFLOAT16,
    DTYPES,
    PAGE,
    create_low_level,
    layout_shape,
    normal,
    peak_bytes,
    qkv,
    read,
    reset_peak,
    resident_bytes,
    write_array,
)

from cqsa_arrays.errors import ArgumentError, StorageError
from cqsa_arrays.ranges import Range
from cqsa_arrays.storage import LAYOUTS, Layout, dataset, open_file
from cqsa_arrays.storage.contiguous import ContiguousSource


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_type_is_read_exactly(tmp_path, layout, dtype):
    array = normal(layout_shape(layout), dtype)
    source = open_file(qkv(tmp_path / "x.h5", array), layout=layout).q.source()
    assert isinstance(source, ContiguousSource)
    assert source.dtype == dtype
    assert source.token_major == (layout in ("bnhd", "nhd"))
    compute = "f8" if dtype == np.float64 else "f4"
    assert np.array_equal(read(source, compute), Layout(layout).logical(array).astype(compute))
    source.close()


@pytest.fixture(scope="module", params=["bhnd", "bnhd"])
def stored(request, tmp_path_factory):
    layout = request.param
    array = normal((2, 3, 701, 16) if layout == "bhnd" else (2, 701, 3, 16))
    path = qkv(tmp_path_factory.mktemp("ranges") / "x.h5", array)
    return path, layout


@st.composite
def ranges(draw, length):
    start = draw(st.integers(0, length - 1))
    return Range(start, draw(st.integers(start + 1, length)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(b=ranges(2), h=ranges(3), n=ranges(701), wide=st.booleans())
def test_positioned_reads_equal_h5py_for_any_ranges(stored, b, h, n, wide):
    path, layout = stored
    with h5py.File(path) as file:
        expected = Layout(layout).logical(file["q"][...])[b.slice, h.slice, n.slice]
    source = open_file(path, layout=layout).q.source()
    assert np.array_equal(read(source, "f8" if wide else "f4", (b, h, n)), expected)
    source.close()


def test_blocks_longer_than_a_piece_are_widened_whole(tmp_path):
    array = normal((1, 2, 40_000, 64), "f2")
    source = open_file(qkv(tmp_path / "x.h5", array)).q.source()
    assert source.staging_bytes(np.dtype("f4")) == 1 << 20
    assert np.array_equal(read(source), array.astype("f4"))
    assert source.bytes_read == array.nbytes
    source.close()


def test_reading_holds_no_more_than_its_staging(tmp_path):
    for options in ({}, {"chunks": (4000, 64), "compression": "gzip"}):
        source = open_file(qkv(tmp_path / "x.h5", np.ones((120_000, 64), "f2"), **options)).q.source()
        out = np.ones((1, 1, 120_000, 64), "f4")
        source.read(Range(0, 1), Range(0, 1), Range(0, 1000), out[:, :, :1000])
        reset_peak()
        before = resident_bytes()
        source.read(Range(0, 1), Range(0, 1), Range(0, 120_000), out)
        assert peak_bytes() - before <= source.staging_bytes(out.dtype) + (1 << 20)
        source.close()


def test_special_values_are_widened_to_themselves(tmp_path):
    for dtype in (np.dtype("f2"), BFLOAT16):
        every = np.arange(1 << 16, dtype="u2").view(dtype).reshape(1024, 64)
        source = open_file(qkv(tmp_path / "x.h5", every)).q.source()
        assert np.array_equal(read(source)[0, 0], every.astype("f4"), equal_nan=True)
        source.close()


def test_offsets_need_not_be_page_aligned(tmp_path):
    array = normal((7, 8))
    with h5py.File(tmp_path / "x.h5", "w", userblock_size=512) as file:
        for name in "qkv":
            file[name] = array
    q = open_file(tmp_path / "x.h5").q
    assert q.stored.offset % PAGE != 0
    assert np.array_equal(q[...], array)
    source = q.source()
    assert np.array_equal(read(source)[0, 0], array)
    source.close()


@pytest.mark.parametrize("userblock", [0, 512], ids=["plain", "user-block"])
@pytest.mark.parametrize("alloc", [h5d.ALLOC_TIME_LATE, h5d.ALLOC_TIME_EARLY], ids=["late", "early"])
def test_data_are_mapped_only_once_space_is_allocated(tmp_path, alloc, userblock):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", userblock_size=userblock) as file:
        create_low_level(file, "q", h5t.NATIVE_FLOAT, (10, 8), h5d.CONTIGUOUS, alloc)
    q = dataset(f"{path}:/q")
    assert (q.stored.offset is not None) == (alloc == h5d.ALLOC_TIME_EARLY)
    source = q.source()
    assert np.array_equal(read(source)[0, 0], np.zeros((10, 8)))
    source.close()


def test_a_file_cut_short_under_the_reader_is_named_with_its_byte(tmp_path):
    path = qkv(tmp_path / "x.h5", normal((1000, 64)))
    source = open_file(path).v.source()
    os.truncate(path, 600_000)
    with pytest.raises(StorageError, match=r"x.h5:/v: the file ends at byte 600000.*truncated"):
        read(source)
    source.close()


def test_a_file_changed_since_it_was_opened_is_refused(tmp_path):
    path = qkv(tmp_path / "x.h5", normal((1000, 64)))
    q = open_file(path).q
    with h5py.File(path, "r+") as file:
        del file["q"]
        write_array(file, "q", normal((1000, 64), seed=1))
    for use in (q.source, lambda: q[0]):
        with pytest.raises(StorageError, match="has changed since it was opened"):
            use()


def test_narrowing_is_refused(tmp_path):
    source = open_file(qkv(tmp_path / "x.h5", normal((10, 8), "f8"))).q.source()
    with pytest.raises(ArgumentError, match="float64 elements read as float32"):
        read(source, "f4")
    source.close()


def test_short_system_reads_are_completed(tmp_path, monkeypatch):
    array = normal((100, 64))
    source = open_file(qkv(tmp_path / "x.h5", array)).q.source()
    whole_read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: whole_read(fd, [buffers[0][:1000]], at))
    assert np.array_equal(read(source)[0, 0], array)
    source.close()


def test_systems_without_positioned_calls_read_the_same(tmp_path, monkeypatch):
    array = normal((100, 64), "f2")
    source = open_file(qkv(tmp_path / "x.h5", array)).q.source()
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "posix_fadvise")
    list(source.prefetch(Range(0, 1), Range(0, 1), Range(0, 100)))
    assert np.array_equal(read(source)[0, 0], array.astype("f4"))
    source.close()


def test_prefetch_reads_joined_runs_in_order(tmp_path, monkeypatch):
    array = normal((1, 4, 10_007, 64))
    q = open_file(qkv(tmp_path / "x.h5", array)).q
    source, asked, whole_read = q.source(), [], os.preadv

    def noted(fd, buffers, at) -> int:
        asked.append((at, whole_read(fd, buffers, at)))
        return asked[-1][1]

    monkeypatch.setattr(os, "preadv", noted)
    list(source.prefetch(Range(0, 1), Range(1, 3), Range(0, 10_007)))
    start = q.stored.offset + array[0, 0].nbytes
    assert asked[0][0] == start
    assert sum(size for _, size in asked) == 2 * array[0, 0].nbytes
    assert source.bytes_read == 0
    assert all(a + size == b for (a, size), (b, _) in itertools.pairwise(asked))
    source.close()


def test_identity_tells_files_apart(tmp_path):
    first, second = (open_file(qkv(tmp_path / name, normal((10, 8)))).q.source() for name in ("a.h5", "b.h5"))
    assert first.identity["dataset"] == "/q"
    assert first.identity["size"] == os.path.getsize(tmp_path / "a.h5")
    assert first.identity != second.identity
    first.close(), second.close()
