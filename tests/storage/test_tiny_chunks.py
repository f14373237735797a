"""Data sets of many tiny chunks: what a read of them holds is small and counted, and every element is right."""

from __future__ import annotations

import math
import os
from contextlib import closing
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_files import normal, peak_bytes, read, reset_peak, resident_bytes, whole, write_array

from cqsa_arrays.ranges import Range
from cqsa_arrays.storage import as_source, chunkmap, dataset
from cqsa_arrays.storage.hdf5 import opened
from cqsa_arrays.storage.slabs import CHUNK_BYTES, CHUNKS_AT_ONCE, METADATA_CACHE_BYTES, _pieces, read_slab

MIB = 1 << 20
MANY = 30_000
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc to measure peaks")


@pytest.fixture(scope="module")
def one_token_a_chunk(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("q", (MANY, 2), "f4", chunks=(1, 2), data=normal((MANY, 2)))
    return path


def read_all(path: Path) -> object:
    with closing(dataset(f"{path}:/q").source()) as source:
        list(source.prefetch(*whole(source)))
        return read(source)[0, 0]


@needs_proc
def test_a_read_of_many_chunks_takes_little_memory(one_token_a_chunk, tmp_path):
    """HDF5 takes 6 KiB for each chunk that one read touches, which would be 180 MiB here."""
    with h5py.File(tmp_path / "few.h5", "w") as file:
        file.create_dataset("q", (100, 2), "f4", chunks=(1, 2), data=normal((100, 2)))
    read_all(tmp_path / "few.h5")
    before = resident_bytes()
    reset_peak()
    read_all(one_token_a_chunk)
    assert peak_bytes() - before < 3 * MIB


def test_little_of_the_index_of_chunks_is_kept(one_token_a_chunk):
    """By itself HDF5 keeps 32 MiB of it, which are 260 MiB in memory."""
    with opened(os.fspath(one_token_a_chunk), None) as file:
        assert file.id.get_mdc_config().max_size == METADATA_CACHE_BYTES
    with closing(dataset(f"{one_token_a_chunk}:/q").source()) as source:
        assert source._dataset.file.id.get_mdc_config().max_size == METADATA_CACHE_BYTES


def test_reads_of_many_chunks_are_exact(one_token_a_chunk):
    assert np.array_equal(read_all(one_token_a_chunk), normal((MANY, 2)))


def test_what_a_read_touches_is_counted(one_token_a_chunk, tmp_path):
    with closing(dataset(f"{one_token_a_chunk}:/q").source()) as source:
        assert source.touched_bytes == CHUNKS_AT_ONCE * CHUNK_BYTES
    with h5py.File(one_token_a_chunk, "r", rdcc_nbytes=5000) as file, closing(as_source(file["q"], "q")) as source:
        assert source.held_bytes > 5000 + 170 * MANY  # the caller's file has larger caches
    np.save(tmp_path / "x.npy", normal((5, 4)))
    with closing(as_source(np.load(tmp_path / "x.npy"), "q")) as source:
        assert source.touched_bytes == 0


SHAPE = (2, 3, 40, 6)
CHUNKS = [(1, 1, 1, 1), (1, 3, 1, 6), (1, 1, 1, 6), (2, 1, 2, 6), (1, 1, 40, 1), (2, 3, 40, 1)]
FILTERS = [
    {},
    {"compression": "gzip", "shuffle": True},
    {"compression": "lzf"},
    {"fletcher32": True},
]


@pytest.mark.parametrize("dtype", ["f2", "f8"])
@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_tiny_chunks_of_every_shape_are_read_exactly(tmp_path, chunks, options, dtype):
    array = normal(SHAPE, dtype)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        write_array(file, "q", array, chunks=chunks, **options)
    with closing(dataset(f"{tmp_path}/x.h5:/q").source()) as source:
        for where in (
            whole(source),
            (Range(1, 2), Range(1, 3), Range(7, 39)),
            (Range(0, 2), Range(0, 3), Range(9, 10)),
        ):
            assert np.array_equal(read(source, "f8", where), array[tuple(r.slice for r in where)])


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_chunks_that_were_never_written_have_the_fill_value(tmp_path, dtype):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        made = file.create_dataset("q", (400, 4), dtype, chunks=(1, 4), fillvalue=2.5)
        made[100:103] = 7
    with closing(dataset(f"{tmp_path}/x.h5:/q").source()) as source:
        list(source.prefetch(*whole(source)))
        found = read(source, "f8")[0, 0]
    assert np.unique(found).tolist() == [2.5, 7]
    assert np.flatnonzero(found[:, 0] == 7).tolist() == [100, 101, 102]


def test_scaled_and_rounded_chunks_are_read(tmp_path):
    array = np.round(normal((300, 4), "f8"), 3)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("q", data=array, chunks=(1, 4), scaleoffset=3)
        expected = file["q"][...]
    with closing(dataset(f"{tmp_path}/x.h5:/q").source()) as source:
        assert np.array_equal(read(source, "f8")[0, 0], expected)


AXES = st.tuples(st.integers(1, 9), st.integers(0, 300), st.integers(1, 200), st.integers(1, 12))


@given(st.lists(AXES, min_size=1, max_size=4))
def test_cuts_cover_everything_once_and_touch_few_chunks(axes):
    chunks, start, count, step = zip(*axes, strict=True)
    cuts = _pieces(chunks, start, count, step)
    assert [[i for cut in one for i in cut] for one in cuts] == [list(range(n)) for n in count]
    touched = [
        max(len({(first + i * by) // size for i in cut}) for cut in one)
        for one, size, first, by in zip(cuts, chunks, start, step, strict=True)
    ]
    assert math.prod(touched) <= CHUNKS_AT_ONCE


@given(st.data())
def test_slabs_with_steps_are_read_as_numpy_has_them(data):
    array = np.arange(30 * 9 * 7, dtype="f4").reshape(30, 9, 7)
    chunks = data.draw(st.tuples(*(st.integers(1, n) for n in array.shape)))
    start = data.draw(st.tuples(*(st.integers(0, n - 1) for n in array.shape)))
    step = data.draw(st.tuples(*(st.integers(1, n) for n in array.shape)))
    expected = array[tuple(slice(a, None, by) for a, by in zip(start, step, strict=True))]
    with h5py.File("slabs.h5", "w", driver="core", backing_store=False) as file:
        found = np.empty(expected.shape, "f4")
        read_slab(file.create_dataset("x", data=array, chunks=chunks), start, found, step=step)
    assert np.array_equal(found, expected)


def extents_asked_for(path: Path, monkeypatch, where: tuple[Range, Range, Range]) -> set[int]:
    """Bytes of the file that are read ahead for ``where``."""
    asked: list[range] = []
    with closing(dataset(f"{path}:/q").source()) as source, monkeypatch.context() as patched:
        patched.setattr(os, "preadv", lambda fd, buffers, at: asked.append(range(at, at + sum(map(len, buffers)))))
        list(source.prefetch(*where))
    assert sum(map(len, asked)) == len(set().union(*asked))  # nothing twice
    return set().union(*asked)


@pytest.mark.parametrize("extents", [3, 7, 4096])
def test_neighbouring_chunks_share_an_extent_where_there_are_many(tmp_path, monkeypatch, extents):
    monkeypatch.setattr(chunkmap, "MOST_EXTENTS", extents)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        made = file.create_dataset("q", (40, 3, 64), "f4", chunks=(10, 1, 64), data=normal((40, 3, 64)))
        made.attrs["layout"] = "nhd"
        infos: list[h5py.h5d.StoreInfo] = []
        made.id.chunk_iter(infos.append)
    wanted = [one for one in infos if one.chunk_offset[0] in (10, 20) and one.chunk_offset[1] > 0]
    bytes_of = set().union(*(range(one.byte_offset, one.byte_offset + one.size) for one in wanted))
    asked = extents_asked_for(tmp_path / "x.h5", monkeypatch, (Range(0, 1), Range(1, 3), Range(15, 25)))
    assert asked >= bytes_of
    assert (asked == bytes_of) is (extents == 4096)


@pytest.mark.parametrize(("change", "value"), [("MOST_CHUNKS", 3), ("LEAST_CHUNK_BYTES", 2561), ("SPARSE", 0)])
def test_nothing_is_read_ahead_where_that_takes_longer_than_it_saves(tmp_path, monkeypatch, change, value):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("q", (40, 64), "f4", chunks=(10, 64), data=normal((40, 64)))
    where = (Range(0, 1), Range(0, 1), Range(0, 40))
    assert extents_asked_for(tmp_path / "x.h5", monkeypatch, where)
    monkeypatch.setattr(chunkmap, change, value)
    assert not extents_asked_for(tmp_path / "x.h5", monkeypatch, where)
