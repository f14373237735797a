"""What the disk, the system and other people do to a job; each is done for real to a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from glob import glob
from pathlib import Path

import numpy as np
import pytest
from campaign import flipped_ledgers
from durable_cases import (
    CASES,
    Fault,
    KilledAtCommit,
    command,
    digest,
    kill_after,
    log,
    make,
    run,
    slow,
    start,
    unbroken,
    wait,
)

import cqsa_arrays as cqsa
from cqsa_arrays import Options, StorageError
from cqsa_arrays.durable import checkpoint
from cqsa_arrays.durable.ledger import Ledger

CASE, TILES = CASES[0], CASES[2]
LEDGER = "out.h5.job/ledger.sqlite"


def broken(usual, *arguments):
    raise OSError(5, "Input/output error")


def refused(says: str, *argv: str) -> None:
    """The next run says this in one line, and exits with 2."""
    assert run(list(argv) or command(CASE)) == 2
    text = log()
    assert says in text, text
    assert "Traceback" not in text
    assert text.count("\n") == 1


def goes_on(expected: str, case=CASE) -> None:
    assert run(command(case)) == 0, log()
    assert digest() == expected
    assert sorted(set(os.listdir()) - {"run.log", "kept.h5"}) == ["out.h5", "qkv.h5"]


@pytest.fixture
def begun(here):
    """An unfinished job of ``CASE``, and the hash of what it should become."""
    make(CASE)
    expected = unbroken(CASE)
    assert run(command(CASE), KilledAtCommit(5)) == -signal.SIGKILL
    return expected


# ---- reads and writes


@pytest.mark.parametrize("at", [1, 20, 60])
def test_a_read_that_fails(here, at) -> None:
    make(CASE)
    expected = unbroken(CASE)
    assert run(command(CASE), Fault("preadv", at + 96, broken)) == 2
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
    "call", ["fsync", "makedirs", "open", "posix_fallocate", "pwrite", "remove", "replace", "unlink"]
)
def test_a_call_that_fails_once_anywhere_costs_one_line_and_no_work(here, call) -> None:
    """Making the job, committing, giving the output its name, removing what is left."""
    make(CASE)
    expected = unbroken(CASE)
    for at in (*range(1, 12), *range(13, 200, 17)):
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
            file.write(b"other")
        os.utime("qkv.h5", ns=(1, 1))
        return usual(*arguments)

    assert run(command(CASE), Fault("preadv", 110, change)) == 2
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
    """No room for the output, for the states, for the ledger."""
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


# ---- the record and the states


def test_a_ledger_that_another_program_locks(begun) -> None:
    holder = sqlite3.connect(LEDGER, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")

    def impatient() -> None:
        from cqsa_arrays.durable import ledger

        ledger.PATIENCE_S = 0.2

    assert run(command(CASE), impatient) == 2
    assert "locked by another program" in log()
    holder.close()
    goes_on(begun)


@pytest.mark.parametrize("what", ["cut", "garbage", "empty", "another format", "another version", "no job", "no lane"])
def test_a_ledger_that_is_no_good_any_more(begun, what) -> None:
    says = "damaged"
    if what in ("cut", "garbage", "empty"):
        data = Path(LEDGER).read_bytes()
        Path(LEDGER).write_bytes({"cut": data[:5000], "garbage": b"x" * len(data), "empty": b""}[what])
        says = "damaged" if what != "empty" else "a record of format 0"
    elif what == "another format":
        with sqlite3.connect(LEDGER) as connection:
            connection.execute("PRAGMA user_version = 7")
        connection.close()
        says = "a record of format 7; this version reads 1"
    else:
        with Ledger(LEDGER) as ledger:
            if what == "another version":
                ledger.commit({"job": {**ledger.get("job"), "package": "9.9"}})
                says = "an unfinished job of cqsa_arrays 9.9"
            elif what == "no job":
                ledger.commit({}, drop=["job"])
            else:
                states = next(iter(ledger.facts("states/0/")))
                ledger.commit({}, drop=[states])
    refused(says)
    assert run([*command(CASE), "--restart"]) == 0, log()
    assert digest() == begun


def test_every_flipped_byte_of_a_ledger_is_noticed_or_does_no_harm(here) -> None:
    done = flipped_ledgers(40, 0, here)
    assert done["wrong"] == 0
    assert 0 < int(re.search(r"(\d+) times noticed", done["what"])[1]) < 40


def test_states_that_are_damaged(begun) -> None:
    path = next(Path("out.h5.job").glob("*-states-0"))
    path.write_bytes(bytes(len(path.read_bytes())))
    refused("is not what was committed: the file is damaged. Start the job over with --restart")
    assert run([*command(CASE), "--restart"]) == 0, log()
    assert digest() == begun


def test_states_that_are_cut_short_or_gone(begun) -> None:
    path = next(Path("out.h5.job").glob("*-states-0"))
    os.truncate(path, 100)
    refused("is shorter than what was reserved")
    path.unlink()
    refused("states: cannot open")


def test_finished_rows_that_are_damaged(here) -> None:
    make(TILES)
    expected = unbroken(TILES)
    assert run(command(TILES), KilledAtCommit(8)) == -signal.SIGKILL
    with open("out.h5.part", "r+b") as file:
        file.seek(4096 + 100)
        file.write(b"rubbish")
    refused("are not what was committed: the file is damaged", *command(TILES))
    assert run([*command(TILES), "--restart"]) == 0, log()
    assert digest() == expected


@pytest.mark.parametrize("what", ["gone", "another", "cut"])
def test_an_unfinished_output_that_is_gone_or_another(begun, what) -> None:
    if what == "gone":
        os.remove("out.h5.part")
    elif what == "another":
        shutil.copy("qkv.h5", "out.h5.part")
    else:
        os.truncate("out.h5.part", 20_000)
    refused("out.h5.part")
    assert run([*command(CASE), "--restart"]) == 0, log()


def test_a_job_is_not_written_over(begun) -> None:
    """By a call that is no job, and by ``make``."""
    with pytest.raises(cqsa.ArgumentError, match=r"out\.h5, of which a job is unfinished"):
        cqsa.attention(*(f"qkv.h5:/{name}" for name in "qkv"), out="out.h5", device="cpu")
    refused("of which a job is unfinished", "make", "out.h5", "--tokens", "10")
    goes_on(begun)


# ---- other processes


def test_two_processes_on_one_lane(here) -> None:
    make(CASE)
    expected = unbroken(CASE)

    first = start(command(CASE), slow)
    while not glob("out.h5.job/*-states-0.lock"):
        time.sleep(0.01)
    time.sleep(0.1)
    assert run(command(CASE)) == 3
    assert f"lane 0 is computed by process {first} on" in log()
    assert run([*command(CASE), "--restart"]) == 3
    assert "stop that first" in log()
    os.kill(first, signal.SIGKILL)
    wait(first)
    goes_on(expected)  # the lock of a dead process is none


def test_a_process_that_was_killed_leaves_no_lock(begun) -> None:
    for _ in range(3):
        kill_after(start(command(CASE)), 0.03)
    assert os.path.exists("out.h5") or run(command(CASE)) == 0, log()
    assert digest() == begun


# ---- what a review found


def test_a_copied_job_is_a_job_of_its_own(begun) -> None:
    os.mkdir("copy")
    shutil.copytree("out.h5.job", "copy/out.h5.job")
    shutil.copy2("out.h5.part", "copy/out.h5.part")
    os.chdir("copy")
    assert run(["resume", "out.h5", "--quiet"]) == 0, log()
    assert digest() == begun
    os.chdir("..")
    shutil.rmtree("copy")
    goes_on(begun)


def test_a_folder_of_somebody_else_is_left_alone(here) -> None:
    make(CASE)
    os.mkdir("out.h5.job")
    Path("out.h5.job/notes.txt").write_text("mine")
    refused("out.h5.job holds notes.txt, which is of no job")
    refused("out.h5.job holds notes.txt, which is of no job", *command(CASE), "--restart")
    Path("out.h5").write_text("an output")
    refused("found out.h5, which exists")
    assert Path("out.h5.job/notes.txt").read_text() == "mine"


def test_a_restart_that_is_refused_drops_nothing(begun) -> None:
    shutil.copytree("out.h5.job", "kept.job")
    Path("out.h5").write_text("somebody else's")
    refused("found out.h5, which exists", *command(CASE), "--restart")
    assert sorted(os.listdir("out.h5.job")) == sorted(os.listdir("kept.job"))
    shutil.rmtree("kept.job")
    os.remove("out.h5")
    goes_on(begun)


def test_a_commit_that_nobody_knows_of_leaves_the_slots_alone(here) -> None:
    """It is on the disk, and an error is reported: what it names must stay."""
    make(CASE)
    argv = [word if word != "0" else "0.001" for word in command(CASE)]
    assert run(argv) == 0
    expected = digest()
    os.remove("out.h5")

    def reported() -> None:
        slow()
        checkpoint.SHARE = 1e9  # as often as there is time
        usual, calls = Ledger.commit, []

        def commit(self, facts, drop=()):
            usual(self, facts, drop)
            calls.append(1)
            if len(calls) == 4:
                raise StorageError("the folder could not be synced")

        Ledger.commit = commit

    assert run(argv, reported) == 2
    assert "could not be synced" in log()
    assert run(argv) == 0, log()
    assert digest() == expected


def test_numbers_of_numpy(here) -> None:
    x = np.ones((1, 300, 8), "f4")
    options = Options(durable=True, lanes=np.int64(2), chunks=np.int64(3), checkpoint_s=np.float32(1))
    cqsa.attention(x, x, x, out="out.h5", device="cpu", memory=np.int64(64 << 20), options=options)
    assert os.listdir() == ["out.h5"]
