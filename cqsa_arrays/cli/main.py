"""Entry of the command: parses, runs one subcommand, turns errors into messages and exit codes.

Exit codes: 0 done; 1 a comparison or verification failed; 2 input that cannot be used; 130 interrupted;
141 nobody read the output; 143 terminated.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from ..errors import CqsaError, one_line
from .parser import build_parser

FAILED, UNUSABLE, INTERRUPTED, UNREAD, TERMINATED = 1, 2, 130, 141, 143


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
        from . import commands
        from .trial import try_inputs

        try_inputs(arguments)
        succeeded = getattr(commands, arguments.command)(arguments)
        sys.stdout.flush()
        return 0 if succeeded else FAILED
    except CqsaError as error:
        print(f"cqsa {arguments.command}: {one_line(str(error))}", file=sys.stderr)  # HDF5 may say several lines
        return UNUSABLE
    except KeyboardInterrupt:
        print(f"cqsa {arguments.command}: interrupted; nothing unfinished is left behind", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone, as in `cqsa info x.h5 | head`: nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD


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
