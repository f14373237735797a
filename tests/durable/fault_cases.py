"""What the tests of faults share: an unfinished job, and what the next run of it may say."""

from __future__ import annotations

import os
from glob import glob

from durable_cases import CASES, command, digest, log, run

CASE, TILES = CASES[0], CASES[2]
RECORD = "out.h5.job/job"


def in_job(name: str) -> str:
    """The only file of that pattern in the directory of the job."""
    (found,) = glob(f"out.h5.job/*/{name}")
    return found


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
