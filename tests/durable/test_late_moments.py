"""What happens between a look and what is done because of it, and in the last moments of a job."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import threading
import time
from glob import glob
from importlib import import_module
from pathlib import Path

import pytest
from durable_cases import CASES, Fault, KilledAtCommit, command, digest, log, make, run, start, unbroken

from cqsa_arrays import resumable
from cqsa_arrays.durable import attempt, claims
from cqsa_arrays.durable.claims import Who, _started, this_process
from cqsa_arrays.durable.fact import current
from cqsa_arrays.durable.folder import JobFolder

CASE = CASES[0]


def of_machine(name: str) -> None:
    """This process is one of a machine of which others know nothing; whose processes are soon taken for gone."""
    claims._machine = lambda: name
    claims.STALE_S, claims.BEAT_S = 0.3, 0.05


@pytest.mark.parametrize("case", [CASES[4], CASES[5]], ids=lambda case: case.name)
def test_a_lane_is_done_by_the_record_that_was_looked_at(here, case) -> None:
    """A checkpoint goes between the list and the look, and another one is at the end of the lane by then."""
    make(case)
    expected = unbroken(case)

    def first() -> None:
        of_machine("one")
        KilledAtCommit(1)()

    def second() -> None:
        of_machine("another")
        take, link = claims.Claims.take, attempt.link_once
        claims.Claims.take = lambda self, what, picture: what in ("lane-0", "begin") and take(self, what, picture)

        def killed(source, target):
            if target.endswith("lane-0.done"):
                os.kill(os.getpid(), signal.SIGKILL)
            return link(source, target)

        attempt.link_once = killed

    assert run(command(case), first) == -signal.SIGKILL
    assert run(command(case), second) == -signal.SIGKILL
    (old,) = glob("out.h5.job/*/lane-0.1-*.*")
    *_, last = sorted(glob("out.h5.job/*/lane-0.2-*.*"), key=lambda path: int(path.rpartition(".")[2]))
    os.rename(last, "aside")

    def third() -> None:
        of_machine("a third")
        attend = import_module("cqsa_arrays.durable.attend")
        usual, left = attend.newest, [1]

        def newest(paths, plan, lane, picture):
            if lane == 0 and left and glob("out.h5.job/*/lane-0.claim-3"):
                left.clear()
                os.rename("aside", last)
                os.remove(old)
            return usual(paths, plan, lane, picture)

        attend.newest = attempt.newest = newest

    assert run(command(case), third) == 0, log()
    assert digest() == expected


@pytest.mark.parametrize("more", [["--overwrite"], ["--overwrite", "--restart"]])
def test_an_error_is_not_hidden_by_the_output_that_was_to_be_written_over(here, more) -> None:
    make(CASE)
    time.sleep(0.02)
    assert run(command(CASE)) == 0

    def full(usual, *arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert run([*command(CASE), *more], Fault("posix_fallocate", 1, full, always=True)) == 2
    assert "No space left on device" in log()


def test_resuming_what_is_finished_meanwhile_computes_nothing(here) -> None:
    """The job was begun with --overwrite, which another run must not do once more."""
    make(CASE)
    assert run([*command(CASE), "--overwrite"], KilledAtCommit(3)) == -signal.SIGKILL

    def others_finish() -> None:
        usual = resumable.run_durably

        def late(setup, stop):
            resumable.run_durably = usual
            assert run([*command(CASE), "--overwrite"]) == 0
            Path("written").write_text(str(os.stat("out.h5").st_mtime_ns))
            return usual(setup, stop)

        resumable.run_durably = late

    assert run(["resume", "out.h5"], others_finish) == 0, log()
    assert str(os.stat("out.h5").st_mtime_ns) == Path("written").read_text()


@pytest.mark.parametrize("again", [["resume", "out.h5"], command(CASE)], ids=["resume", "attend"])
@pytest.mark.parametrize("machine", ["", "another"])
def test_what_is_left_of_a_job_that_is_over_goes_with_the_next_run(here, again, machine) -> None:
    """States in a scratch directory, too; of a process of another machine only its own file stays."""
    make(CASE)
    time.sleep(0.02)
    os.mkdir("scratch")

    def dies(usual, source, target, *more, **named):
        if target.endswith("ended"):
            usual(source, target, *more, **named)
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(source, target, *more, **named)

    def before() -> None:
        if machine:
            claims._machine = lambda: machine
        Fault("rename", 1, dies, always=True)()

    assert run([*command(CASE), "--scratch", "scratch"], before) == -signal.SIGKILL
    assert run(again) == 0, log()
    assert os.listdir("scratch") == []
    assert [name for name in glob("out.h5.job/*") if "worker" not in name and "claim" not in name] == []
    assert os.path.exists("out.h5.job") == bool(machine)


def test_a_zombie_that_still_has_threads_is_not_dead_for_certain() -> None:
    """Its main thread is over, another one may be amid a write."""
    process = os.fork()
    if not process:
        threading.Thread(target=time.sleep, args=(30,)).start()
        ctypes.CDLL(None).pthread_exit(None)
    try:
        me = this_process()
        who = Who(me.host, me.machine, process, _started(process), 0.0)
        while b") Z " not in Path(f"/proc/{process}/stat").read_bytes():
            time.sleep(0.01)
        assert not who.is_dead
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert who.is_dead


@pytest.mark.parametrize("which", [1, 2])
def test_a_lost_reply_of_an_heirs_links_costs_nothing(here, which) -> None:
    case = CASES[1]
    make(case)
    expected = unbroken(case)
    assert run(command(case), KilledAtCommit(4)) == -signal.SIGKILL
    count = []

    def lost(usual, source, target, *more, **named):
        usual(source, target, *more, **named)
        if ".states" in target:
            count.append(target)
            if len(count) == which:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)

    assert run(command(case), Fault("link", 1, lost, always=True)) == 0, log()
    assert digest() == expected


@pytest.mark.parametrize(
    "argv", [["resume", "out.h5"], ["verify", "out.h5", "--partial"], ["status", "out.h5"]], ids=" ".join
)
def test_a_job_that_ends_when_its_record_was_just_read_is_called_finished(here, argv) -> None:
    make(CASE)
    assert run(command(CASE), KilledAtCommit(3)) == -signal.SIGKILL

    def others_finish() -> None:
        modules = [import_module(f"cqsa_arrays.durable.{name}") for name in ("job", "saved", "status")]
        usual = modules[0].require_job

        def require_job(folder):
            for module in modules:
                module.require_job = usual
            fact = usual(folder)
            assert os.waitpid(start(command(CASE), said="others.log"), 0)[1] == 0
            return fact

        for module in modules:
            module.require_job = require_job

    code = run(argv, others_finish)
    assert code == (2 if argv[0] == "verify" else 0), log()
    assert code == 0 or "It is finished: cqsa verify checks it." in log()


def test_the_directory_of_a_job_may_go_when_it_has_been_read(here) -> None:
    """Only a scratch directory that is gone is to be put back."""
    make(CASE)
    assert run(command(CASE), KilledAtCommit(3)) == -signal.SIGKILL
    folder = JobFolder("out.h5")
    fact = current(folder)
    shutil.rmtree(folder.of(fact.key))
    fact.require_scratch(folder)
