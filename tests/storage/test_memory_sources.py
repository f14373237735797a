"""Arrays in memory and memory maps: used in place or block by block, and maps let their pages go."""

import numpy as np
import pytest
from storage_files import BFLOAT16, DTYPES, layout_shape, normal, peak_bytes, qkv, read, reset_peak, resident_bytes

from cqsa_arrays.errors import ArgumentError
from cqsa_arrays.ranges import Range
from cqsa_arrays.storage import LAYOUTS, Layout, as_source, open_file
from cqsa_arrays.storage.memory import HostSource, MemmapSource

MIB = 1 << 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_in_memory_are_read_exactly(layout, dtype):
    array = normal(layout_shape(layout), dtype)
    source = as_source(array, "q", layout)
    assert isinstance(source, HostSource)
    assert source.in_place == (dtype in (np.float32, np.float64))
    compute = "f8" if dtype == np.float64 else "f4"
    assert np.array_equal(read(source, compute), Layout(layout).logical(array).astype(compute))


def test_a_view_is_the_array_itself():
    array = normal((2, 50, 3, 8))
    source = as_source(array, "q", "bnhd")
    view = source.view(Range(1, 2), Range(0, 2), Range(10, 20))
    assert np.shares_memory(view, array)
    assert np.array_equal(view, array[1:2, 10:20, 0:2].swapaxes(1, 2))


ARRAYS = [
    pytest.param(normal((50, 16))[:, ::2], False, id="strided-vectors"),
    pytest.param(normal((16, 50)).T, False, id="transposed"),
    pytest.param(normal((50, 8), "f2"), False, id="float16"),
    pytest.param(np.frombuffer(bytes(1601), "u1")[1:].view("f4").reshape(50, 8), False, id="not-aligned"),
    pytest.param(np.broadcast_to(normal((1, 8)), (50, 8)), True, id="broadcast"),
    pytest.param(normal((50, 8))[::-1], True, id="reversed"),
    pytest.param(normal((50, 1)), True, id="one-dimension"),
]


@pytest.mark.parametrize(("array", "in_place"), ARRAYS)
def test_only_arrays_with_contiguous_vectors_are_used_in_place(array, in_place):
    source = as_source(array, "q")
    assert source.in_place is in_place
    assert np.array_equal(read(source)[0, 0], array)
    if not in_place:
        with pytest.raises(TypeError, match="not in memory"):
            source.view(Range(0, 1), Range(0, 1), Range(0, 5))


def test_narrowing_is_refused():
    with pytest.raises(ArgumentError, match="float64 elements read as float32"):
        read(as_source(normal((50, 8), "f8"), "v"), "f4")


def _map(folder, shape, mode="r", dtype="f4"):
    array = normal(shape).astype(dtype)
    array.tofile(folder / "x.bin")
    return array, np.memmap(folder / "x.bin", dtype, mode, shape=shape)


VIEWS = {
    "whole": lambda a: a,
    "part": lambda a: a[1:, :, 7:90],
    "transposed": lambda a: a.transpose(0, 2, 1, 3),
    "reversed": lambda a: a[:, ::-1],
    "plain-view": lambda a: np.asarray(a)[..., 2:6],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_any_view_of_a_map_is_read_exactly(tmp_path, mode, view):
    array, mapped = _map(tmp_path, (2, 3, 100, 16), mode)
    source = as_source(view(mapped), "q")
    assert isinstance(source, MemmapSource)
    where = (Range(0, 1), Range(1, 2), Range(1, 3))
    expected = view(array)
    list(source.prefetch(*where))
    assert np.array_equal(read(source), expected)
    assert np.array_equal(read(source, "f8", where), expected[0:1, 1:2, 1:3])


def test_bfloat16_maps_are_widened(tmp_path):
    array, mapped = _map(tmp_path, (50, 8), dtype=BFLOAT16)
    assert np.array_equal(read(as_source(mapped, "q"))[0, 0], array.astype("f4"))


@pytest.mark.parametrize("view", [lambda a: a, lambda a: a.transpose(0, 2, 1, 3)], ids=["heads-outside", "bnhd"])
def test_reading_a_map_lets_its_pages_go(tmp_path, view):
    _, mapped = _map(tmp_path, (1, 4, 64_000, 64))  # 62.5 MiB
    source = as_source(view(mapped), "q", "bhnd" if view(mapped) is mapped else "bnhd")
    out = np.zeros((1, 4, 1000, 64), "f4")
    source.read(Range(0, 1), Range(0, 4), Range(0, 1000), out)
    reset_peak()
    before = resident_bytes()
    for tokens in Range(0, 64_000).split(1000):
        source.read(Range(0, 1), Range(0, 4), tokens, out)
    assert resident_bytes() - before < 1 * MIB
    assert peak_bytes() - before < source.staging_bytes(out.dtype) + 1 * MIB


def test_scattered_reads_of_a_map_leave_no_pages_behind(tmp_path):
    _, mapped = _map(tmp_path, (64_000, 256))  # 62.5 MiB, a quarter of which is read in pieces of 16 KiB
    source = as_source(mapped, "q")
    out = np.zeros((1, 1, 16, 256), "f4")
    before = resident_bytes()
    for start in range(0, 64_000, 64):
        source.read(Range(0, 1), Range(0, 1), Range(start, start + 16), out)
    assert resident_bytes() - before < 2 * MIB


def test_copy_on_write_maps_keep_what_was_changed(tmp_path):
    _, mapped = _map(tmp_path, (5000, 64), "c")
    mapped[1000:2000] = 7
    source = as_source(mapped, "q")
    assert "copy-on-write" in source.description
    for _ in range(2):
        assert np.array_equal(read(source)[0, 0, 1000:2000], np.full((1000, 64), 7))


def test_writable_maps_keep_what_was_changed(tmp_path):
    _, mapped = _map(tmp_path, (5000, 64), "r+")
    mapped[1000:2000] = 7
    for _ in range(2):
        assert np.array_equal(read(as_source(mapped, "q"))[0, 0, 1000:2000], np.full((1000, 64), 7))
    assert np.array_equal(np.fromfile(tmp_path / "x.bin", "f4").reshape(5000, 64)[1000:2000], np.full((1000, 64), 7))


def test_prefetch_leaves_resident_memory_flat(tmp_path):
    array, mapped = _map(tmp_path, (1, 4, 64_000, 64))
    contiguous = open_file(qkv(tmp_path / "x.h5", array)).q.source()
    del array
    before = resident_bytes()
    for source in (contiguous, as_source(mapped, "q")):
        list(source.prefetch(Range(0, 1), Range(0, 4), Range(0, 64_000)))
    assert resident_bytes() - before < 2 * MIB
    contiguous.close()


def test_slices_of_disk_arrays_are_known_as_maps(tmp_path):
    q = open_file(qkv(tmp_path / "x.h5", normal((4, 100, 16)))).q
    source = as_source(q[1:3], "q")
    assert isinstance(source, MemmapSource)
    assert source.identity["path"] == str(tmp_path / "x.h5")
    assert source.identity["offset"] == q.stored.offset + 100 * 16 * 4
    assert np.array_equal(read(source)[0], q[1:3])
