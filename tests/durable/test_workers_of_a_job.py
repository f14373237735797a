"""Several processes of one job: claims, those that die, or stand still and wake up late, and those that look."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace
from glob import glob
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from campaign import together
from durable_cases import (
    CASES,
    Fault,
    KilledAtCommit,
    command,
    digest,
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

import cqsa_arrays as cqsa
from cqsa_arrays import ArgumentError
from cqsa_arrays.durable import claims, ending, job
from cqsa_arrays.durable.claims import STALE_S, Claims, Observer, Worker, this_process
from cqsa_arrays.durable.ending import require_nobody
from cqsa_arrays.durable.folder import JobFolder, look
from cqsa_arrays.durable.stop import Stop

LANES = CASES[4:]
DURABLE = cqsa.Options(durable=True)


@pytest.fixture
def folder(here) -> JobFolder:
    return JobFolder("out.h5")


def another(folder: JobFolder, name: str = "0000abcd", **facts) -> Path:
    """The file of a worker of another machine."""
    folder.make()
    path = Path(folder.path) / f"worker-{name}"
    who = {"name": name, "host": "elsewhere", "machine": "its", "pid": 1, "started": 1, "since": 1.0, "beats": "0"}
    path.write_text(json.dumps({**who, **facts}))
    return path


def test_a_claim_is_taken_once_and_free_when_its_worker_ends(folder) -> None:
    with Worker(folder) as one:
        mine = Claims(folder.path, one, Observer(folder.path))
        assert mine.take("lane-0", look(folder.path))
        with Worker(folder) as two:
            theirs = Claims(folder.path, two, Observer(folder.path))
            assert not theirs.take("lane-0", look(folder.path))
            assert theirs.take("lane-1", look(folder.path))
            assert mine.is_mine("lane-0", 1)
        assert mine.take("lane-1", look(folder.path))
        assert theirs.holder("lane-1", 2) == one.name


def test_a_worker_is_gone_when_its_counter_stands_still_by_the_clock_of_who_looks(folder) -> None:
    now = [0.0]
    path, watch = another(folder), Observer(folder.path, lambda: now[0])
    assert not watch.is_gone("0000abcd")
    now[0] = STALE_S - 1
    assert not watch.is_gone("0000abcd")
    assert not watch.was_seen_moving("0000abcd")
    path.write_text(path.read_text().replace('"0"', '"1"'))
    assert not watch.is_gone("0000abcd")
    assert watch.was_seen_moving("0000abcd")
    now[0] += STALE_S - 1
    assert not watch.is_gone("0000abcd")
    now[0] += 2
    assert watch.is_gone("0000abcd")
    path.unlink()
    assert Observer(folder.path).is_gone("0000abcd")


def test_a_process_of_this_machine_that_is_no_more_is_gone_at_once(folder) -> None:
    me = this_process()
    another(folder, machine=me.machine, pid=me.pid, started=me.started)
    assert not Observer(folder.path).is_gone("0000abcd")
    another(folder, machine=me.machine, pid=me.pid, started=me.started + 1)  # its number was used again
    assert Observer(folder.path).is_gone("0000abcd")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": []}', "\x00" * 50, "9" * 5000])
def test_what_is_no_worker_is_waited_for_and_then_gone(folder, text) -> None:
    now = [0.0]
    another(folder).write_text(text)
    watch = Observer(folder.path, lambda: now[0])
    assert not watch.is_gone("0000abcd")
    now[0] = STALE_S + 1
    assert watch.is_gone("0000abcd")


def test_a_job_that_is_computed_elsewhere_is_not_dropped(folder, monkeypatch) -> None:
    path, beats = another(folder), iter(range(1, 1000))

    def beat(seconds: float) -> None:
        path.write_text(path.read_text().replace('"host": "elsewhere"', f'"host": "elsewhere{next(beats)}"'))

    monkeypatch.setattr("cqsa_arrays.durable.ending.time.sleep", beat)
    with pytest.raises(ArgumentError, match=r"restart: found True for out\.h5, which process 1 on elsewhere"):
        require_nobody(folder, Stop(), "restart", "True")


@pytest.mark.parametrize("case", LANES, ids=lambda case: case.name)
@pytest.mark.parametrize("workers", [2, 3])
def test_killed_and_paused_and_looked_at(here, case, workers, monkeypatch) -> None:
    """As ``campaign.py`` does, a few times."""
    monkeypatch.setattr(claims, "STALE_S", 0.5)
    monkeypatch.setattr(claims, "BEAT_S", 0.05)
    make(case)
    expected = unbroken(case)
    done = together(case, expected, workers, random.Random(f"{case.name} {workers}"), jobs=2)
    assert done.wrong == [], done
    assert done.kills + done.pauses > 0


def slow_and_blind() -> None:
    """Slow, and for a while it does not see that the output has its name, as a client of a network file system."""
    slow()
    usual, looks = ending.was_finished, iter(range(5))
    ending.was_finished = lambda *arguments: next(looks, None) is None and usual(*arguments)
    import_module("cqsa_arrays.durable.attend").is_result_of = lambda setup: False


@pytest.mark.parametrize("how", [slow, slow_and_blind])
def test_one_that_stands_still_loses_its_lane_and_does_no_harm_when_it_wakes(here, how, monkeypatch) -> None:
    monkeypatch.setattr(claims, "STALE_S", 0.4)
    monkeypatch.setattr(claims, "BEAT_S", 0.05)
    case = CASES[0]
    make(case)
    expected = unbroken(case)
    first = start(command(case), how, said="first.log")
    try:
        while not glob("out.h5.job/*/lane-0.*.*"):
            time.sleep(0.005)
        os.kill(first, signal.SIGSTOP)
        assert run(command(case)) == 0, log()
        assert digest() == expected
        os.kill(first, signal.SIGCONT)
        assert wait(first) == 0, Path("first.log").read_text()
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(first, signal.SIGKILL)
            os.kill(first, signal.SIGCONT)
    assert digest() == expected
    assert sorted(set(os.listdir()) - {"run.log", "first.log"}) == ["out.h5", "qkv.h5"]


def test_one_with_nothing_to_do_says_who_computes_and_ends_well(here) -> None:
    case = CASES[0]
    make(case)
    expected = unbroken(case)
    first = start(command(case), stuck)
    while not glob("out.h5.job/*/lane-0.claim-1"):
        time.sleep(0.005)
    said = run_and_read(command(case))
    assert f"lane 0 is computed by process {first} on" in said
    os.kill(first, signal.SIGKILL)
    wait(first)
    assert run(command(case)) == 0, log()
    assert digest() == expected


def test_looking_needs_no_writing(here) -> None:
    """On a disk that cannot be written to, and nothing of a job is changed."""
    case = CASES[0]
    make(case)
    assert run(command(case), KilledAtCommit(5)) == -signal.SIGKILL

    def read_only() -> None:
        usual = os.open

        def opened(path, flags, *more, **named):
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(30, "Read-only file system", path)
            return usual(path, flags, *more, **named)

        os.open = opened
        for name in ("mkdir", "makedirs", "rename", "replace", "remove", "link", "unlink"):
            setattr(os, name, lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system")))

    for argv in (["status", "out.h5"], ["verify", "out.h5", "--partial"]):
        assert run(argv, read_only) == 0, log()


def test_who_cleans_up_late_takes_no_later_job_away(here, monkeypatch) -> None:
    """A cleaner that stood still after it saw no job, or another one: the one that is there now stays and goes on."""
    case = CASES[0]
    make(case)
    expected = unbroken(case)
    assert run(command(case), KilledAtCommit(3)) == -signal.SIGKILL
    folder = JobFolder("out.h5")
    ending._remove_record(folder, "0123456789abcdef")
    assert os.path.exists("out.h5.job/job")
    monkeypatch.setattr(JobFolder, "exists", property(lambda self: False))  # as it was when it looked
    ending.remove_remains(folder)
    monkeypatch.undo()
    os.chdir(here)
    assert run(command(case)) == 0, log()
    assert digest() == expected


def test_a_finished_job_of_other_inputs_is_not_the_answer(here) -> None:
    """Its process died when its output had its name; the next call asks for something else."""
    ones, twos = np.ones((2, 60, 8), "f4"), np.full((2, 60, 8), 2, "f4")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(import_module("cqsa_arrays.durable.attend"), "end", lambda *_: None)
        cqsa.attention(ones, ones, ones, out="out.h5", options=DURABLE)
    assert os.path.exists("out.h5.job/job")
    with pytest.raises(ArgumentError, match=r"found out\.h5, which exists"):
        cqsa.attention(twos, twos, twos, out="out.h5", options=DURABLE)
    found = cqsa.attention(twos, twos, twos, out="out.h5", options=replace(DURABLE, overwrite=True))
    assert (found[...] == 2).all()
    assert sorted(os.listdir()) == ["out.h5"]


def test_an_output_that_has_both_its_names_is_finished(here, monkeypatch) -> None:
    """Its process died after it had given it the name, and before it could take the other one away."""
    case = CASES[0]
    make(case)
    expected = unbroken(case)

    def dies(usual, path):
        if path.endswith("finished"):
            os.kill(os.getpid(), signal.SIGKILL)
        usual(path)

    assert run(command(case), Fault("remove", 1, dies, always=True)) == -signal.SIGKILL
    assert os.path.exists("out.h5")
    assert run(command(case)) == 0, log()
    assert run(["status", "out.h5"]) == 0, log()
    assert digest() == expected
    assert sorted(set(os.listdir()) - {"run.log"}) == ["out.h5", "qkv.h5"]


def displaced_while_it_makes(directory: str) -> bool:
    """Another process has removed the directory that is being made."""
    return directory.endswith(".new")


def displaced_when_it_has_made(directory: str) -> bool:
    """Another process has made the record void, and is about to begin its own job."""
    return re.fullmatch(r".*/[0-9a-f]{16}", directory) is not None


@pytest.mark.parametrize("which", [displaced_while_it_makes, displaced_when_it_has_made])
def test_who_is_taken_for_gone_while_it_begins_begins_again(here, which) -> None:
    case = CASES[0]
    make(case)
    expected = unbroken(case)

    def displace() -> None:
        usual, left = (job.OutputFile.create, job.make_way), [1]

        def others() -> None:
            for directory in filter(which, glob("out.h5.job/*") if left else []):
                left.clear()
                os.rename(f"{directory}/job", f"{directory}/void") if "new" not in directory else shutil.rmtree(
                    directory
                )

        def create(*arguments, **named):
            others()
            return usual[0](*arguments, **named)

        def make_way(*arguments):
            others()
            return usual[1](*arguments)

        job.OutputFile = SimpleNamespace(create=create, reopen=job.OutputFile.reopen)
        job.make_way = make_way

    assert run(command(case), displace) == 0, log()
    assert digest() == expected
    assert sorted(set(os.listdir()) - {"run.log"}) == ["out.h5", "qkv.h5"]


def test_who_stands_still_until_the_folder_of_the_job_is_gone_ends_well(here) -> None:
    case = CASES[0]
    make(case)
    expected = unbroken(case)
    assert run(command(case)) == 0
    os.rename("out.h5", "kept.h5")

    def others_finish() -> None:
        usual = job.look

        def look(path):
            shutil.rmtree(path)
            os.rename("kept.h5", "out.h5")
            return usual(path)

        job.look = look

    assert run(command(case), others_finish) == 0, log()
    assert digest() == expected
