"""Inputs whose file is closed, gone, another by now, or never was one on a disk: a right result, or one clear line."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np
import pytest
from command_line import run_command

import cqsa_arrays as cqsa
from cqsa_arrays import Options
from cqsa_arrays.ranges import Range
from cqsa_arrays.storage import as_source


def arrays(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, 2, 300, 16)).astype("f4")


def write(file: h5py.File, seed: int = 0) -> h5py.File:
    """/q, /k (chunked) and /v."""
    for name, array in zip("qkv", arrays(seed), strict=True):
        file.create_dataset(name, data=array, chunks=(1, 40, 16) if name == "k" else None)
    return file


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return cqsa.attention(*arrays())


# ---- closed


@pytest.mark.parametrize("call", [cqsa.attention, cqsa.plan, cqsa.statistics])
@pytest.mark.parametrize("name", "qkv")
def test_a_data_set_of_a_closed_file_is_named(call, name, folder):
    with write(h5py.File("in.h5", "w")) as file:
        closed = file[name]
    operands = {one: closed if one == name else array for one, array in zip("qkv", arrays(), strict=True)}
    with pytest.raises(cqsa.ArgumentError, match=rf"^{name}: found a data set of a closed file; expected an open one"):
        call(**operands)


@pytest.mark.parametrize("place", [0, 1])
def test_compare_names_a_data_set_of_a_closed_file(place, folder):
    with write(h5py.File("in.h5", "w")) as file:
        operands = [arrays()[0], arrays()[0]]
        operands[place] = file["q"]
    name = ("out", "reference")[place]
    with pytest.raises(cqsa.ArgumentError, match=rf"^{name}: found a data set of a closed file"):
        cqsa.compare(*operands)


# ---- gone, or another


def unlink() -> None:
    os.remove("in.h5")


def replace() -> None:
    """Another file gets the name, as editors and rsync do it, its data in the same places."""
    write(h5py.File("other.h5", "w"), seed=5).close()
    os.replace("other.h5", "in.h5")


def change_directory() -> None:
    os.mkdir("below")
    os.chdir("below")


def change_to_another_of_that_name() -> None:
    change_directory()
    write(h5py.File("in.h5", "w"), seed=5).close()


LOST = {one.__name__: one for one in (unlink, replace, change_directory, change_to_another_of_that_name)}


@pytest.mark.parametrize("lose", LOST)
def test_an_open_data_set_is_read_whatever_has_its_name_now(lose, folder, expected):
    write(h5py.File("in.h5", "w")).close()
    with h5py.File("in.h5", "r") as file:
        LOST[lose]()
        assert np.array_equal(cqsa.attention(file["q"], file["k"], file["v"]), expected)
        out = cqsa.attention(file["q"], file["k"], file["v"], out="out.h5")
        assert np.array_equal(out[...], expected)
        # What it was made of cannot be told from a name.
        with pytest.raises(cqsa.ArgumentError, match="q was an array in memory"):
            cqsa.verify("out.h5")


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("lose", LOST)
def test_a_durable_job_of_a_file_that_lost_its_name_is_refused(name, lose, folder):
    write(h5py.File("in.h5", "w")).close()
    with h5py.File("in.h5", "r") as file:
        LOST[lose]()
        before = sorted(os.listdir())
        operands = {one: file[name] if one == name else array for one, array in zip("qkv", arrays(), strict=True)}
        with pytest.raises(cqsa.ArgumentError, match=rf"^{name}: found in\.h5:/{name}, .*in no file of that name"):
            cqsa.attention(**operands, out="out.h5", options=Options(durable=True))
        assert sorted(os.listdir()) == before


def maps() -> list[np.memmap]:
    made = []
    for name, array in zip("qkv", arrays(), strict=True):
        array.tofile(f"{name}.raw")
        made.append(np.memmap(f"{name}.raw", "f4", "r", shape=array.shape))
    return made


@pytest.mark.parametrize("durable", [False, True])
def test_maps_of_files_that_are_gone_are_read(durable, folder, expected):
    made = maps()
    for name in "qkv":
        os.remove(f"{name}.raw")
    assert np.array_equal(cqsa.attention(*made), expected)
    assert np.array_equal(cqsa.statistics(*made).output(), expected)
    assert cqsa.plan(*made).problem.query_tokens == 300
    out = cqsa.attention(*made, out="out.h5", options=Options(durable=durable))
    assert np.array_equal(out[...], expected)
    assert os.listdir() == ["out.h5"]


# ---- no file on a disk


@pytest.fixture(params=["core", "core with backing store", "BytesIO", "fsspec", "split", "family"])
def elsewhere(request, folder) -> Iterator[h5py.File]:
    """/q, /k and /v in an open file of each kind."""
    with ExitStack() as stack:
        if request.param == "BytesIO":
            file = h5py.File(io.BytesIO(), "w")
        elif request.param == "fsspec":
            fsspec = pytest.importorskip("fsspec")
            with io.BytesIO() as stream:
                write(h5py.File(stream, "w")).close()
                fsspec.filesystem("memory").pipe("/in.h5", stream.getvalue())
            yield stack.enter_context(h5py.File(stack.enter_context(fsspec.open("memory://in.h5", "rb")), "r"))
            return
        else:
            options = {
                "core": {"driver": "core", "backing_store": False},
                "core with backing store": {"driver": "core"},
                "split": {"driver": "split"},
                "family": {"driver": "family", "memb_size": 1 << 16},
            }[request.param]
            file = h5py.File("in%d.h5" if request.param == "family" else "in.h5", "w", **options)
        yield write(stack.enter_context(file))


def test_files_in_memory_and_in_parts_are_read(elsewhere, folder, expected):
    operands = [elsewhere[name] for name in "qkv"]
    assert np.array_equal(cqsa.attention(*operands), expected)
    out = cqsa.attention(*operands, out="out.h5")
    assert np.array_equal(out[...], expected)
    with pytest.raises(cqsa.ArgumentError, match="q was an array in memory"):
        cqsa.verify("out.h5")


@pytest.mark.parametrize("name", "qkv")
def test_a_durable_job_of_them_is_refused_before_any_work(name, elsewhere, folder):
    before = sorted(os.listdir())
    operands = {one: elsewhere[name] if one == name else array for one, array in zip("qkv", arrays(), strict=True)}
    for call in (cqsa.plan, cqsa.attention):
        with pytest.raises(cqsa.ArgumentError, match=rf"^{name}: found .*:/{name}, .*in no file of that name"):
            call(**operands, out="out.h5", options=Options(durable=True))
    assert sorted(os.listdir()) == before


def test_what_the_refusal_says_to_do_works(folder, expected):
    with write(h5py.File("in.h5", "w", driver="core", backing_store=False)) as file:
        q, k, v = (file[name] for name in "qkv")
        options = Options(durable=True)
        with pytest.raises(cqsa.ArgumentError, match=r"pass q\[\.\.\.\]"):
            cqsa.attention(q, k, v, out="out.h5", options=options)
        out = cqsa.attention(q[...], k[...], v[...], out="out.h5", options=options)
    assert np.array_equal(out[...], expected)


def test_a_file_that_was_read_into_memory_is_not_overwritten(folder):
    write(h5py.File("in.h5", "w")).close()
    before = Path("in.h5").read_bytes()
    with (
        h5py.File("in.h5", "r", driver="core") as file,
        pytest.raises(cqsa.ArgumentError, match=r"out: found in\.h5, which is an input"),
    ):
        cqsa.attention(file["q"], file["k"], file["v"], out="in.h5", options=Options(overwrite=True))
    assert Path("in.h5").read_bytes() == before


@pytest.mark.parametrize("driver", ["sec2", "stdio"])
def test_a_durable_job_of_an_open_file_on_a_disk_is_done_and_verified(driver, folder, expected, capsys):
    write(h5py.File("in.h5", "w")).close()
    with h5py.File("in.h5", "r", driver=driver) as file:
        out = cqsa.attention(file["q"], file["k"], file["v"], out="out.h5", options=Options(durable=True))
    assert np.array_equal(out[...], expected)
    assert run_command(capsys, "verify", "out.h5").code == 0


@pytest.mark.parametrize("name", "qk")
def test_a_file_that_is_closed_while_it_is_read_is_named(name, folder):
    """By another thread."""
    file = write(h5py.File("in.h5", "w"))
    source = as_source(file[name], name)
    everything = Range(0, 1), Range(0, 2), Range(0, 300)
    out = np.empty((1, 2, 300, 16), "f4")
    source.read(*everything, out)
    file.close()
    with pytest.raises(cqsa.StorageError, match=rf"in\.h5:/{name}: its file was closed while it was read"):
        source.read(*everything, out)
    list(source.prefetch(*everything))
    source.close()
