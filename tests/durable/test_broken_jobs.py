"""What becomes of the record and the states of a job, and other people of it; each is done for real."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import time
from glob import glob
from pathlib import Path

import numpy as np
import pytest
from campaign import flipped_ledgers
from durable_cases import (
    KilledAtCommit,
    command,
    digest,
    kill_after,
    log,
    make,
    run,
    slow,
    start,
    stuck,
    unbroken,
    wait,
)
from fault_cases import CASE, LEDGER, TILES, goes_on, refused

import cqsa_arrays as cqsa
from cqsa_arrays import Options, StorageError
from cqsa_arrays.durable import checkpoint
from cqsa_arrays.durable.ledger import Ledger

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

    first = start(command(CASE), stuck)
    try:
        while not glob("out.h5.job/*-states-0.lock"):
            time.sleep(0.01)
        time.sleep(0.1)  # until it is taken
        assert run(command(CASE)) == 3
        assert f"lane 0 is computed by process {first} on" in log()
        assert run([*command(CASE), "--restart"]) == 3
        assert "stop that first" in log()
    finally:
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
