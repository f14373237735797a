"""The forms in which HDF5 stores arrays: three of bfloat16, chunked, compact; and those that are refused."""

import os
import warnings
from contextlib import closing

import h5py
import numpy as np
import pytest
from h5py import h5d, h5t
from storage_files import BFLOAT16, create_low_level, hdf5_bfloat16, layout_shape, normal, qkv, read, write_array

from cqsa_arrays.errors import ArgumentError, StorageError
from cqsa_arrays.ranges import Range
from cqsa_arrays.storage import Layout, as_source, dataset, open_file
from cqsa_arrays.storage.chunked import FILTER_COPIES, LIBRARY_BYTES, ChunkedSource
from cqsa_arrays.storage.contiguous import ContiguousSource

ARRAY = normal((20, 8), BFLOAT16)


def _marked_uint16(file, options):
    write_array(file, "q", ARRAY, **options)


def _opaque(file, options):
    file.create_dataset("q", data=ARRAY, **options)


def _own_float(file, options):
    if options:
        chunked = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        chunked.set_chunk(options["chunks"])
        h5d.create(file.id, b"q", hdf5_bfloat16(), h5py.h5s.create_simple(ARRAY.shape), chunked)
    else:
        create_low_level(file, "q", hdf5_bfloat16(), ARRAY.shape, h5d.CONTIGUOUS, h5d.ALLOC_TIME_EARLY)
    file["q"][...] = ARRAY.astype("f4")


@pytest.mark.parametrize("options", [{}, {"chunks": (6, 8)}], ids=["contiguous", "chunked"])
@pytest.mark.parametrize("form", [_marked_uint16, _opaque, _own_float])
def test_three_forms_of_bfloat16_are_read_right(tmp_path, form, options):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        form(file, options)
    q = dataset(f"{tmp_path}/x.h5:/q")
    assert q.dtype == BFLOAT16
    assert q[3:5].dtype == BFLOAT16
    assert np.array_equal(q[...], ARRAY)
    source = q.source()
    assert isinstance(source, ChunkedSource if options else ContiguousSource)
    assert np.array_equal(read(source)[0, 0], ARRAY.astype("f4"))
    source.close()


CHUNKINGS = [
    pytest.param("bhnd", {"chunks": (1, 1, 16, 8), "compression": "gzip"}, id="gzip"),
    pytest.param("bhnd", {"chunks": (2, 3, 7, 3), "compression": "gzip", "shuffle": True}, id="across-heads-and-dims"),
    pytest.param("bnhd", {"chunks": (1, 9, 2, 8), "compression": "lzf"}, id="token-major"),
    pytest.param("nhd", {"chunks": True}, id="chosen-by-h5py"),
    pytest.param("nd", {"chunks": (50, 8)}, id="one-chunk"),
]


@pytest.mark.parametrize("dtype", ["f2", "f4", BFLOAT16], ids=str)
@pytest.mark.parametrize(("layout", "options"), CHUNKINGS)
def test_chunked_data_are_read_exactly_in_any_range(tmp_path, layout, options, dtype):
    array = normal(layout_shape(layout), dtype)
    logical = Layout(layout).logical(array).astype("f4")
    source = open_file(qkv(tmp_path / "x.h5", array, **options), layout=layout).k.source()
    assert isinstance(source, ChunkedSource)
    b, h, n, _ = logical.shape
    for where in ((Range(0, b), Range(0, h), Range(0, n)), (Range(b - 1, b), Range(h - 1, h), Range(5, 23))):
        list(source.prefetch(*where))
        assert np.array_equal(read(source, "f4", where), logical[tuple(r.slice for r in where)])
    source.close()


def test_chunked_prefetch_asks_for_the_stored_chunks_only(tmp_path, monkeypatch):
    path = qkv(tmp_path / "x.h5", normal((100, 64)), chunks=(10, 64), compression="gzip")
    with h5py.File(path) as file:
        chunks = [file["q"].id.get_chunk_info_by_coord((t, 0)) for t in (20, 30)]
    source, asked = open_file(path).q.source(), []
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: asked.extend(range(at, at + sum(map(len, buffers)))))
    assert list(source.prefetch(Range(0, 1), Range(0, 1), Range(25, 35)))
    assert sorted(asked) == sorted(at for c in chunks for at in range(c.byte_offset, c.byte_offset + c.size))
    source.close()


def test_what_hdf5_holds_is_counted_and_it_caches_no_chunks(tmp_path):
    path = qkv(tmp_path / "x.h5", normal((5000, 64)), chunks=(1000, 32), compression="gzip")
    source = open_file(path).q.source()
    chunk = 1000 * 32 * 4
    assert source._dataset.id.get_access_plist().get_chunk_cache()[1] == 0
    assert source.staging_bytes(np.dtype("f4")) == 4 * 2 * chunk + FILTER_COPIES * chunk
    assert source.held_bytes == LIBRARY_BYTES
    source.close()


def test_compact_data_are_read(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        made = create_low_level(file, "q", h5t.NATIVE_FLOAT, (4, 8), h5d.COMPACT, h5d.ALLOC_TIME_EARLY)
        made[...] = normal((4, 8))
    source = dataset(f"{tmp_path}/x.h5:/q").source()
    assert "compact" in source.description
    assert np.array_equal(read(source)[0, 0], normal((4, 8)))
    source.close()


def test_open_h5py_data_set_is_read_by_position_if_read_only_and_through_h5py_if_not(tmp_path):
    array = normal((20, 8))
    path = qkv(tmp_path / "x.h5", array)
    with h5py.File(path, "r") as file:
        source = as_source(file["q"], "q")
        assert isinstance(source, ContiguousSource)
        assert np.array_equal(read(source)[0, 0], array)
        source.close()
    with h5py.File(path, "r+") as file:
        file["q"][3] = 5
        source = as_source(file["q"], "q")
        assert "open for writing" in source.description
        assert np.array_equal(read(source)[0, 0, 3], np.full(8, 5))
        source.close()
        assert file.id.valid


def test_h5py_file_in_memory_is_read(tmp_path):
    with h5py.File(tmp_path / "none.h5", "w", driver="core", backing_store=False) as file:
        file["q"] = normal((20, 8))
        source = as_source(file["q"], "q")
        list(source.prefetch(Range(0, 1), Range(0, 1), Range(0, 20)))
        assert np.array_equal(read(source)[0, 0], normal((20, 8)))
        source.close()


def test_layout_comes_from_argument_else_attribute_else_rank(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name in "qkv":
            file[name] = normal((2, 50, 3, 8))
        file["q"].attrs["layout"] = "bnhd"
        file["v"].attrs["layout"] = np.bytes_(b"bnhd")
    opened = open_file(tmp_path / "x.h5")
    assert [a.layout.name for a in (opened.q, opened.k, opened.v)] == ["bnhd", "bhnd", "bnhd"]
    assert open_file(tmp_path / "x.h5", layout="bhnd").q.layout.name == "bhnd"


def test_slices_of_contiguous_data_are_read_only_views_of_one_map(tmp_path):
    array = normal((4, 100, 16))
    q = open_file(qkv(tmp_path / "x.h5", array)).q
    assert type(q[1]) is np.ndarray
    assert np.shares_memory(q[1], q[...])
    assert not q[1].flags.writeable
    assert np.array_equal(np.asarray(q), array)
    assert np.asarray(q, "f8").dtype == np.float64
    assert (q.shape, q.ndim, len(q), q.nbytes) == (array.shape, 3, 4, array.nbytes)
    assert "memory-mapped" in repr(q)


@pytest.mark.parametrize("colon", ["x.h5", "a:b.h5"])
def test_a_reference_names_file_and_data_set(tmp_path, colon):
    with h5py.File(tmp_path / colon, "w") as file:
        file["layers/0/q"] = normal((20, 8))
        file["odd:name"] = normal((30, 8))
    assert dataset(f"{tmp_path}/{colon}:/layers/0/q").shape == (20, 8)
    assert dataset(f"{tmp_path}/{colon}:/odd:name").shape == (30, 8)


def test_soft_links_inside_the_file_are_followed(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["layers/0/real"] = normal((20, 8))
        file["layers/0/near"] = h5py.SoftLink("real")
        file["latest"] = h5py.SoftLink("/layers/0")
    assert np.array_equal(dataset(f"{tmp_path}/x.h5:/latest/near")[...], normal((20, 8)))


def _external_storage(file, folder):
    file.create_dataset("q", (20, 8), "f4", external=[(str(folder / "raw.bin"), 0, 640)])


def _virtual(file, folder):
    with h5py.File(folder / "other.h5", "w") as other:
        other["q"] = normal((20, 8))
    layout = h5py.VirtualLayout((20, 8), "f4")
    layout[...] = h5py.VirtualSource(folder / "other.h5", "q", (20, 8))
    file.create_virtual_dataset("q", layout)


def _external_link(file, folder):
    file["q"] = h5py.ExternalLink("other.h5", "/q")


def _soft_to_external_link(file, folder):
    file["away"] = h5py.ExternalLink("other.h5", "/")
    file["q"] = h5py.SoftLink("/away/q")


def _circle(file, folder):
    file["q"] = h5py.SoftLink("/q")


def _big_endian(file, folder):
    file["q"] = normal((20, 8)).astype(">f4")


def _big_endian_bfloat16(file, folder):
    file["q"] = np.zeros((20, 8), ">u2")
    file["q"].attrs["dtype"] = "bfloat16"


def _integers(file, folder):
    file["q"] = np.zeros((20, 8), "i4")


def _unmarked_uint16(file, folder):
    file["q"] = np.zeros((20, 8), "u2")


def _complex(file, folder):
    file["q"] = np.zeros((20, 8), "c8")


def _booleans(file, folder):
    file["q"] = np.zeros((20, 8), "?")


def _strings(file, folder):
    file["q"] = ["a", "b"]


def _compound(file, folder):
    file["q"] = np.zeros((20, 8), [("x", "f4"), ("y", "f4")])


def _empty(file, folder):
    file["q"] = h5py.Empty("f4")


def _group(file, folder):
    file.create_group("q")


def _missing(file, folder):
    file["other"] = 1.0


def _vector(file, folder):
    file["q"] = np.zeros(20, "f4")


def _odd_layout(file, folder):
    file["q"] = np.zeros((20, 8), "f4")
    file["q"].attrs["layout"] = "dn"


REFUSED = [
    pytest.param(_external_storage, StorageError, "external files, which are not followed", id="external-storage"),
    pytest.param(_virtual, StorageError, "is virtual", id="virtual"),
    pytest.param(_external_link, StorageError, "external link to other.h5:/q, which is missing", id="external-link"),
    pytest.param(_soft_to_external_link, StorageError, "external link to other.h5:/q,", id="soft-to-external-link"),
    pytest.param(_circle, StorageError, "soft links", id="circle-of-links"),
    pytest.param(_big_endian, ArgumentError, "big-endian float of 4 bytes", id="big-endian"),
    pytest.param(_big_endian_bfloat16, ArgumentError, "big-endian float of 2 bytes", id="big-endian-bfloat16"),
    pytest.param(_integers, ArgumentError, "integers in /q", id="integers"),
    pytest.param(_unmarked_uint16, ArgumentError, "dtype='bfloat16'", id="unmarked-uint16"),
    pytest.param(_complex, ArgumentError, "complex", id="complex"),
    pytest.param(_booleans, ArgumentError, "booleans", id="booleans"),
    pytest.param(_strings, ArgumentError, "strings", id="strings"),
    pytest.param(_compound, ArgumentError, "compound", id="compound"),
    pytest.param(_empty, ArgumentError, "without any elements", id="empty"),
    pytest.param(_group, ArgumentError, "/q in .* is a group", id="group"),
    pytest.param(_missing, ArgumentError, r"/q in .* is missing \(data sets present: /other\)", id="missing"),
    pytest.param(_vector, ArgumentError, "1 dimensions", id="vector"),
    pytest.param(_odd_layout, ArgumentError, "the attribute layout = 'dn' of .*x.h5:/q", id="odd-layout"),
]


@pytest.mark.parametrize(("make", "error", "said"), REFUSED)
def test_data_that_cannot_be_used_are_refused_by_name(tmp_path, make, error, said):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        make(file, tmp_path)
    with pytest.raises(error, match=said) as caught:
        dataset(f"{tmp_path}/x.h5:/q", argument="q")
    assert error is StorageError or caught.value.argument == "q"


def _truncate(path):
    os.truncate(path, os.path.getsize(path) - 100)


def _overwrite(path):
    path.write_bytes(b"hello")


def _remove(path):
    path.unlink()


def _directory(path):
    path.unlink(), path.mkdir()


def _fifo(path):
    path.unlink(), os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(_truncate, "is truncated", id="truncated"),
        pytest.param(_overwrite, "is not an HDF5 file", id="not-hdf5"),
        pytest.param(_remove, "No such file", id="missing"),
        pytest.param(_directory, "is a directory", id="directory"),
        pytest.param(_fifo, "not a regular file", id="fifo"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, damage, said):
    path = qkv(tmp_path / "x.h5", normal((100, 64)))
    damage(path)
    with pytest.raises(StorageError, match=rf"x\.h5.*{said}"):
        open_file(path)


def test_damaged_chunks_are_named(tmp_path):
    path = qkv(tmp_path / "x.h5", normal((100, 64)), chunks=(10, 64), compression="gzip")
    with h5py.File(path) as file:
        chunk = file["q"].id.get_chunk_info_by_coord((20, 0))
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset), raw.write(bytes(chunk.size))
    q = open_file(path).q
    source = q.source()
    with pytest.raises(StorageError, match=r"x.h5:/q: tokens .* cannot be read"):
        read(source)
    with pytest.raises(StorageError, match="is damaged"):
        q[...]
    source.close()


@pytest.mark.parametrize("form", ["array", "mapped", "contiguous", "chunked"])
def test_a_signalling_nan_is_read_without_a_warning(tmp_path, form):
    """Found by flipping bytes: NumPy warned of the conversion to float64, and the command printed it."""
    array = normal((20, 8), "f4")
    array.view("u4")[3, 5] = 0x7F800001
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("q", data=array, chunks=(6, 8) if form == "chunked" else None)
    np.save(tmp_path / "x.npy", array)
    arrays = {"array": array, "mapped": np.load(tmp_path / "x.npy", mmap_mode="r")}
    source = as_source(arrays[form], "q") if form in arrays else dataset(f"{tmp_path}/x.h5:/q").source()
    with closing(source), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read(source, "f8")[0, 0]
    assert np.isnan(found[3, 5])
    assert np.isnan(found).sum() == 1
