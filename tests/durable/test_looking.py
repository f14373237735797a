"""Those who only look: status and partial verification, of jobs that run and of dead ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from durable_cases import (
    CASES,
    KilledAtCommit,
    command,
    digest,
    log,
    make,
    run,
    run_and_read,
    slow,
    start,
    unbroken,
    wait,
)

import cqsa_arrays as cqsa
from cqsa_arrays import partial
from cqsa_arrays.durable import saved, status
from cqsa_arrays.partial import verify_partial

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@by_case
@pytest.mark.parametrize("commits", [1, 3, 5])
def test_a_dead_job_is_verified_as_far_as_it_is(here, case, commits) -> None:
    make(case)
    expected = unbroken(case)
    assert run(command(case), KilledAtCommit(commits)) == -signal.SIGKILL
    before = {path: path.read_bytes() for path in Path("out.h5.job").rglob("*") if path.is_file()}
    found, report = status("out.h5"), verify_partial("out.h5", rows=64)
    assert 0 < found.done_pairs < found.pairs
    assert not found.running
    assert report.passed, report
    assert all(0 < place.keys <= case.spec.tokens for place in report.places)
    assert json.loads(report.to_json())["passed"]
    now = {path: path.read_bytes() for path in Path("out.h5.job").rglob("*") if path.is_file()}
    assert now == before  # they only look
    assert run(command(case)) == 0, log()
    assert digest() == expected


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_large_scores_and_rows_that_are_not_determined(here, monkeypatch, dtype) -> None:
    """What verify allows for large scores, verify --partial allows; rows that are not determined are no pass here."""
    case = CASES[0]
    make(replace(case, spec=replace(case.spec, dtype=dtype, scale=16.0)))
    assert run(command(case), KilledAtCommit(6)) == -signal.SIGKILL
    report = verify_partial("out.h5")
    assert report.passed, report
    assert not verify_partial("out.h5", tolerance=1e-9).passed
    usual = partial.reference_rows

    def unknown(*arguments, **options):
        """Every row as if its scores were too large."""
        rows = usual(*arguments, **options)
        return replace(rows, rounding=replace(rows.rounding, out=np.full(rows.lse.shape, np.inf)))

    monkeypatch.setattr(partial, "reference_rows", unknown)
    report = verify_partial("out.h5")
    assert (report.verdict, report.passed) == ("undetermined", False)
    assert json.loads(report.to_json())["verdict"] == "undetermined"
    assert run(["verify", "out.h5", "--partial"]) == 4
    assert "not determined by float32" in log()


def test_a_wrong_state_fails(here, monkeypatch) -> None:
    """A state that is intact, and of other keys than those that were seen."""
    case = CASES[0]
    make(case)
    assert run(command(case), KilledAtCommit(6)) == -signal.SIGKILL
    assert verify_partial("out.h5").passed
    usual = saved.SavedLane.state_of

    def other(self, place, rows):
        state = usual(self, place, rows)
        state.acc[...] *= 1.0001
        return state

    monkeypatch.setattr(saved.SavedLane, "state_of", other)
    assert not verify_partial("out.h5").passed


def test_status_of_a_job_that_runs(here) -> None:
    case = CASES[0]
    make(case)

    process = start(command(case), slow)
    while not os.path.exists("out.h5.job/job") or status("out.h5").done_pairs == 0:
        time.sleep(0.01)
    found = status("out.h5")
    assert found.running
    assert found.lanes[0].running == f"process {process} on {os.uname().nodename}"
    assert found.rate > 0
    assert found.left_s > 0
    text = str(found)
    assert "running" in text
    assert "left at this rate" in text
    assert run(["verify", "out.h5", "--partial"]) == 0, log()
    assert wait(process) == 0
    with pytest.raises(cqsa.ArgumentError, match="of which no job is unfinished"):
        status("out.h5")


def test_the_command_shows_it(here) -> None:
    case = CASES[4]
    make(case)
    assert run(command(case), KilledAtCommit(6)) == -signal.SIGKILL
    assert run(["status", "out.h5", "--json"]) == 0
    assert run(["verify", "out.h5", "--partial", "--json"]) == 0
    assert run(["status", "none.h5"]) == 2
    assert "of which no job is unfinished" in log()
    for argv in (["verify", "none.h5", "--partial"], ["resume", "none.h5"]):
        assert run(argv) == 2
        assert "no job is unfinished; expected the output of an unfinished job. Name the output of a job" in log()
    assert run(command(case)) == 0
    assert "out.h5: finished" in run_and_read(["resume", "out.h5"])


def test_states_whose_directory_is_gone(here) -> None:
    case = CASES[0]
    make(case)
    os.mkdir("scratch")
    assert run([*command(case), "--scratch", "scratch"], KilledAtCommit(5)) == -signal.SIGKILL
    os.rename("scratch", "elsewhere")
    for argv in (["resume", "out.h5"], ["verify", "out.h5", "--partial"]):
        assert run(argv) == 2
        assert "scratch: the directory with this job's states is gone. Put it back. Start the job over" in log()
    assert not status("out.h5").running
    assert run(["status", "out.h5"]) == 0
    os.rename("elsewhere", "scratch")
    assert run(["resume", "out.h5"]) == 0, log()
    assert os.listdir("scratch") == []


def test_a_job_whose_states_are_gone_is_started_over(here) -> None:
    case = CASES[0]
    make(case)
    os.mkdir("scratch")
    assert run([*command(case), "--scratch", "scratch"], KilledAtCommit(5)) == -signal.SIGKILL
    shutil.rmtree("scratch")
    assert run(command(case)) == 2
    assert "is gone. Put it back. Start the job over with --restart" in log()
    assert run([*command(case), "--restart"]) == 0, log()
    assert sorted(os.listdir()) == ["out.h5", "qkv.h5"]


def test_nothing_committed_is_nothing_to_verify(here) -> None:
    case = CASES[0]
    make(case)
    assert run(command(case), KilledAtCommit(0)) == -signal.SIGKILL
    with pytest.raises(cqsa.ArgumentError, match="of which nothing is committed yet"):
        verify_partial("out.h5")


def test_of_many_lanes_some_are_looked_at_and_that_is_said(here, monkeypatch) -> None:
    monkeypatch.setattr(partial, "MOST_LANES", 1)
    case = CASES[4]
    make(case)
    assert run(command(case), KilledAtCommit(12)) == -signal.SIGKILL
    report = verify_partial("out.h5", rows=4)
    assert report.lanes == 2
    assert len({place.lane for place in report.places}) == 1
    assert str(report).endswith("1 of 2 lanes were looked at")
    assert json.loads(report.to_json())["lanes"] == 2
