"""Runs ``cqsa``: inside the test's process, which is a second faster, or as another."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

import cqsa_arrays
from cqsa_arrays.cli import main


def environment(**changes: str) -> dict[str, str]:
    """For processes in other directories: they find this very package, installed or not."""
    return {**os.environ, "PYTHONPATH": str(Path(cqsa_arrays.__file__).parents[1]), **changes}


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    out: str
    err: str


def run_command(capsys: pytest.CaptureFixture[str], *argv: object) -> Outcome:
    """Exit code and what was printed; the process's handlers are put back afterwards."""
    capsys.readouterr()
    terminated, logger = signal.getsignal(signal.SIGTERM), logging.getLogger("cqsa_arrays")
    handlers = logger.handlers[:]
    try:
        code = main([str(one) for one in argv])
    except SystemExit as left:  # argparse
        code = left.code
    finally:
        signal.signal(signal.SIGTERM, terminated)
        logger.handlers[:] = handlers
    return Outcome(code, *capsys.readouterr())
