"""States in a directory of their own (--scratch): whose they are, and that nothing is left there."""

from __future__ import annotations

import os
import signal
from glob import glob

import h5py
from durable_cases import CASES, Fault, Killed, KilledAtCommit, command, digest, log, make, run, unbroken

CASE = CASES[0]


def test_two_jobs_of_one_name_in_one_scratch_directory(here) -> None:
    """Their states are files of their own, whatever the outputs are called."""
    make(CASE)
    expected = unbroken(CASE)
    os.mkdir("scratch")
    for name in ("a", "b"):
        os.mkdir(name)
        os.chdir(name)
        argv = ["../qkv.h5" if word == "qkv.h5" else word for word in command(CASE)]
        assert run([*argv, "--scratch", "../scratch"], KilledAtCommit(5)) == -signal.SIGKILL
        os.chdir("..")
    assert len(glob("scratch/*.states")) == 2
    for name in ("a", "b"):
        os.chdir(name)
        assert run(["resume", "out.h5", "--quiet"]) == 0, log()
        os.chdir("..")
    assert os.listdir("scratch") == []
    assert _data("a/out.h5") == _data("b/out.h5")
    assert run(command(CASE)) == 0
    assert digest() == expected
    assert _data("a/out.h5") == _data("out.h5")


def test_a_run_that_is_killed_while_it_begins_leaves_nothing_in_the_scratch_directory(here) -> None:
    make(CASE)
    os.mkdir("scratch")
    argv, left = [*command(CASE), "--scratch", "scratch"], 0
    assert run(argv) == 0
    expected = digest()
    os.remove("out.h5")
    for at in range(1, 60, 3):
        assert run(argv, Killed(at, "after")) == -signal.SIGKILL
        left += bool(os.listdir("scratch"))
        assert run(argv) == 0, log()
        assert os.listdir("scratch") == [], at
        assert digest() == expected
        os.remove("out.h5")
    assert left > 2


def test_a_restart_after_a_killed_beginning_leaves_nothing_in_the_scratch_directory(here) -> None:
    make(CASE)
    os.mkdir("scratch")
    argv = [*command(CASE), "--scratch", "scratch"]

    def reserved(usual, descriptor, *more):
        usual(descriptor, *more)
        if "scratch" in os.readlink(f"/proc/self/fd/{descriptor}"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert run(argv, Fault("posix_fallocate", 1, reserved, always=True)) == -signal.SIGKILL
    assert len(os.listdir("scratch")) == 1
    assert run([*argv, "--restart"]) == 0, log()
    assert os.listdir("scratch") == []


def test_an_interruption_while_states_are_reserved_leaves_nothing(here) -> None:
    make(CASE)
    os.mkdir("scratch")

    def interrupted(usual, descriptor, *more):
        usual(descriptor, *more)
        if "scratch" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise KeyboardInterrupt

    assert run([*command(CASE), "--scratch", "scratch"], Fault("posix_fallocate", 1, interrupted, always=True)) == 130
    assert "what was committed is kept: cqsa resume out.h5" in log()
    assert os.listdir("scratch") == []
    assert run(["resume", "out.h5", "--quiet"]) == 0, log()
    assert os.listdir("scratch") == []


def _data(path: str) -> tuple[bytes, bytes]:
    with h5py.File(path) as file:
        return file["out"][...].tobytes(), file["lse"][...].tobytes()
