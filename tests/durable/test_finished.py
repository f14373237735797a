"""An output that is there already: what is asked for, so that nothing is left to do, or something else."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from durable_cases import CASES, Fault, command, digest, log, make, run, run_and_read, unbroken

import cqsa_arrays as cqsa
from cqsa_arrays.durable import job
from cqsa_arrays.durable.ending import was_finished
from cqsa_arrays.storage import dataset_in, sampled_hash

CASE = CASES[0]
QKV = [f"qkv.h5:/{name}" for name in "qkv"]
DURABLE = cqsa.Options(durable=True)
EXISTS = "--out: found out.h5, which exists; expected a new file"


@pytest.fixture
def finished(here) -> tuple[str, int]:
    """The hash of an output, and when it was written."""
    make(CASE)
    time.sleep(0.02)  # times of files go on in steps
    assert run(command(CASE)) == 0
    return digest(), os.stat("out.h5").st_mtime_ns


def is_untouched(finished: tuple[str, int]) -> bool:
    return (digest(), os.stat("out.h5").st_mtime_ns) == finished


def test_a_process_that_comes_late_ends_well(finished) -> None:
    """One of many that a scheduler has begun with the same command, or the one that it begins again."""
    argv = [word for word in command(CASE) if word != "--quiet"]
    assert "nothing was left to compute (--overwrite computes it anew)" in run_and_read(argv)
    said = json.loads(run_and_read([*argv, "--json"]))
    assert (said["elapsed_s"], said["input_read_bytes"]) == (0, 0)
    for more in (["--memory", "64MiB"], ["--lanes", "3"]):  # the same problem, by another plan
        assert run([*command(CASE), *more]) == 0, log()
    assert is_untouched(finished)
    assert sorted(os.listdir()) == ["out.h5", "qkv.h5"]


def test_resuming_what_is_finished_ends_well(finished) -> None:
    assert run_and_read(["resume", "out.h5"]).startswith("out.h5: finished, computed on cpu")
    assert json.loads(run_and_read(["resume", "out.h5", "--json"]))["finished"] is True
    assert run_and_read(["resume", "out.h5", "--quiet"]) == ""
    assert is_untouched(finished)


def changed() -> None:
    with h5py.File("qkv.h5", "r+") as file:
        file["k"][0, 0, 0, 0] = 3


def emptied() -> None:
    Path("out.h5").write_bytes(b"")


def without_inputs() -> None:
    with h5py.File("out.h5", "r+") as file:
        del file.attrs["inputs"]


def of_another_version() -> None:
    with h5py.File("out.h5", "r+") as file:
        file.attrs["creator"] = "cqsa_arrays 0.0.1"


@pytest.mark.parametrize("harm", [changed, lambda: os.utime("qkv.h5"), emptied, without_inputs, of_another_version])
def test_another_file_or_input_is_not_it(finished, harm) -> None:
    """A touch is enough: a change between the sampled blocks would not be seen otherwise."""
    time.sleep(0.02)
    harm()
    there = digest()
    assert run(command(CASE)) == 2
    assert EXISTS in log()
    assert digest() == there


@pytest.mark.parametrize(
    "more", [["--offset", "1"], ["--scale", "0.5"], ["--dtype", "float64"], ["--check-inputs", "full"], ["--restart"]]
)
def test_another_problem_is_not_it(finished, more) -> None:
    argv = [word for word in command(CASE) if word != "--causal"] if "--offset" in more else command(CASE)
    assert run([*argv, *more]) == 2
    assert EXISTS in log()
    assert is_untouched(finished)


def test_it_is_computed_again_where_that_is_asked_for(finished) -> None:
    assert run([*command(CASE), "--overwrite"]) == 0, log()
    assert digest() == finished[0]
    assert os.stat("out.h5").st_mtime_ns != finished[1]


def test_in_python_files_are_known_again_and_arrays_are_not(here) -> None:
    """Of an array nothing says when it was changed last."""
    make(CASE)
    time.sleep(0.02)
    first = cqsa.attention(*QKV, out="out.h5", options=DURABLE)
    written = os.stat("out.h5").st_mtime_ns
    again = cqsa.attention(*QKV, out="out.h5", options=DURABLE)
    assert os.stat("out.h5").st_mtime_ns == written
    assert (again[...] == first[...]).all()
    ones = np.ones((2, 60, 8), "f4")
    cqsa.attention(ones, ones, ones, out="ones.h5", options=DURABLE)
    with pytest.raises(cqsa.ArgumentError, match=r"found ones\.h5, which exists"):
        cqsa.attention(ones, ones, ones, out="ones.h5", options=DURABLE)
    assert cqsa.attention(ones, ones, ones, out="ones.h5", options=replace(DURABLE, overwrite=True)).shape == ones.shape


def test_another_file_with_the_same_samples_is_not_it(here) -> None:
    """Older than the output, of the same size and blocks; named, or behind a link that leads elsewhere by now."""
    for name in ("one", "two"):
        os.mkdir(name)
        os.chdir(name)
        make(CASE)
        os.chdir("..")
    change_between_samples("two/qkv.h5")
    time.sleep(0.02)
    argv = ["one/qkv.h5" if word == "qkv.h5" else word for word in command(CASE)]
    assert run(argv) == 0
    assert run(argv) == 0, log()
    assert run(["two/qkv.h5" if word == "qkv.h5" else word for word in command(CASE)]) == 2
    assert EXISTS in log()
    os.symlink("one", "now")
    time.sleep(0.02)
    argv = ["now/qkv.h5" if word == "qkv.h5" else word for word in command(CASE)]
    assert run([*argv, "--overwrite"]) == 0
    os.remove("now")
    os.symlink("two", "now")
    assert run(argv) == 2
    assert EXISTS in log()


def change_between_samples(path: str) -> None:
    """Of a key that no hash of samples touches."""
    with closing(dataset_in(path, "/k").source()) as source:
        before = sampled_hash(source)
    for token in range(2000):
        with h5py.File(path, "r+") as file:
            kept = file["k"][0, 1, token].copy()
            file["k"][0, 1, token] = 7
        with closing(dataset_in(path, "/k").source()) as source:
            if sampled_hash(source) == before:
                return
        with h5py.File(path, "r+") as file:
            file["k"][0, 1, token] = kept
    raise AssertionError("every token is sampled")


def test_a_map_whose_changes_are_not_in_its_file_is_an_array(here) -> None:
    np.full((2, 60, 8), 1, "f4").tofile("x.bin")
    time.sleep(0.02)
    x = np.memmap("x.bin", "f4", mode="c", shape=(2, 60, 8))
    cqsa.attention(x, x, x, out="out.h5", options=DURABLE)
    with pytest.raises(cqsa.ArgumentError, match=r"found out\.h5, which exists"):
        cqsa.attention(x, x, x, out="out.h5", options=DURABLE)


def test_nothing_is_left_of_a_job_that_was_killed_at_its_very_end(here) -> None:
    """After its record is gone and before the second name of the output is, which only the next run can see."""
    make(CASE)
    expected = unbroken(CASE)
    assert run(command(CASE), Fault("rename", 1, _killed_behind_the_record, always=True)) == -signal.SIGKILL
    assert {"out.h5", "out.h5.part"} < set(os.listdir())
    assert run(command(CASE)) == 0, log()
    assert digest() == expected
    assert sorted(set(os.listdir()) - {"run.log"}) == ["out.h5", "qkv.h5"]


def _killed_behind_the_record(usual, source, to, **named) -> None:
    usual(source, to, **named)
    if os.path.basename(to) == "ended":
        os.kill(os.getpid(), signal.SIGKILL)


def test_an_output_whose_name_is_seen_late_is_not_lost(here) -> None:
    """Another machine has just finished the job: its record is still seen here, and the name of its output not yet."""
    make(CASE)
    expected = unbroken(CASE)
    assert run(command(CASE), Fault("rename", 1, _killed_before_the_record, always=True)) == -signal.SIGKILL

    def late() -> None:
        looks = iter([False] * 4)
        job.was_finished = lambda *of: next(looks, None) is None and was_finished(*of)

    assert run(command(CASE), late) == 0, log()
    assert digest() == expected


def _killed_before_the_record(usual, source, to, **named) -> None:
    if os.path.basename(to) == "ended":
        os.kill(os.getpid(), signal.SIGKILL)
    usual(source, to, **named)
