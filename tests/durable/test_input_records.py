"""What outputs and the records of jobs say of their inputs, and how that is read back."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np
import pytest
from durable_cases import command, digest, folder, log, make, run
from fault_cases import refused
from input_cases import CASE, NAMED, VERIFY, finished, move_inputs, touch

import cqsa_arrays as cqsa


def attributes(path: str | Path = "out.h5") -> dict[str, object]:
    with h5py.File(path) as file:
        return dict(file.attrs)


@pytest.mark.parametrize("more", [(), ("--memory", "1250KiB", "--scratch", "tmp"), ("--check-inputs", "full")])
def test_the_same_job_in_two_folders_gives_the_same_bytes(here, more) -> None:
    for name in ("one", "two"):
        with folder(here / name / "results"):
            os.mkdir("tmp")
        with folder(here / name):
            make(CASE)
            words = [word.replace("tmp", "results/tmp") for word in command(CASE, *more)]
            assert run(["results/out.h5" if word == "out.h5" else word for word in words]) == 0, log()
            os.utime("qkv.h5", ns=(7, 7))
    assert digest("one/results/out.h5") == digest("two/results/out.h5")
    for name, value in attributes("one/results/out.h5").items():
        assert str(here) not in str(value), name
    stored = json.loads(str(attributes("one/results/out.h5")["inputs"]))["q"]
    assert (stored["relative"], stored["given"], stored["dataset"]) == ("../qkv.h5", "qkv.h5", "/q")
    assert not {"path", "mtime_ns", "ctime_ns", "inode"} & set(stored)
    assert ("full" in stored) == ("full" in more)


def test_calls_that_are_not_durable_say_the_same(here) -> None:
    for name in ("one", "two"):
        with folder(here / name):
            make(CASE)
            cqsa.attention(*(f"qkv.h5:/{one}" for one in "qkv"), out="out.h5", device="cpu")
            q, k, v = (getattr(cqsa.open("qkv.h5"), one) for one in "qkv")
            cqsa.attention(q, k, v, out=os.path.abspath("opened.h5"), device="cpu")
    for name in ("out.h5", "opened.h5"):
        assert digest(f"one/{name}") == digest(f"two/{name}")
    stored = json.loads(str(attributes("one/opened.h5")["inputs"]))["q"]
    assert stored["relative"] == "qkv.h5"
    assert "given" not in stored
    os.rename("one", "three")
    assert cqsa.verify("three/opened.h5", rows=16).passed


def test_data_sets_of_one_name_in_files_in_memory_are_not_taken_for_one(here) -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 50, 8)).astype("f4")
    with ExitStack() as stack:
        files = [stack.enter_context(h5py.File(f"{i}.h5", "w", driver="core", backing_store=False)) for i in range(3)]
        for file, array in zip(files, x, strict=True):
            file["x"] = array
        cqsa.attention(*(file["x"] for file in files), out="out.h5", device="cpu")
    stored = json.loads(str(attributes()["inputs"]))
    assert len({one["sample"] for one in stored.values()}) == 3
    with h5py.File("in.h5", "w") as file:
        for name, array in zip("qkv", x, strict=True):
            file[name] = array
    with pytest.raises(cqsa.ArgumentError, match="q was an array in memory"):
        cqsa.verify("out.h5")
    assert cqsa.verify("out.h5", q="in.h5", k="in.h5", v="in.h5").passed
    with pytest.raises(cqsa.StorageError, match=r"q: in\.h5:/k is not the input that out\.h5 was computed from"):
        cqsa.verify("out.h5", q="in.h5:/k", k="in.h5", v="in.h5")


def test_an_output_is_found_through_links(here) -> None:
    with folder(here / "real"):
        make(CASE)
        finished()
    os.mkdir("links")
    os.symlink("../real/out.h5", "links/out.h5")
    os.symlink("real", "folder")
    for path in ("links/out.h5", "folder/out.h5"):
        assert run(["verify", path, "--rows", "16"]) == 0, log()


def as_earlier_versions_wrote_it(path: str = "out.h5") -> None:
    with h5py.File(path, "a") as file:
        inputs = json.loads(file.attrs["inputs"])
        for name, one in inputs.items():
            found = getattr(cqsa.open("qkv.h5"), name).stored
            inputs[name] = {**found.identity, "layout": one["layout"]}
        file.attrs["inputs"] = json.dumps(inputs)


def test_outputs_of_earlier_versions_are_verified(here) -> None:
    make(CASE)
    finished()
    as_earlier_versions_wrote_it()
    assert run(VERIFY) == 0, log()
    touch()
    assert run(VERIFY) == 0, log()
    refused("check-inputs: found full", *VERIFY, "--check-inputs", "full")
    move_inputs()
    refused("--q FILE.h5:/PATH", *VERIFY)
    assert run([*VERIFY, *NAMED]) == 0, log()
    with h5py.File("elsewhere/other.h5", "a") as file:
        file["more"] = [1.0] * 5000
    refused("(different: size)", *VERIFY, *NAMED)


HOSTILE = [
    ("shape", 5), ("shape", []), ("shape", [1, 3, 2000, -1]), ("shape", [1, 3, 2000, True]), ("shape", [2**70] * 4),
    ("shape", ["1"] * 4), ("dtype", "int8"), ("dtype", None), ("layout", "dnhb"), ("layout", "bhnd"), ("size", -1),
    ("size", 1.5), ("size", True), ("sample", "x" * 64), ("sample", 5), ("sample", "ab"), ("full", 7), ("full", ""),
    ("relative", 5), ("relative", ""), ("relative", "a\0b"), ("relative", "/etc/passwd"), ("relative", "\ud800"),
    ("path", 3), ("path", ""), ("given", ["x"]), ("given", "\0"), ("dataset", 5), ("dataset", "a\0"),
    ("dataset", "\ud800"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), HOSTILE, ids=str)
def test_what_an_output_says_is_checked(here, field, value) -> None:
    x = [[1.0] * 8] * 20
    with h5py.File("in.h5", "w") as file:
        for name in "qkv":
            file.create_dataset(name, data=x, dtype="f4")
    cqsa.attention("in.h5:/q", "in.h5:/k", "in.h5:/v", out="out.h5", device="cpu")
    with h5py.File("out.h5", "a") as file:
        inputs = json.loads(file.attrs["inputs"])
        inputs["k"][field] = value
        file.attrs["inputs"] = json.dumps(inputs)
    with pytest.raises(cqsa.ArgumentError, match=rf"^path: found out\.h5 without them \(.*k: {field} is "):
        cqsa.verify("out.h5", rows=4)


@pytest.mark.parametrize("field", ["inode", "ctime_ns", "mtime_ns"])
@pytest.mark.parametrize("value", [None, "5", 1.0, True, 2**80, [1]], ids=str)
def test_what_a_record_says_is_checked(field, value) -> None:
    from cqsa_arrays.durable.inputs import read_known_inputs

    one = {"layout": "nd", "shape": [4, 2], "dtype": "float32", "size": 99, "sample": "0" * 64, "relative": "x.h5",
           "dataset": "/q", "inode": 1, "ctime_ns": 2, "mtime_ns": 3}  # fmt: skip
    assert read_known_inputs(dict.fromkeys("qkv", one), "out.h5")["q"].hints is not None
    for broken in ({**one, field: value}, 5, None, {name: one[name] for name in one if name != "sample"}):
        with pytest.raises(cqsa.StorageError, match=r"^out\.h5\.job: its record is damaged \(.*v"):
            read_known_inputs({"q": one, "k": one, "v": broken}, "out.h5")
    for broken in (None, [], {"q": one}):
        with pytest.raises(cqsa.StorageError, match="its record is damaged"):
            read_known_inputs(broken, "out.h5")
