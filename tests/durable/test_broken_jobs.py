"""What becomes of the record and the states of a job, and other people of it; each is done for real."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
import zlib
from glob import glob
from pathlib import Path

import numpy as np
import pytest
from campaign import flipped_records
from durable_cases import (
    KilledAtCommit,
    command,
    digest,
    kill_after,
    log,
    make,
    run,
    run_and_read,
    slow,
    start,
    stuck,
    unbroken,
    wait,
)
from fault_cases import CASE, RECORD, TILES, goes_on, in_job, refused

import cqsa_arrays as cqsa
from cqsa_arrays import Options, StorageError
from cqsa_arrays.durable import checkpoint, job
from cqsa_arrays.durable.attempt import Attempt
from cqsa_arrays.durable.records import read_record, write_record

# ---- the record and the states


def rewrite(path: str, change) -> None:
    """A record with other facts, and the right checksum."""
    facts = dict(read_record(path).found)
    change(facts)
    os.remove(path)  # the record of the job has two names
    write_record(path, facts)


@pytest.mark.parametrize("what", ["cut", "garbage", "empty", "another format", "another version", "no key"])
def test_a_record_that_is_no_good_any_more(begun, what) -> None:
    says = "damaged"
    if what in ("cut", "garbage", "empty"):
        data = Path(RECORD).read_bytes()
        Path(RECORD).write_bytes({"cut": data[:500], "garbage": b"x" * len(data), "empty": b""}[what])
    elif what == "another format":
        text = Path(RECORD).read_bytes().split(b"\n")[0].replace(b'"format":2', b'"format":7')
        Path(RECORD).write_bytes(b"%b\n%08x\n" % (text, zlib.crc32(text)))
        says = "a record of format 7; this version reads 2"
    elif what == "another version":
        rewrite(RECORD, lambda facts: facts.update(package="9.9"))
        says = "an unfinished job of cqsa_arrays 9.9"
    else:
        rewrite(RECORD, lambda facts: facts.pop("key"))
    refused(says)
    assert run([*command(CASE), "--restart"]) == 0, log()
    assert digest() == begun


@pytest.mark.parametrize("what", ["cut", "garbage", "empty", "no states", "no attempt", "another place"])
def test_a_checkpoint_that_is_no_good_any_more(begun, what) -> None:
    path = in_job("lane-0.*.*")
    if what in ("cut", "garbage", "empty"):
        data = Path(path).read_bytes()
        Path(path).write_bytes({"cut": data[:200], "garbage": b"x" * len(data), "empty": b""}[what])
    elif what == "another place":
        rewrite(path, lambda facts: facts.update(position=[[0, 1 << 40, 3, 1]]))
    else:
        rewrite(path, lambda facts: facts.pop(what.removeprefix("no ")))
    refused("damaged")
    assert run([*command(CASE), "--restart"]) == 0, log()
    assert digest() == begun


def test_every_flipped_byte_of_a_record_is_noticed_or_does_no_harm(here) -> None:
    done = flipped_records(40, 0, here)
    assert done["wrong"] == 0
    assert 0 < int(re.search(r"(\d+) times noticed", done["what"])[1]) <= 40


def test_a_job_of_an_older_version_is_refused_by_name(here) -> None:
    make(CASE)
    os.mkdir("out.h5.job")
    for name in ("out.h5.job/ledger.sqlite", "out.h5.job/0a1b-states-0", "out.h5.part"):
        Path(name).write_text("of another form")
    for argv in (command(CASE), ["resume", "out.h5"], ["status", "out.h5"], ["verify", "out.h5", "--partial"]):
        refused("a job that an older version of cqsa_arrays began", *argv)
    assert run([*command(CASE), "--restart"]) == 0, log()
    assert sorted(os.listdir()) == ["out.h5", "qkv.h5"]


def test_states_that_are_damaged(begun) -> None:
    path = Path(in_job("*.states"))
    path.write_bytes(bytes(len(path.read_bytes())))
    refused("is not what was committed: the file is damaged. Start the job over with --restart")
    assert run([*command(CASE), "--restart"]) == 0, log()
    assert digest() == begun


def test_states_that_are_cut_short_or_gone(begun) -> None:
    path = Path(in_job("*.states"))
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
def test_an_unfinished_output_that_is_gone_or_another(begun, what, monkeypatch) -> None:
    monkeypatch.setattr(job, "HIDDEN_S", 0.2)
    path = in_job("output")
    if what == "gone":
        os.remove(path)
    elif what == "another":
        os.remove(path)
        shutil.copy("qkv.h5", path)
    else:
        os.truncate(path, 20_000)
    refused("output")
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
        while not glob("out.h5.job/*/lane-0.claim-1"):
            time.sleep(0.01)
        time.sleep(0.1)  # until it is taken
        said = run_and_read(command(CASE))
        assert f"lane 0 is computed by process {first} on" in said
        refused("restart: found True for out.h5, which process", *command(CASE), "--restart")
    finally:
        os.kill(first, signal.SIGKILL)
        wait(first)
    goes_on(expected)  # the claim of a dead process is none


def test_a_process_that_was_killed_leaves_nothing_in_the_way(begun) -> None:
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


def test_files_of_a_system_are_no_hindrance(here) -> None:
    """A client of NFS gives a removed file that is still open such a name, a file manager leaves others."""
    make(CASE)
    expected = unbroken(CASE)
    os.mkdir("out.h5.job")
    names = [Path("out.h5.job") / name for name in (".nfs000000000001", ".DS_Store")]
    for name in names:
        name.write_text("a system's")
    assert run(command(CASE), KilledAtCommit(2)) == -signal.SIGKILL
    inside = Path(max(glob("out.h5.job/*/"), key=len)) / ".nfs000000000002"
    inside.write_text("a system's")
    assert run(command(CASE)) == 0, log()
    assert digest() == expected
    assert all(name.exists() for name in names)
    assert cqsa.status("out.h5").finished


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
        usual, calls = Attempt.commit, []

        def commit(self, record, **named):
            usual(self, record, **named)
            calls.append(1)
            if len(calls) == 3:
                raise StorageError("the folder could not be synced")

        Attempt.commit = commit

    assert run(argv, reported) == 2
    assert "could not be synced" in log()
    assert run(argv) == 0, log()
    assert digest() == expected


def test_numbers_of_numpy(here) -> None:
    x = np.ones((1, 300, 8), "f4")
    options = Options(durable=True, lanes=np.int64(2), chunks=np.int64(3), checkpoint_s=np.float32(1))
    cqsa.attention(x, x, x, out="out.h5", device="cpu", memory=np.int64(64 << 20), options=options)
    assert os.listdir() == ["out.h5"]
