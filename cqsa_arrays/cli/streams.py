"""Standard streams that are closed, full or read by nobody: no reason to do other work, or to end with a traceback."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def fill_closed() -> None:
    """Put the null device in place of standard streams that are closed, as daemons and some schedulers have them.

    Otherwise the next file that is opened gets the number of such a stream, and what a library prints goes into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # by number: each open takes the lowest
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lives


def say(text: str) -> None:
    """Print to standard error, if that can be."""
    with suppress(OSError):
        print(text, file=sys.stderr)


def let_go() -> None:
    """Drop what could not be written: Python would try again at its end, and put another exit code in place of ours."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):  # a stream that is no file
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
