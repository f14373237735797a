"""Killed at any instant, a job goes on and ends with the bytes of an unbroken run. ``campaign.py`` does much more."""

from __future__ import annotations

import os
import random
import signal
import time
from glob import glob

import pytest
from campaign import kill_until_done
from durable_cases import (
    CASES,
    HOWS,
    Killed,
    command,
    digest,
    killed_at,
    log,
    make,
    run,
    slow,
    start,
    steps_of,
    unbroken,
    wait,
)

from cqsa_arrays.durable import status

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@by_case
def test_killed_at_random_instants(here, case) -> None:
    make(case)
    begun = time.monotonic()
    expected = unbroken(case)
    kills, runs, right = kill_until_done(case, expected, time.monotonic() - begun, random.Random(case.name), 6)
    assert right, log()
    assert kills >= 1
    assert runs > kills


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5]], ids=lambda case: case.name)
def test_killed_at_steps_that_change_the_disk(here, case) -> None:
    """The first and last ones, and some of those between; the campaign takes each, in each of these ways."""
    make(case)
    expected, steps = unbroken(case), steps_of(case)
    assert steps > 50
    drawn = random.Random(case.name).sample(range(5, steps - 8), 6)
    for number, at in enumerate((*range(1, 30, 6), *sorted(drawn), *range(steps - 8, steps + 1, 2))):
        assert killed_at(case, expected, at, HOWS[number % len(HOWS)])


def test_a_commit_that_was_not_synced_would_be_seen(here, monkeypatch) -> None:
    """The check can fail: a run that goes on with a state of another place ends with other bytes."""
    from cqsa_arrays.durable import checkpoint

    case = CASES[0]
    make(case)
    expected = unbroken(case)
    usual = checkpoint.LaneCheckpoint.reached

    def late(self, position, resident) -> None:
        """Names a place before which not everything was done."""
        usual(self, position.__class__(position.group, position.task, position.step + 1, 0), resident)

    monkeypatch.setattr(checkpoint.LaneCheckpoint, "reached", late)
    for at in range(40, 400, 7):
        if run(command(case), Killed(at, "before")) == 0:
            os.remove("out.h5")
            break
        if run(command(case)) != 0 or digest() != expected:
            return
        os.remove("out.h5")
    pytest.fail("no byte was wrong")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_a_job_commits_and_goes_on(here, number, code) -> None:
    case = CASES[0]
    make(case)
    expected = unbroken(case)
    for stops in range(1, 3):
        process = start(command(case), slow)
        while not glob(f"out.h5.job/*/lane-0.claim-{stops}"):
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(process, number)
        assert wait(process) == code, log()
        assert "what was committed is kept: cqsa resume out.h5" in log()
        assert "Traceback" not in log()
        assert status("out.h5").done_pairs > 0, stops
    assert run(command(case)) == 0
    assert digest() == expected
