"""Outputs: whole from the start, written in place, named at the end; and the same interface over arrays."""

import errno
import json
import os
import subprocess
import sys
from itertools import product

import h5py
import numpy as np
import pytest
from storage_files import AXES, BFLOAT16, DTYPES, normal, peak_bytes, qkv, reset_peak, resident_bytes

from cqsa_arrays.errors import ArgumentError, StorageError
from cqsa_arrays.ranges import Range
from cqsa_arrays.storage import LAYOUTS, ArraySink, Layout, OutputFile, dataset

MIB = 1 << 20
SHAPE = (1, 2, 50, 8)


def _create(path, shape=SHAPE, dtype="f4", layout="bhnd", lse="f4", attributes=None, **options):
    return OutputFile.create(
        path,
        shape=shape,
        dtype=np.dtype(dtype),
        layout=Layout(layout),
        lse_dtype=lse and np.dtype(lse),
        attributes=attributes or {},
        **options,
    )


def _fill(sink, out, lse):
    """Everything, one head and uneven token ranges at a time, last ones first."""
    b, h, n, _ = out.shape
    for head, tokens in reversed(list(product(range(h), (Range(0, 17), Range(17, 41), Range(41, n))))):
        where = (Range(0, b), Range(head, head + 1), tokens)
        block = tuple(r.slice for r in where)
        sink.write_out(*where, out[block])
        sink.write_lse(*where, lse[block])


def _logical_shape(layout):
    return tuple(AXES[axis] if axis in layout else 1 for axis in "bhnd")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_in_place_is_what_h5py_reads(tmp_path, layout, dtype):
    shape = _logical_shape(layout)
    out, lse = normal(shape, "f8" if dtype == np.float64 else "f4"), normal(shape[:3], seed=1)
    with _create(tmp_path / "out.h5", shape, dtype, layout) as sink:
        _fill(sink, out, lse)
        sink.finish()
    with h5py.File(tmp_path / "out.h5") as file:
        stored = file["out"][...]
        stored = stored.view(BFLOAT16) if file["out"].attrs.get("dtype") == "bfloat16" else stored
        assert stored.dtype == dtype
        assert np.array_equal(Layout(layout).logical(stored), out.astype(dtype))
        assert file["out"].attrs["layout"] == layout
        assert file["lse"].shape == Layout(layout).lse_shape(shape)
        assert np.array_equal(file["lse"][...].reshape(shape[:3]), lse)
        assert file["lse"].attrs["layout"] == "".join(axis for axis in layout if axis in "bhn").replace("nh", "hn")
    assert np.array_equal(Layout(layout).logical(dataset(f"{tmp_path}/out.h5:/out")[...]), out.astype(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_array_sink_holds_what_is_written(layout):
    shape = _logical_shape(layout)
    out, lse = normal(shape), normal(shape[:3], seed=1)
    into = np.zeros(Layout(layout).physical_shape(shape), "f2")
    into_lse = np.zeros(Layout(layout).lse_shape(shape), "f4")
    sink = ArraySink(into, into_lse, Layout(layout))
    _fill(sink, out, lse)
    sink.finish()
    assert np.array_equal(Layout(layout).logical(into), out.astype("f2"))
    assert np.array_equal(into_lse.reshape(lse.shape), lse)


def test_log_sum_exp_is_optional(tmp_path):
    with _create(tmp_path / "out.h5", lse=None) as sink:
        _fill(sink, normal(SHAPE), normal(SHAPE[:3]))
        sink.finish()
    with h5py.File(tmp_path / "out.h5") as file:
        assert list(file) == ["out"]


def test_strided_and_wider_blocks_are_narrowed_whole(tmp_path):
    out = normal((1, 60_000, 4, 32)).swapaxes(1, 2)  # longer than a piece, token-major in memory
    with _create(tmp_path / "out.h5", out.shape, "f2", "bhnd", lse=None) as sink:
        sink.write_out(Range(0, 1), Range(0, 4), Range(0, 60_000), out)
        sink.finish()
    assert np.array_equal(dataset(f"{tmp_path}/out.h5:/out")[...], out.astype("f2"))


def test_attributes_are_stored_plain_and_nested_ones_as_json(tmp_path):
    plan = {"tasks": list(range(30_000)), "mask": None}  # more than HDF5's 64 KiB
    with _create(tmp_path / "out.h5", attributes={"plan": plan, "version": "1.0", "seed": 7}) as sink:
        sink.finish()
    with h5py.File(tmp_path / "out.h5") as file:
        assert json.loads(file.attrs["plan"]) == plan
        assert (file.attrs["version"], file.attrs["seed"]) == ("1.0", 7)


def test_the_name_comes_only_at_the_end(tmp_path):
    sink = _create(tmp_path / "out.h5")
    assert os.listdir(tmp_path) == ["out.h5.part"]
    sink.finish()
    assert os.listdir(tmp_path) == ["out.h5"]
    sink.abandon()
    assert os.listdir(tmp_path) == ["out.h5"]


def test_blocks_are_on_the_disk_before_anything_is_written(tmp_path):
    sink = _create(tmp_path / "out.h5", (1, 1, 100_000, 64))
    assert os.stat(tmp_path / "out.h5.part").st_blocks * 512 >= 100_000 * 65 * 4
    sink.abandon()


def test_an_unfinished_file_is_whole_hdf5_at_any_time(tmp_path):
    sink = _create(tmp_path / "out.h5")
    sink.write_out(Range(0, 1), Range(0, 1), Range(0, 50), normal((1, 1, 50, 8)))
    with h5py.File(tmp_path / "out.h5.part") as file:
        assert np.array_equal(file["out"][0, 0], normal((50, 8)))
    sink.abandon()


def test_abandoning_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), _create(tmp_path / "out.h5"):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_overwriting_keeps_the_old_file_until_the_end(tmp_path):
    path = qkv(tmp_path / "out.h5", normal((5, 8)))
    old = path.read_bytes()
    with _create(path, overwrite=True):
        assert path.read_bytes() == old
    assert path.read_bytes() == old
    with _create(path, overwrite=True) as sink:
        sink.finish()
    assert dataset(f"{path}:/out").shape == SHAPE


def test_a_leftover_of_an_earlier_run_is_replaced(tmp_path):
    (tmp_path / "out.h5.part").write_bytes(b"half done")
    with _create(tmp_path / "out.h5") as sink:
        sink.finish()
    assert dataset(f"{tmp_path}/out.h5:/out").shape == SHAPE


def test_of_two_runs_with_one_output_the_first_is_told(tmp_path):
    first, second = _create(tmp_path / "out.h5"), _create(tmp_path / "out.h5")
    with pytest.raises(StorageError, match="was replaced"):
        first.finish()
    first.abandon()
    second.finish()
    assert os.listdir(tmp_path) == ["out.h5"]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    sink = _create(tmp_path / "out.h5")
    (tmp_path / "out.h5").write_bytes(b"precious")
    with pytest.raises(StorageError, match="has appeared meanwhile"):
        sink.finish()
    sink.abandon()
    assert (tmp_path / "out.h5").read_bytes() == b"precious"
    assert (tmp_path / "out.h5.part").exists()


def _exists(folder):
    qkv(folder / "out.h5", normal((5, 8)))


def _directory(folder):
    (folder / "out.h5").mkdir()


def _part_directory(folder):
    (folder / "out.h5.part").mkdir()


def _nothing(folder):
    """The folder as it is."""


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        pytest.param(_exists, "out.h5", "which exists.*overwrite=True", id="exists"),
        pytest.param(_nothing, "no/out.h5", "whose folder is missing", id="no-folder"),
        pytest.param(_exists, "out.h5/x.h5", "whose folder is not a directory", id="folder-is-a-file"),
        pytest.param(_directory, "out.h5", "a directory", id="directory"),
        pytest.param(_part_directory, "out.h5", "out.h5.part, a directory", id="part-is-a-directory"),
    ],
)
def test_paths_that_cannot_be_outputs_are_refused(tmp_path, make, name, said):
    make(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ArgumentError, match=said):
        _create(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ArgumentError, match="not writable"):
        _create(tmp_path / "out.h5")


@pytest.mark.parametrize("alias", [lambda p, a: p, os.link, os.symlink], ids=["itself", "hard-link", "soft-link"])
def test_an_input_is_never_an_output(tmp_path, alias):
    path = qkv(tmp_path / "in.h5", normal((5, 8)))
    output = tmp_path / "out.h5"
    output = alias(path, output) or output
    with pytest.raises(ArgumentError, match="is an input"):
        _create(output, overwrite=True, inputs=(str(path),))


def test_an_input_under_the_name_of_the_unfinished_file_is_kept(tmp_path):
    path = qkv(tmp_path / "out.h5.part", normal((5, 8)))
    with pytest.raises(ArgumentError, match="is an input"):
        _create(tmp_path / "out.h5", inputs=(str(path),))
    assert path.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a small file system: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_refused_with_both_sizes_and_leaves_nothing(small_disk):
    with pytest.raises(StorageError, match=r"No space left.*needs 24.8 MiB; [34](\.\d+)? MiB are free"):
        _create(small_disk / "out.h5", (1, 1, 100_000, 64))
    assert os.listdir(small_disk) == []


def test_a_refused_reservation_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="cannot be allocated"):
        _create(tmp_path / "out.h5")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("missing", ["call", "support"])
def test_systems_without_reservation_fill_with_zeros(tmp_path, monkeypatch, missing):
    if missing == "call":
        monkeypatch.delattr(os, "posix_fallocate")
    else:

        def unsupported(descriptor, start, size):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    sink = _create(tmp_path / "out.h5", (1, 1, 100_000, 64))
    assert os.stat(tmp_path / "out.h5.part").st_blocks * 512 >= 100_000 * 65 * 4
    sink.finish()
    assert not dataset(f"{tmp_path}/out.h5:/out")[...].any()


def test_a_file_size_limit_is_refused_like_a_full_disk(tmp_path):
    code = f"""
import numpy as np, os, resource, sys
from cqsa_arrays.errors import StorageError
from cqsa_arrays.storage import Layout, OutputFile
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    OutputFile.create({str(tmp_path / "out.h5")!r}, shape=(1, 1, 100_000, 64), dtype=np.dtype("f4"),
                      layout=Layout("bhnd"), lse_dtype=None, attributes={{}})
except StorageError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "cannot be allocated" in said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_errors_while_writing_name_file_and_byte(tmp_path, monkeypatch, code):
    def fail(fd, data, at):
        raise OSError(code, os.strerror(code))

    with _create(tmp_path / "out.h5") as sink:
        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(StorageError, match=rf"out.h5: writing at byte \d+: {os.strerror(code)}"):
            sink.write_out(Range(0, 1), Range(0, 1), Range(0, 50), normal((1, 1, 50, 8)))


def test_short_system_writes_are_completed(tmp_path, monkeypatch):
    whole_write, out = os.pwrite, normal(SHAPE)
    with _create(tmp_path / "out.h5") as sink:
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole_write(fd, data[:100], at))
        _fill(sink, out, out[..., 0])
        sink.finish()
    assert np.array_equal(dataset(f"{tmp_path}/out.h5:/out")[...], out)


def test_whole_token_rows_are_written_in_one_call(tmp_path, monkeypatch):
    whole_write, calls = os.pwrite, []
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: calls.append(len(data)) or whole_write(fd, data, at))
    with _create(tmp_path / "out.h5", layout="bnhd", lse=None) as sink:
        sink.write_out(Range(0, 1), Range(0, 2), Range(0, 50), normal(SHAPE))
    assert calls == [50 * 2 * 8 * 4]


def test_writing_holds_no_more_than_its_staging(tmp_path):
    out = normal((1, 1, 200_000, 64))  # 48.8 MiB, narrowed
    with _create(tmp_path / "out.h5", out.shape, "f2", lse=None) as sink:
        sink.write_out(Range(0, 1), Range(0, 1), Range(0, 100), out[:, :, :100])
        reset_peak()
        before = resident_bytes()
        sink.write_out(Range(0, 1), Range(0, 1), Range(0, 200_000), out)
        assert peak_bytes() - before <= sink.staging_bytes + 1 * MIB


@pytest.mark.parametrize("dtype", ["i4", ">f4", "c8"])
def test_outputs_have_one_of_the_four_types(tmp_path, dtype):
    with pytest.raises(ArgumentError, match=r"^dtype"):
        _create(tmp_path / "out.h5", dtype=dtype)
    assert os.listdir(tmp_path) == []
