"""What the disk and the system do to a job; each is done for real to a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from durable_cases import (
    Fault,
    command,
    digest,
    log,
    make,
    run,
    unbroken,
)
from fault_cases import CASE, broken, goes_on, refused

from cqsa_arrays.storage.content import BLOCKS

# Reads of the samples of q, k and v, before the work begins.
SAMPLED = 3 * BLOCKS

# ---- reads and writes


@pytest.mark.parametrize("at", [1, 20, 60])
def test_a_read_that_fails(here, at) -> None:
    make(CASE)
    expected = unbroken(CASE)
    assert run(command(CASE), Fault("preadv", at + SAMPLED, broken, always=True)) == 2  # reading ahead is no matter
    assert "Input/output error" in log()
    assert "what was committed is kept: cqsa resume out.h5" in log()
    goes_on(expected)


def test_short_reads_and_writes(here) -> None:
    make(CASE)
    expected = unbroken(CASE)

    def short() -> None:
        read, write = os.preadv, os.pwrite
        os.preadv = lambda fd, buffers, at: read(fd, [buffers[0][: max(1, len(buffers[0]) // 3)]], at)
        os.pwrite = lambda fd, data, at: write(fd, data[: max(1, len(data) // 2)], at)

    assert run(command(CASE), short) == 0, log()
    assert digest() == expected


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_write_that_fails(here, call) -> None:
    make(CASE)
    expected = unbroken(CASE)
    assert run(command(CASE), Fault(call, 12, broken, always=True)) == 2
    assert "Input/output error" in log()
    goes_on(expected)


def broken_and_told(usual, *arguments, **named):
    with open("met", "w"):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    "call",
    [
        "fsync",
        "link",
        "listdir",
        "makedirs",
        "mkdir",
        "open",
        "posix_fallocate",
        "pwrite",
        "remove",
        "rename",
        "replace",
        "rmdir",
        "write",
    ],
)
def test_a_call_that_fails_once_anywhere_costs_one_line_and_no_work(here, call) -> None:
    """Making the job, committing, giving the output its name, removing what is left."""
    make(CASE)
    expected = unbroken(CASE)
    for at in (*range(1 + len(call) % 2, 12, 2), *range(13, 200, 34)):
        code = run(command(CASE), Fault(call, at, broken_and_told))
        if not os.path.exists("met"):
            assert code == 0
            break
        os.remove("met")
        if code != 0:
            assert code == 2
            assert "Input/output error" in log()
            assert "Traceback" not in log(), log()
            assert run([*command(CASE), *(["--overwrite"] if os.path.exists("out.h5") else [])]) == 0, log()
        assert digest() == expected
        os.remove("out.h5")


# ---- inputs


def test_an_input_that_is_cut_short_while_it_is_read(here) -> None:
    make(CASE)
    expected = unbroken(CASE)
    shutil.copy2("qkv.h5", "kept.h5")

    def cut(usual, *arguments):
        os.truncate("qkv.h5", 8192)
        return usual(*arguments)

    assert run(command(CASE), Fault("preadv", 120, cut)) == 2
    assert "qkv.h5" in log()
    assert "Traceback" not in log()
    refused("truncated")
    shutil.copy2("kept.h5", "qkv.h5")
    goes_on(expected)


def test_an_input_that_changes_while_it_is_read(here) -> None:
    make(CASE)
    expected = unbroken(CASE)
    shutil.copy2("qkv.h5", "kept.h5")

    def change(usual, *arguments):
        with open("qkv.h5", "r+b") as file:
            file.seek(200_000)
            file.write(b"other" * 10_000)
        return usual(*arguments)

    assert run(command(CASE), Fault("preadv", 14 + SAMPLED, change)) == 2
    assert "has changed while it was read" in log()
    refused("not the input that the unfinished job of out.h5 was begun with")
    shutil.copy2("kept.h5", "qkv.h5")
    goes_on(expected)


def test_another_input_of_the_same_size_and_time(begun) -> None:
    before = os.stat("qkv.h5")
    data = bytearray(Path("qkv.h5").read_bytes())
    half = len(data) // 2
    data[half:] = np.random.default_rng(3).permutation(np.frombuffer(data[half:], "u1")).tobytes()
    Path("qkv.h5").write_bytes(data)
    os.utime("qkv.h5", ns=(before.st_atime_ns, before.st_mtime_ns))
    refused("(different: sample)")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--scale", "0.5"], "scale: found 0.5; expected 0.25, as in the unfinished job of out.h5."),
        (["--dtype", "float64"], "dtype: found float64; expected float32, as in the unfinished job"),
        (["--offset", "3"], "--causal"),
        (["--lanes", "2"], "lanes: found 2; expected 1, as in the unfinished job"),
    ],
)
def test_another_problem_is_refused(begun, more, says) -> None:
    refused(says, *command(CASE), *more)
    goes_on(begun)


def test_another_budget_goes_on_with_the_plan_that_was_begun(begun) -> None:
    assert run([*command(CASE)[:-3], "--chunks", "3", "--causal", "--memory", "64MiB"]) == 0, log()
    assert digest() == begun


def test_a_budget_that_is_too_small_to_go_on(begun) -> None:
    refused("memory: ", "resume", "out.h5", "--memory", "100KiB")
    goes_on(begun)


# ---- the disk


@pytest.fixture
def small_disk(here):
    """Mounts a file system of so many KiB at ``disk``; skips where that is not allowed."""
    place = here / "disk"
    place.mkdir()

    def mount(kib: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", place], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"cannot mount a file system: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "-l", place], capture_output=True)


@pytest.mark.parametrize("kib", [64, 450, 800])
def test_a_disk_that_is_full_at_the_start(small_disk, kib) -> None:
    """No room for the output, for the states, for the record."""
    small_disk(kib)
    make(CASE)
    argv = ["disk/out.h5" if word == "out.h5" else word for word in command(CASE)]
    assert run(argv) == 2
    assert "No space left on device" in log() or "disk is full" in log(), log()
    assert os.listdir("disk") == []


def test_a_disk_that_becomes_full(small_disk) -> None:
    small_disk(4000)
    make(CASE)
    argv = ["disk/out.h5" if word == "out.h5" else word for word in command(CASE)]
    assert run(argv) == 0, log()
    expected = digest("disk/out.h5")
    os.remove("disk/out.h5")

    def fill(usual, *arguments):
        with open("disk/filler", "wb") as file:
            try:
                while True:
                    file.write(bytes(4096))
                    file.flush()
            except OSError:
                pass
        return usual(*arguments)

    assert run(argv, Fault("pwrite", 6, fill)) == 2
    assert "full" in log() or "No space left on device" in log(), log()
    os.remove("disk/filler")
    assert run(argv) == 0, log()
    assert digest("disk/out.h5") == expected


def test_a_folder_that_is_removed_while_it_is_written(here) -> None:
    make(CASE)
    os.mkdir("sub")
    argv = ["sub/out.h5" if word == "out.h5" else word for word in command(CASE)]

    def gone(usual, *arguments):
        shutil.rmtree("sub")
        return usual(*arguments)

    assert run(argv, Fault("pwrite", 5, gone)) == 2
    assert "Traceback" not in log()
    assert "out.h5" in log()
    os.mkdir("sub")
    assert run(argv) == 0, log()
