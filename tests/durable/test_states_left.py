"""States of attempts that are over: no more of them stay than are needed, and the next attempt goes on in them."""

from __future__ import annotations

import os
import signal
import time
from glob import glob
from pathlib import Path

import pytest
from durable_cases import CASES, KilledAtCommit, command, digest, log, make, run, unbroken

from cqsa_arrays.durable import claims
from cqsa_arrays.engine.statefile import StateFile


def test_the_states_of_those_that_were_killed_do_not_pile_up(here) -> None:
    """Before they could commit anything, and after."""
    case = CASES[1]
    make(case)
    expected = unbroken(case)
    for commits in (0, 0, 1, 0, 0, 2, 0, 1):
        assert run(command(case), KilledAtCommit(commits)) == -signal.SIGKILL
    files = {os.stat(path).st_ino for path in glob("out.h5.job/*/*.states")}
    assert len(files) <= 2  # of the farthest, and of the last
    assert run(command(case)) == 0, log()
    assert digest() == expected


def test_an_heir_that_is_killed_before_it_commits_has_an_heir(here) -> None:
    """The disk may have no room for the states twice."""
    case = CASES[1]
    make(case)
    expected = unbroken(case)
    for commits in (1, 0, 0, 1, 0):
        assert run(command(case), KilledAtCommit(commits)) == -signal.SIGKILL
        assert len({os.stat(path).st_ino for path in glob("out.h5.job/*/*.states")}) == 1
    assert run(command(case)) == 0, log()
    assert digest() == expected


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=lambda case: case.name)
def test_states_that_were_closed_are_gone_on_with_on_any_machine(here, case) -> None:
    """Each run stops by itself, on a machine of which the next one knows nothing."""
    make(case)
    expected = unbroken(case)
    copied = Path("copied")

    def elsewhere() -> None:
        name = f"machine {time.monotonic_ns()}"
        claims._machine = lambda: name
        StateFile.copy_from = lambda *_: copied.touch()

    for stops in range(1, 4):
        assert run([*command(case), "--max-time", "0.001s"], elsewhere) == 3, log()
        states = [os.path.basename(path).split("-")[1] for path in glob("out.h5.job/*/*.states")]
        assert len(states) == len(set(states)), stops  # one of each lane
        assert len(glob("out.h5.job/*/lane-*.*-*.*")) <= len(states)
    assert run(command(case), elsewhere) == 0, log()
    assert not copied.exists()
    assert digest() == expected
