"""Entry of the command: parses, runs one subcommand, turns errors into messages and exit codes.

Exit codes: 0 done; 1 a comparison or verification failed; 2 input that cannot be used, or memory that was refused;
3 a job that is not finished yet, everything done so far being committed; 4 nothing that was verified is wrong, but
there are rows that the arithmetic does not determine; 130 interrupted; 141 nobody read the output; 143 terminated.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence

from ..errors import START_OVER, CqsaError, JobBusyError, JobStopped, one_line
from ..limits import own_limits
from .parser import build_parser, check_not_empty, parsed
from .process import keep_small, memory_was_refused, refusal
from .reasons import INTERRUPTED_BY, TERMINATED_BY
from .signals import Termination
from .spelling import said
from .streams import fill_closed, let_go, say

RUNS_JOBS = ("attend", "resume")
DONE, FAILED, UNUSABLE, UNFINISHED, UNDETERMINED, INTERRUPTED, UNREAD, TERMINATED = 0, 1, 2, 3, 4, 130, 141, 143
OUTCOMES = {True: DONE, False: FAILED, "passed": DONE, "failed": FAILED, "undetermined": UNDETERMINED}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``cqsa`` with ``argv`` (default: the process's arguments); returns the exit code."""
    began = time.monotonic()
    fill_closed()
    try:
        return _main(argv, began)
    finally:
        let_go()


def _main(argv: Sequence[str] | None, began: float) -> int:
    parser = build_parser()
    arguments = parsed(parser, argv)
    arguments.began = began
    _log_to_stderr()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names in files may have letters that this terminal has not
    arguments.termination = Termination(TERMINATED)
    try:
        if arguments.command in RUNS_JOBS or own_limits():  # where OpenBLAS has no room it ends the process
            keep_small()
        check_not_empty(parser, arguments)
        from . import commands
        from .trial import try_inputs

        try_inputs(arguments)
        outcome = getattr(commands, arguments.command)(arguments)
        sys.stdout.flush()
        return OUTCOMES[outcome]
    except JobBusyError as error:  # this process has done its share
        _say(arguments, str(error))
        return DONE
    except JobStopped as error:
        _say(arguments, f"{error}{_go_on(arguments)}")
        return {INTERRUPTED_BY: INTERRUPTED, TERMINATED_BY: TERMINATED}.get(str(error), UNFINISHED)
    except CqsaError as error:
        message = said(error, parser, arguments)
        left = "" if str(START_OVER) in str(error) else _go_on(arguments)
        _say(arguments, message.removesuffix(".") + left if left else message)
        return UNUSABLE
    except KeyboardInterrupt:
        left = _go_on(arguments) or "; nothing unfinished is left behind"
        _say(arguments, f"interrupted{left}")
        return INTERRUPTED
    except BrokenPipeError:
        return UNREAD  # the reader of our output is gone, as in `cqsa info x.h5 | head`
    except Exception as error:
        if memory_was_refused(error):
            message = refusal(error)
        elif isinstance(error, OSError):  # of a disk or a directory, met where nothing says more of it
            where = "" if error.filename is None else f"{error.filename}: "
            message = f"{where}{error.strerror or error}"
        else:
            raise
        _say(arguments, f"{message}{_go_on(arguments)}")
        return UNUSABLE


def _say(arguments: argparse.Namespace, message: str) -> None:
    """Print ``message``, which may have names of files in it, on one line of standard error."""
    say(f"cqsa {arguments.command}: {one_line(message)}")


def _go_on(arguments: argparse.Namespace) -> str:
    """How to go on with what a command that runs jobs has left, if it has left something."""
    out = getattr(arguments, "out", None)
    if arguments.command not in RUNS_JOBS or out is None:
        return ""
    from ..durable import JobFolder  # heavy, as the commands are

    if not JobFolder(os.path.realpath(out)).exists:
        return ""
    return f"; what was committed is kept: cqsa resume {one_line(shlex.quote(out))}"


class _OneLine(logging.Formatter):
    """Names in messages are shown without the controls of a terminal in them."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def _log_to_stderr() -> None:
    logger = logging.getLogger("cqsa_arrays")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_OneLine("cqsa: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
