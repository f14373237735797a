"""Entry of the command: parses, runs one subcommand, turns errors into messages and exit codes.

Exit codes: 0 done; 1 a comparison or verification failed; 2 input that cannot be used, or memory that was refused;
3 a job that is not finished yet, everything done so far being committed; 130 interrupted; 141 nobody read the output;
143 terminated.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from ..errors import CqsaError, JobBusyError, JobStopped, one_line
from .parser import build_parser
from .process import keep_small, memory_was_refused, refusal
from .reasons import INTERRUPTED_BY, TERMINATED_BY

RUNS_JOBS = ("attend", "resume")
FAILED, UNUSABLE, UNFINISHED, INTERRUPTED, UNREAD, TERMINATED = 1, 2, 3, 130, 141, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``cqsa`` with ``argv`` (default: the process's arguments); returns the exit code."""
    arguments = build_parser().parse_args(argv)
    _log_to_stderr()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names in files may have letters that this terminal has not
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # what nohup asks for stays ignored
            signal.signal(number, _terminate)
    try:
        if arguments.command in RUNS_JOBS:
            keep_small()
        from . import commands
        from .trial import try_inputs

        try_inputs(arguments)
        succeeded = getattr(commands, arguments.command)(arguments)
        sys.stdout.flush()
        return 0 if succeeded else FAILED
    except (JobStopped, JobBusyError) as error:
        print(f"cqsa {arguments.command}: {error}{_go_on(arguments)}", file=sys.stderr)
        return {INTERRUPTED_BY: INTERRUPTED, TERMINATED_BY: TERMINATED}.get(str(error), UNFINISHED)
    except CqsaError as error:
        message = f"{one_line(str(error))}{_go_on(arguments)}"  # HDF5 may say several lines
        print(f"cqsa {arguments.command}: {message}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        left = _go_on(arguments) or "; nothing unfinished is left behind"
        print(f"cqsa {arguments.command}: interrupted{left}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone, as in `cqsa info x.h5 | head`: nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except Exception as error:
        if memory_was_refused(error):
            message = refusal(error)
        elif isinstance(error, OSError):  # of a disk or a directory, met where nothing says more of it
            where = "" if error.filename is None else f"{error.filename}: "
            message = one_line(f"{where}{error.strerror or error}")
        else:
            raise
        print(f"cqsa {arguments.command}: {message}{_go_on(arguments)}", file=sys.stderr)
        return UNUSABLE


def _go_on(arguments: argparse.Namespace) -> str:
    """How to go on with what a command that runs jobs has left, if it has left something."""
    out = getattr(arguments, "out", None)
    if arguments.command not in RUNS_JOBS or out is None:
        return ""
    from ..durable import JobFolder  # heavy, as the commands are

    if not JobFolder(out).exists:
        return ""
    return f"; what was committed is kept: cqsa resume {out}"


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM and a lost terminal unwind like an exit, so that unfinished files are removed."""
    raise SystemExit(TERMINATED)


def _log_to_stderr() -> None:
    logger = logging.getLogger("cqsa_arrays")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("cqsa: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
