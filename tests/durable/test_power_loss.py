"""Power loss: of what was not synced yet any part may be there, and the job still ends with its bytes.

A run is recorded: every write, name and sync of its files. Then what a disk could hold at some instant is built, and
another run goes on from there. A kill never does that: the system keeps what was done, synced or not.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from durable_cases import CASES, Case, command, digest, log, make, run, unbroken
from power_loss import Recorder, Recording, ToFile, lay_out

from cqsa_arrays.cli import main
from cqsa_arrays.durable import attempt
from cqsa_arrays.durable.journal import Journal
from cqsa_arrays.durable.records import sync_directory
from cqsa_arrays.engine.statefile import StateFile
from cqsa_arrays.storage import RawFile

ELSEWHERE = replace(CASES[1], name="cqs on disk, states elsewhere", options=(*CASES[1].options, "--scratch", "scratch"))
LONG = Case(  # each tile against 7 blocks of keys
    "tiles of many blocks",
    replace(CASES[2].spec, tokens=4000, heads=1),
    ("--cover", "rectangular", "--memory", "1200KiB"),
)
SOME = [CASES[0], CASES[1], ELSEWHERE, CASES[2], CASES[4], CASES[5]]


def record(case: Case, patch: pytest.MonkeyPatch, before: Recording | None = None) -> Recording:
    """A whole run of ``case``, in this process; after ``before``."""
    found = Recording(list(before.events) if before else [])
    with patch.context() as patched:
        Recorder(found.events.append, before).install(patched.setattr)
        assert main(command(case)) == 0
    return found


def killed(case: Case, commit: int) -> Recording:
    """A run that is killed in its commit of that number, whose name is not yet on the disk."""
    recorder, commits = ToFile(Path("..", "events")), itertools.count(1)

    def before() -> None:
        recorder()
        attempt.sync_directory = lambda path: kill() if next(commits) == commit else sync_directory(path)

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    assert run(command(case), before) == -signal.SIGKILL, log()
    return recorder.read()


def prepare(case: Case) -> str:
    """The inputs, and the hash of the output."""
    make(case)
    if case is not ELSEWHERE:
        return unbroken(case)
    os.mkdir("scratch")
    assert run(command(case)) == 0
    found = digest()
    os.remove("out.h5")
    return found


def survives(recording: Recording, expected: str, cut: int, rng: random.Random, case: Case) -> bool:
    lay_out(recording.at(cut, rng), {"qkv.h5"})
    os.makedirs("scratch", exist_ok=True)
    return run(command(case)) == 0 and digest() == expected


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_whatever_was_not_synced_is_not_missed(here, case, monkeypatch) -> None:
    expected = prepare(case)
    recording = record(case, monkeypatch)
    assert digest() == expected
    assert sum(event[0] == "names synced" for event in recording.events) > 5
    rng = random.Random(case.name)
    for _ in range(8):
        cut = rng.randint(0, len(recording.events))
        assert survives(recording, expected, cut, rng, case), f"after {cut} events: {log()}"


@pytest.mark.parametrize("case", [LONG, CASES[1], CASES[5]], ids=lambda case: case.name)
def test_what_a_killed_run_has_not_synced_is_not_missed(here, case, monkeypatch) -> None:
    """The run that goes on sees all of it, and the disk may lose it yet."""
    expected = prepare(case)
    rng = random.Random(case.name)
    for commit in (1, 2):
        before = killed(case, commit)
        recording = record(case, monkeypatch, before)
        assert digest() == expected
        for _ in range(5):
            cut = rng.randint(len(before.events), len(recording.events))
            assert survives(recording, expected, cut, rng, case), f"after {cut} events: {log()}"
        lay_out({}, {"qkv.h5"})


def without_a_record_on_the_disk(patch: pytest.MonkeyPatch) -> None:
    write = attempt.write_record

    def unsynced(path, facts) -> None:
        with patch.context() as inner:
            inner.setattr(os, "fsync", lambda descriptor: None)
            write(path, facts)

    patch.setattr(attempt, "write_record", unsynced)


def without_an_output_on_the_disk(patch: pytest.MonkeyPatch) -> None:
    usual = RawFile.sync
    patch.setattr(RawFile, "sync", lambda self: None if "out.h5" in self.label else usual(self))


def without_names_on_the_disk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attempt, "sync_directory", lambda path: None)


HARMS = {
    "states": (CASES[0], lambda patch: patch.setattr(StateFile, "sync", lambda self: None)),
    "journal": (CASES[2], lambda patch: patch.setattr(Journal, "sync", lambda self: None)),
    "record": (CASES[2], without_a_record_on_the_disk),
    "output": (CASES[2], without_an_output_on_the_disk),
    "names": (CASES[1], without_names_on_the_disk),
    "names elsewhere": (ELSEWHERE, without_names_on_the_disk),
}


@pytest.mark.parametrize("missing", HARMS)
def test_a_missing_sync_would_be_seen(here, missing, monkeypatch) -> None:
    """The same with a run that commits what it has not synced."""
    case, harm = HARMS[missing]
    expected = prepare(case)
    with monkeypatch.context() as patched:
        harm(patched)
        recording = record(case, monkeypatch)
    rng = random.Random(0)
    cuts = [rng.randint(0, len(recording.events)) for _ in range(40)]
    assert not all(survives(recording, expected, cut, rng, case) for cut in cuts)


def test_a_missing_sync_of_what_was_seen_would_be_seen(here, monkeypatch) -> None:
    """The next run writes over what a checkpoint before the one that it has seen names."""
    case = LONG
    expected = prepare(case)
    before = killed(case, 2)
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["cqsa_arrays.durable.attend"], "sync_directory", lambda path: None)
        recording = record(case, monkeypatch, before)
    rng = random.Random(0)
    cuts = [len(before.events) + rng.randint(0, 20) for _ in range(60)]
    assert not all(survives(recording, expected, cut, rng, case) for cut in cuts)
